"""Effects of packing a layer on the predictions of a model, measured by gradients for a catalogue of layouts."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from swan.calibration.capture import Observed, call, observing
from swan.calibration.moments import Moments
from swan.functional.packing import pack
from swan.functional.rotation import rotate
from swan.storage import Graded, unpack

__all__ = [
    "KEYS",
    "TOKENS",
    "VALUES",
    "Effects",
    "Groups",
    "LayerGradients",
    "effects_of",
    "graded",
    "run_backward",
    "sensitivities",
]

Groups = tuple[tuple[int, int], ...]

# Candidates for keys and for values: groups as (sixteenths of d, bits). They remained of 41 and 44 when those that
# plans of three models at retentions from 0.5 to 0.1 can do without were taken out.
KEYS: tuple[Groups, ...] = (
    ((4, 3), (4, 1), (8, 0)),
    ((2, 5), (6, 2), (8, 0)),
    ((4, 4), (4, 2), (8, 0)),
    ((1, 6), (3, 3), (4, 2), (8, 1)),
    ((1, 8), (3, 4), (4, 2), (8, 1)),
    ((1, 6), (3, 4), (12, 2)),
    ((4, 6), (12, 2)),
    ((4, 5), (4, 3), (8, 2)),
    ((1, 8), (3, 6), (4, 4), (8, 2)),
    ((1, 8), (3, 6), (4, 4), (8, 3)),
    ((2, 8), (6, 5), (8, 3)),
    ((2, 8), (14, 4)),
    ((2, 8), (6, 5), (8, 4)),
    ((4, 8), (12, 5)),
    ((16, 8),),
)
VALUES: tuple[Groups, ...] = (
    ((8, 1), (8, 0)),
    ((4, 2), (12, 0)),
    ((2, 3), (6, 1), (8, 0)),
    ((8, 2), (8, 0)),
    ((16, 1),),
    ((4, 2), (8, 1), (4, 0)),
    ((10, 2), (6, 0)),
    ((8, 2), (8, 1)),
    ((2, 3), (6, 2), (8, 1)),
    ((16, 2),),
    ((8, 3), (8, 2)),
    ((4, 4), (4, 3), (8, 2)),
    ((16, 3),),
    ((8, 4), (8, 3)),
    ((2, 5), (6, 4), (8, 3)),
    ((16, 4),),
    ((8, 5), (8, 4)),
    ((4, 6), (12, 5)),
    ((16, 6),),
    ((16, 8),),
)
BLOCK = 16  # coordinates
BUFFER, SINKS = 64, 4  # recent tokens, which a query sees dense
WINDOWS, TOKENS = 8, 1024  # `calibrate` measures on so many texts of so many tokens, at most
FEW = 4  # times as much other text as in a window is enough for bases; those of values come from so many windows
STRIDE = 8  # one query in so many is looked at
QUERIES = 32  # queries whose scores are computed at a time
DRAWN = 64  # tokens for which words are drawn at a time


@dataclass(frozen=True)
class Effects:
    """KL divergence that each candidate adds, nats per token, float32; NaN for layers with a sliding window.

    Args:
        keys: ``[layers, kv_heads, len(KEYS)]``: the keys of that KV head are packed, all else is dense. Layers of fewer
            heads have NaN for those that they lack.
        values: ``[layers, kv_heads, len(VALUES)]``.

    Example:
        >>> import swan
        >>> model = torch.nn.Sequential(swan.SwanAttention(64, heads=4))
        >>> effects = swan.calibrate(model, [torch.randn(1, 100, 64)], effects=True).effects
        >>> effects.keys.shape, effects.values.shape
        (torch.Size([1, 4, 15]), torch.Size([1, 4, 20]))
    """

    keys: Tensor
    values: Tensor


def graded(d: int, groups: Groups) -> Graded:
    """Make a layout of groups in sixteenths of `d`, rounded to whole blocks of coordinates.

    A block is 16 coordinates from ``d = 32`` on, which kernels read together, and one below; the last group takes what
    no block fills, and a group that rounds to nothing is left out.

    Example:
        >>> graded(64, ((2, 5), (6, 2), (8, 1)))
        Graded(groups=((16, 5), (16, 2), (32, 1)))
        >>> graded(80, ((8, 4), (8, 3)))
        Graded(groups=((48, 4), (32, 3)))
    """
    block = BLOCK if d >= 2 * BLOCK else 1
    sixteenths = itertools.accumulate(size for size, _ in groups[:-1])
    stops = [0, *(int(d * n / 16 / block + 0.5) * block for n in sixteenths), d]
    sizes = [stop - start for start, stop in itertools.pairwise(stops)]
    return Graded(tuple((size, bits) for size, (_, bits) in zip(sizes, groups, strict=True) if size))


@dataclass(frozen=True)
class LayerGradients:
    """What `effects_of` needs of one layer and one text, on the CPU: of all tokens, and of every `STRIDE`-th query.

    Attributes:
        by_key: gradient of the log-likelihood by each key, from `sensitivities`.
        by_value: gradient by each value, likewise.
        q: queries ``[batch, kv_heads, query group, queries, d]``.
        gradient: gradient of the log-likelihood by the output of each query, ``[batch, kv_heads, query group, queries,
            dv]``.
        k: keys ``[batch, kv_heads, tokens, d]``.
        v: values ``[batch, kv_heads, tokens, dv]``.
        columns: places of the queries among the tokens ``[queries]``.
        mask: boolean ``[batch or 1, kv_heads or 1, query group or 1, queries, tokens]``; None where it is causal.
        scale: factor of the scores.
        moments: of all queries, keys and values; where the layer is.
    """

    by_key: Tensor
    by_value: Tensor
    q: Tensor
    gradient: Tensor
    k: Tensor
    v: Tensor
    columns: Tensor
    mask: Tensor | None
    scale: float
    moments: Moments


def run_backward(model: nn.Module, batch: Any, generator: torch.Generator) -> dict[int, LayerGradients]:
    """Run a model forward and backward.

    Args:
        model: in evaluation mode; its output is logits ``[batch, tokens, vocabulary]`` or has them as ``logits``.
        batch: as for `calibrate`; `swan.calibration.batches.beginning` keeps it small.
        generator: generator of the draws, on the CPU.

    Returns:
        The gradients of each layer without a sliding window, by its index.

    Raises:
        RuntimeError: every layer has a sliding window, or there is no backward pass through the model.
    """
    layers: dict[int, Observed] = {}
    with torch.enable_grad(), observing(model, layers.__setitem__):
        output = call(model, batch)
        full = {index: observed for index, observed in layers.items() if not observed.sliding}
        if not full:
            raise RuntimeError("every layer attends to a sliding window only")
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise RuntimeError(f"{type(model).__name__} has no head: its output has no logits")
        out = [observed.out for observed in full.values()]
        by_out = torch.autograd.grad(logits, out, _likelihood_gradient(logits, generator, full))
    return {
        index: _layer_gradients(observed, gradient)
        for (index, observed), gradient in zip(full.items(), by_out, strict=True)
    }


def _layer_gradients(observed: Observed, gradient: Tensor) -> LayerGradients:
    """Keep what `effects_of` needs; of queries every `STRIDE`-th that sees packed tokens."""
    kv_heads, tokens = observed.k.shape[1:3]
    columns = torch.arange(min(BUFFER + SINKS, tokens), tokens, STRIDE, device="cpu")
    index = columns.to(observed.k.device)
    q = rearrange(observed.q.index_select(2, index), "b (h g) i d -> b h g i d", h=kv_heads)
    by_out = rearrange(gradient.index_select(1, index), "b i (h g) d -> b h g i d", h=kv_heads)
    mask = observed.mask
    if mask is not None:  # of all heads, or of each
        heads = 1 if mask.shape[1] == 1 else kv_heads
        mask = rearrange(mask.index_select(2, index), "b (h g) i j -> b h g i j", h=heads).cpu()
    by_key, by_value = sensitivities(observed, gradient)
    moments = Moments.begin(observed.q, observed.k, observed.v, None)
    moments.add(observed.q, observed.k, observed.v, observed.real)
    by_key, by_value, q, by_out, k, v = (
        t.detach().cpu() for t in (by_key, by_value, q, by_out, observed.k, observed.v)
    )
    return LayerGradients(by_key, by_value, q, by_out, k, v, columns, mask, observed.scale, moments)


def _likelihood_gradient(logits: Tensor, generator: torch.Generator, layers: Mapping[int, Observed]) -> Tensor:
    """Draw words from logits; return the gradient of their log-likelihood: 1 at the word, less probabilities."""
    gradient = logits.detach().float().softmax(-1)
    words = gradient.flatten(0, 1)
    draws = [torch.multinomial(rows.cpu(), 1, generator=generator) for rows in words.split(DRAWN)]
    drawn = torch.cat(draws).to(words.device)
    words.neg_().scatter_add_(1, drawn, torch.ones_like(drawn, dtype=words.dtype))
    if (real := next(iter(layers.values())).real) is not None:
        gradient *= real[..., None]
    return gradient.to(logits.dtype)


def effects_of(
    texts: Iterable[tuple[Mapping[int, LayerGradients], Mapping[int, tuple[Tensor, Tensor]]]],
    kv_heads: Mapping[int, int],
    tokens: int,
    device: torch.device,
) -> Effects:
    r"""Predict, for each KV head of each layer and each candidate, the KL divergence from the dense model.

    Let $g_i$ be the gradient of $\log p(y)$, with $y$ drawn from the model's own predictions, by the output of the
    heads that read a KV head, for query $i$, and $\Delta o_i$ what that output changes by where the query sees tokens
    packed. Then $\mathrm{KL} \approx \frac12 E \sum_i (g_i \cdot \Delta o_i)^2$ with errors of different queries
    and heads taken as independent, since the Fisher information is the second derivative of the KL divergence. Errors
    of different tokens are not: what pruning takes from all of them adds up in an output. One backward pass serves all.

    Args:
        texts: for each text the gradients of each layer, from `run_backward`, and the key and value basis of each to
            store it in; looked at one by one.
        kv_heads: KV heads of each layer by its index (of hybrids not all layers have keys and values).
        tokens: tokens in all texts.
        device: where to compute.

    Returns:
        The effects, a row for each of the layers in the order of their indices.
    """
    shape = len(kv_heads), max(kv_heads.values())
    effects = Effects(*(torch.full((*shape, len(side)), torch.nan, device="cpu") for side in (KEYS, VALUES)))
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for layers, bases in texts:
        for index in layers:
            keys, values = sums.get(index, (0, 0))
            more_keys, more_values = _both_sums(layers[index], *bases[index], device)
            sums[index] = keys + more_keys, values + more_values
        del layers, bases  # before the next ones are there
    for row, index in enumerate(sorted(kv_heads)):
        if index in sums:
            for table, side in zip((effects.keys, effects.values), sums[index], strict=True):
                found = side.amax(0) / tokens
                table[row, : len(found)] = found
    return effects


def _both_sums(
    layer: LayerGradients, key_basis: Tensor, value_basis: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute half the sums of squared changes over tokens and over queries, of keys and of values.

    The change by a token is of the first order: the product of its gradient and what is lost of it.

    Returns:
        Two tensors ``[2, kv_heads, candidates]``.
    """
    bases = key_basis.to(device), value_basis.to(device)
    rows, sides = ((layer.k, layer.by_key, KEYS), (layer.v, layer.by_value, VALUES)), []
    for basis, (x, gradient, candidates) in zip(bases, rows, strict=True):
        x, gradient = (rotate(t.to(device).float(), basis) for t in (x, gradient))
        stored = _stored(x, candidates)
        by_tokens = [torch.linalg.vecdot(gradient, each - x).square().sum((0, 2)).cpu() / 2 for each in stored]
        sides.append((x, stored, torch.stack(by_tokens, dim=-1)))
    (k, stored_keys, keys), (v, stored_values, values) = sides
    by_queries = _kl_by_queries(layer, bases, (k, v), (stored_keys, stored_values))
    return torch.stack([keys, by_queries[0]]), torch.stack([values, by_queries[1]])


