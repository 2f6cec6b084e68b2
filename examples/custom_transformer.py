"""Your own transformer on a winnowed cache: define, train, calibrate, decode, compile.

Run with ``python examples/custom_transformer.py``; two minutes on two cores.
"""

import time
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import swan

TEXT = "\n\n".join(topics.values()).encode()  # the language reference of Python, as bytes
CONTEXT, PROMPT, NEW = 256, 384, 64


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention = swan.SwanAttention(dim, heads=6, kv_heads=2, head_dim=32)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, cache: swan.KVCache | None) -> Tensor:
        x = x + self.attention(self.norm1(x), cache)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, dim: int = 192, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, 256, bias=False)

    def forward(self, ids: Tensor, caches: list[swan.KVCache] | None = None) -> Tensor:
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i])
        return self.head(self.norm(x))


def train(model: Transformer, data: Tensor, seconds: float) -> None:
    """Plain training: without a cache, SwanAttention is ordinary attention with gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    begun, step, reported = time.perf_counter(), 0, 0.0
    while (elapsed := time.perf_counter() - begun) < seconds:
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - elapsed / seconds) + 1e-5
        starts = torch.randint(len(data) - CONTEXT - 1, (8,))
        batch = torch.stack([data[s : s + CONTEXT + 1] for s in starts])
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if elapsed >= reported:
            print(f"{elapsed:3.0f} s   step {step:4d}   loss {loss.item():.3f}")
            reported += seconds / 6


@torch.no_grad()
def decode(model: Transformer, step: nn.Module, ids: Tensor, caches: list[swan.KVCache]) -> Tensor:
    """Logits of the last tokens of `ids`: the prompt at once, then one token at a time through `step`."""
    logits = [model(ids[:, :PROMPT], caches)[:, -1:]]
    logits += [step(ids[:, i : i + 1], caches) for i in range(PROMPT, ids.shape[1])]
    return torch.cat(logits, dim=1)


def main() -> None:
    torch.manual_seed(0)
    data = torch.tensor(list(TEXT))
    held_out = data[-(PROMPT + NEW) :][None]
    data = data[: -(PROMPT + NEW)]

    model = Transformer()
    train(model, data, seconds=60)
    model.eval()

    # Calibrate on some of the text: one basis for each layer and KV head, then give them to the model.
    calibration = swan.calibrate(model, data[:8192].view(-1, CONTEXT).split(8))
    swan.attach(model, calibration)

    with torch.no_grad():
        dense = model(held_out)[:, PROMPT - 1 :]
    compiled = torch.compile(model, fullgraph=True)
    for retention in (1.0, 0.33):
        plan = swan.Plan.for_retention(retention, calibration, buffer=64)
        caches, static = plan.caches(), plan.caches(static=True, max_length=PROMPT + NEW)
        for name, step, used in (("eager", model, caches), ("compiled", compiled, static)):
            logits = decode(model, step, held_out, used)
            error = (logits - dense).abs().max().item()
            agreement = (logits.argmax(-1) == dense.argmax(-1)).float().mean().item()
            print(f"retention {retention:<4}  {name:8}  max logit error {error:8.2g}   same next byte {agreement:6.1%}")
            if retention == 1.0:
                torch.testing.assert_close(logits, dense, atol=1e-4, rtol=1e-4)
        held, full = sum(c.nbytes for c in caches), sum(c.dense_nbytes for c in caches)
        print(f"retention {retention:<4}  cache {held / 1024:.0f} KiB of {full / 1024:.0f} KiB dense")


if __name__ == "__main__":
    main()
