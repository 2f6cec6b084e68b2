"""What packing a layer does to the predictions of a model: measured for a catalogue of layouts, by gradients."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from swan.calibration.capture import Observed, attention_layers, call, observing
from swan.calibration.progress import track
from swan.functional.rotation import rotate
from swan.packed import Graded, pack, unpack

__all__ = [
    "KEYS",
    "VALUES",
    "Effects",
    "Groups",
    "beginning",
    "graded",
    "measure_effects",
    "sensitivities",
    "tokens_of",
]

Groups = tuple[tuple[int, int], ...]

# Candidates for keys and for values: groups as (sixteenths of d, bits). What remained of 63 when those that
# plans per layer can do without were taken out one by one.
KEYS: tuple[Groups, ...] = (
    ((2, 4), (14, 1)),
    ((2, 5), (6, 2), (8, 1)),
    ((1, 6), (3, 4), (12, 2)),
    ((1, 8), (3, 5), (4, 3), (8, 1)),
    ((1, 8), (3, 6), (4, 4), (8, 2)),
    ((2, 8), (6, 4), (8, 2)),
    ((2, 6), (6, 4), (8, 3)),
    ((2, 8), (6, 5), (8, 3)),
    ((2, 8), (6, 5), (8, 4)),
    ((4, 8), (12, 5)),
    ((16, 8),),
)
VALUES: tuple[Groups, ...] = (
    ((8, 2), (8, 0)),
    ((2, 3), (6, 2), (8, 1)),
    ((2, 3), (14, 2)),
    ((4, 3), (12, 2)),
    ((2, 4), (6, 3), (8, 2)),
    ((2, 4), (14, 3)),
    ((2, 5), (6, 4), (8, 3)),
    ((8, 5), (8, 4)),
    ((16, 6),),
    ((16, 8),),
)
BUFFER, SINKS = 64, 4  # tokens that a query sees dense
WINDOWS, TOKENS = 4, 1024  # how much text `calibrate` measures on, at most
QUERIES = 512  # rows of a score matrix at a time


@dataclass(frozen=True)
class Effects:
    """KL divergence that each candidate adds, nats per token, float32; NaN for layers with a sliding window.

    Args:
        keys: ``[layers, len(KEYS)]``: the keys of that layer are packed, all else is dense.
        values: ``[layers, len(VALUES)]``.

    Example:
        >>> import swan
        >>> model = torch.nn.Sequential(swan.SwanAttention(64, heads=4))
        >>> effects = swan.calibrate(model, [torch.randn(1, 100, 64)], effects=True).effects
        >>> effects.keys.shape, effects.values.shape
        (torch.Size([1, 11]), torch.Size([1, 10]))
    """

    keys: Tensor
    values: Tensor


def graded(d: int, groups: Groups) -> Graded:
    """Groups of sixteenths of `d`, rounded; a group that rounds to nothing is left out."""
    stops = [round(d * sum(size for size, _ in groups[:i]) / 16) for i in range(len(groups) + 1)]
    sizes = [stop - start for start, stop in itertools.pairwise(stops)]
    return Graded(tuple((size, bits) for size, (_, bits) in zip(sizes, groups, strict=True) if size))


def measure_effects(
    model: nn.Module, batches: Sequence[Any], bases: Sequence[tuple[Tensor, Tensor]], *, seed: int, progress: bool
) -> Effects:
    r"""Predict, for each layer and candidate, the KL divergence from the dense model.

    Let $h_j$ be the gradient of $\log p(y)$, with $y$ drawn from the model's own predictions, by the key (or value)
    of token $j$ as those queries see it that see it packed. Errors $\delta_j$ of what is stored, independent from
    token to token, move the predictions by $\mathrm{KL} \approx \frac12 E \sum_j (h_j \cdot \delta_j)^2$, since the
    Fisher information is the second derivative of the KL divergence. One backward pass serves all.

    Args:
        model: in evaluation mode; its output is logits ``[batch, tokens, vocabulary]`` or has them as ``logits``.
        batches: as for `calibrate`; `beginning` keeps them small.
        bases: key and value basis of each layer.
        seed: of the draws.
        progress: show a progress bar.

    Returns:
        The effects.

    Raises:
        ValueError: no text is longer than the buffer of 64 tokens.
        RuntimeError: every layer has a sliding window, or there is no backward pass through the model.
    """
    if max(map(tokens_of, batches)) <= BUFFER:
        raise ValueError(f"effects are measured on tokens beyond the buffer: give texts of more than {BUFFER} tokens")
    tables = [torch.full((len(bases), len(side)), torch.nan) for side in (KEYS, VALUES)]
    generator, tokens = torch.Generator().manual_seed(seed), 0
    rows = {index: row for row, index in enumerate(sorted(attention_layers(model)))}  # of hybrids not all layers
    for batch in track(batches, "measuring effects", show=progress):
        for index, (seen, gradient) in _run(model, batch, generator).items():
            row = rows.get(index, index)
            sides = zip(tables, (seen.k, seen.v), sensitivities(seen, gradient), bases[row], strict=True)
            for (table, x, h, basis), candidates in zip(sides, (KEYS, VALUES), strict=True):
                basis = basis.to(x.device)
                added = _kl(rotate(x.float(), basis), rotate(h, basis), candidates)
                table[row] = table[row].nan_to_num(0) + added.cpu()
        tokens += tokens_of(batch)
    return Effects(*(table / tokens for table in tables))


def tokens_of(batch: Any) -> int:
    """Tokens in a row of a batch."""
    return (batch["input_ids"] if isinstance(batch, Mapping) else batch).shape[1]


def sensitivities(seen: Observed, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by each key and value through the queries that see it packed, float32 ``[batch, kv_heads, tokens, d]``.

    With weights p, output o and its gradient g: ``sum_i p_ij (g_i . (v_j - o_i)) scale q_i`` and ``sum_i p_ij g_i``.
    """
    kv_heads, tokens = seen.k.shape[1:3]
    q, out, g = (
        rearrange(t.float(), pattern, h=kv_heads)
        for t, pattern in (
            (seen.q, "b (h g) t d -> b h g t d"),
            (seen.out, "b t (h g) d -> b h g t d"),
            (gradient, "b t (h g) d -> b h g t d"),
        )
    )
    k, v = seen.k.float(), seen.v.float()
    by_key, by_value = torch.zeros_like(k), torch.zeros_like(v)
    key = torch.arange(tokens, device=k.device)
    for start in range(0, tokens, QUERIES):
        rows = slice(start, start + QUERIES)
        query = key[rows, None]
        visible = (key <= query) if seen.mask is None else seen.mask[:, :, None, rows]
        packed = (query - key >= BUFFER) & (key >= SINKS)
        scores = einsum(q[..., rows, :], k, "b h g i d, b h j d -> b h g i j") * seen.scale
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0) * packed
        by_value += einsum(weights, g[..., rows, :], "b h g i j, b h g i d -> b h j d")
        change = einsum(g[..., rows, :], v, "b h g i d, b h j d -> b h g i j")
        change -= einsum(g[..., rows, :], out[..., rows, :], "b h g i d, b h g i d -> b h g i")[..., None]
        by_key += einsum(weights * change, q[..., rows, :], "b h g i j, b h g i d -> b h j d") * seen.scale
    return by_key, by_value