def _stored(x: Tensor, candidates: Sequence[Groups]) -> list[Tensor]:
    """Return vectors as each candidate stores them.

    Raises:
        ValueError: codes of few bits cannot store some of them.
    """
    stored = [unpack(pack(x, graded(x.shape[-1], groups))) for groups in candidates]
    if not all(bool(each.isfinite().all()) for each in stored):
        raise ValueError(
            "codes of few bits cannot store some keys or values: numbers above 55,109, infinity or NaN; calibrate in "
            "float32, or with effects=False and keep such layers in 16 bits"
        )
    return stored


def sensitivities(observed: Observed, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Compute gradients by keys and values through queries that see them packed, ``[batch, kv_heads, tokens, d]``.

    With weights p, output o and its gradient g: ``sum_i p_ij (g_i . (v_j - o_i)) scale q_i`` and ``sum_i p_ij g_i``,
    in float32.
    """
    kv_heads, tokens = observed.k.shape[1:3]
    q, out, g = (
        rearrange(t.float(), pattern, h=kv_heads)
        for t, pattern in (
            (observed.q, "b (h g) t d -> b h g t d"),
            (observed.out, "b t (h g) d -> b h g t d"),
            (gradient, "b t (h g) d -> b h g t d"),
        )
    )
    k, v = observed.k.float(), observed.v.float()
    by_key, by_value = torch.zeros_like(k), torch.zeros_like(v)
    key = torch.arange(tokens, device=k.device)
    mask = observed.mask
    if mask is not None:  # of all heads, or of each
        mask = rearrange(mask, "b (h g) i j -> b h g i j", h=1 if mask.shape[1] == 1 else kv_heads)
    for start in range(0, tokens, QUERIES):
        rows = slice(start, start + QUERIES)
        stop = start + QUERIES if mask is None else tokens  # a causal query sees no key after it
        keys = slice(0, stop)
        columns, query = key[keys], key[rows, None]
        visible = (columns <= query) if mask is None else mask[..., rows, :]
        packed = (query - columns >= BUFFER) & (columns >= SINKS)
        scores = einsum(q[..., rows, :], k[:, :, keys], "b h g i d, b h j d -> b h g i j") * observed.scale
        weights = _softmax(scores, visible).mul_(packed)
        by_value[:, :, keys] += einsum(weights, g[..., rows, :], "b h g i j, b h g i d -> b h j d")
        change = einsum(g[..., rows, :], v[:, :, keys], "b h g i d, b h j d -> b h g i j")
        change -= einsum(g[..., rows, :], out[..., rows, :], "b h g i d, b h g i d -> b h g i")[..., None]
        change *= weights
        by_key[:, :, keys] += einsum(change, q[..., rows, :], "b h g i j, b h g i d -> b h j d") * observed.scale
    return by_key, by_value


def _kl_by_queries(
    layer: LayerGradients,
    bases: tuple[Tensor, Tensor],
    dense: tuple[Tensor, Tensor],
    stored: tuple[list[Tensor], list[Tensor]],
) -> tuple[Tensor, Tensor]:
    """Compute half the sum over queries of the squared change by each KV head, for candidates, on the CPU.

    Args:
        layer: queries, and gradients by their outputs.
        bases: of keys and values.
        dense: keys and values, rotated.
        stored: the same as each candidate stores them.

    Returns:
        Of keys and of values ``[kv_heads, candidates]``.
    """
    (k, v), device = dense, dense[0].device
    q, g = (
        einsum(t.to(device).float(), basis, "b h g i d, h d e -> b h g i e")
        for t, basis in zip((layer.q * layer.scale, layer.gradient), bases, strict=True)
    )
    by_keys, by_values = (torch.zeros(k.shape[1], len(side), device="cpu") for side in (KEYS, VALUES))
    key = torch.arange(k.shape[2], device=device)
    for start in range(0, q.shape[3], QUERIES):
        rows = slice(start, start + QUERIES)
        columns = layer.columns[rows].to(device)[:, None]
        seen = slice(0, int(columns[-1]) + 1) if layer.mask is None else slice(None)  # causal: no key after a query
        visible = key[seen] <= columns if layer.mask is None else layer.mask[..., rows, :].to(device)
        packed = (columns - key[seen] >= BUFFER) & (key[seen] >= SINKS)
        q_rows, g_rows = q[..., rows, :], g[..., rows, :]

        def scores(k: Tensor) -> Tensor:
            return einsum(q_rows, k[:, :, seen], "b h g i d, b h j d -> b h g i j")  # noqa: B023

        def change(weights: Tensor, values: Tensor) -> Tensor:
            out = einsum(weights, values[:, :, seen], "b h g i j, b h j d -> b h g i d")  # noqa: B023
            return einsum(out, g_rows, "b h g i d, b h g i d -> b h i")  # noqa: B023

        exact = scores(k)
        weights = _softmax(exact, visible)
        out = change(weights, v)
        for number, each in enumerate(stored[0]):
            found = change(_softmax(torch.where(packed, scores(each), exact), visible), v)
            by_keys[:, number] += (found - out).square().sum((0, 2)).cpu()
        weights *= packed
        for number, each in enumerate(stored[1]):
            by_values[:, number] += change(weights, each - v).square().sum((0, 2)).cpu()
    return by_keys * STRIDE / 2, by_values * STRIDE / 2


def _softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Compute weights of visible keys, of 0 for a query that sees none; the scores are hidden in place."""
    return scores.masked_fill_(~visible, -torch.inf).softmax(-1).nan_to_num_(0)