def _kl(x: Tensor, h: Tensor, candidates: Sequence[Groups]) -> Tensor:
    """Half the sum over tokens of the squared first-order change, for each candidate."""
    errors = [unpack(pack(x, layout)) - x for layout in (graded(x.shape[-1], groups) for groups in candidates)]
    return torch.stack([(h * error).sum(-1).square().sum() / 2 for error in errors])


def _run(model: nn.Module, batch: Any, generator: torch.Generator) -> dict[int, tuple[Observed, Tensor]]:
    """What each layer without a sliding window did, and the gradient of its output."""
    layers: dict[int, Observed] = {}

    def observe(index: int, seen: Observed) -> None:
        if not seen.sliding:
            layers[index] = seen

    with torch.enable_grad(), observing(model, observe):
        output = call(model, batch)
        if not layers:
            raise RuntimeError("every layer attends to a sliding window only")
        log_p = getattr(output, "logits", output).float().log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp().flatten(0, 1).cpu(), 1, generator=generator)
        likelihood = log_p.gather(-1, drawn.to(log_p.device).view(*log_p.shape[:2], 1))[..., 0]
        real = next(iter(layers.values())).real
        total = likelihood.sum() if real is None else (likelihood * real).sum()
        gradients = torch.autograd.grad(total, [seen.out for seen in layers.values()])
    return dict(zip(layers, zip(layers.values(), gradients, strict=True), strict=True))


def beginning(batch: Any) -> Any:
    """The first row and at most `TOKENS` tokens of a batch."""
    if isinstance(batch, Mapping):
        named = cast("Mapping[str, Any]", batch)
        return {n: t[:1, :TOKENS].clone() if isinstance(t, Tensor) and t.ndim > 1 else t for n, t in named.items()}
    return batch[:1, :TOKENS].clone()  # not a view that keeps the whole batch
