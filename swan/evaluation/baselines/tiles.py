"""Rivals whose keys share scales between tokens: tiles of tokens are coded together, in a history of its own."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from swan.calibration.bases import Basis
from swan.evaluation.perplexity import CHUNK
from swan.functional import pack
from swan.functional.dispatch import Impl
from swan.modules import KVCache
from swan.modules.buffer import Evicted
from swan.modules.history import History
from swan.storage import Graded, Packed
from swan.storage.codes import code_bytes, pack_code, unpack_code
from swan.storage.mixing import mix_of

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["KVarN", "Kivi", "TileHistory", "balanced", "kivi_fits"]

KIVI_GROUP = 32  # tokens of a key channel, or coordinates of a value, that share a scale and an offset
KVARN_TILE = 128  # tokens
KVARN_ROUNDS = 16  # of balancing rows and columns
LEAST = 1e-6  # of a deviation, over the largest
APART = 2.0**10  # a factor of a row or a column is at most so many times their mean, and at least that part of it

Tile = tuple[Tensor, ...]


class TileCoder(Protocol):
    """A way to code the keys and the values of so many tokens together."""

    @property
    def tile(self) -> int:
        """Return how many tokens are coded together."""
        ...

    def code(self, k: Tensor, v: Tensor) -> tuple[Tile, Tile]:
        """Return all that is stored of keys and values ``[batch, kv_heads, tiles, tile, d]``."""
        ...

    def decode(self, keys: Tile, values: Tile, dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[batch, kv_heads, tiles, tile, d]``, float32."""
        ...


class TileHistory(History):
    """Tiles of tokens, coded together. Tokens that leave the buffer wait dense until a tile of them is there."""

    def __init__(self, coder: TileCoder, cache: KVCache) -> None:
        super().__init__(cache.plan_layer, cache.state, cache.buffer.sinks)
        self.coder = coder
        self.coded: list[tuple[Tile, Tile]] = []
        self.waiting: tuple[Tensor, Tensor] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All that is stored of tiles, and the tokens that wait."""
        return [t for keys, values in self.coded for t in (*keys, *values)] + list(self.waiting or ())

    def kernel(self, k: Tensor, v: Tensor, impl: Impl) -> None:
        """Return None: no kernel stores this rival's codes."""

    def append(self, evicted: Evicted, impl: Impl = "auto") -> None:
        """Code tokens, as soon as there is a tile of them."""
        k, v, _ = evicted
        if self.waiting is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.waiting, (k, v), strict=True))
        tile = self.coder.tile
        whole = k.shape[2] // tile * tile
        if whole:
            tiles = [rearrange(x[:, :, :whole], "b h (n t) d -> b h n t d", t=tile).float() for x in (k, v)]
            self.coded.append(self.coder.code(*tiles))
        self.waiting = k[:, :, whole:].clone(), v[:, :, whole:].clone()

    def until(self, column: int | None) -> tuple[Packed | None, Packed | None]:
        """Keys and values before a column, dense: a rival is scored, not timed."""
        if self.waiting is None or column is None or column <= self.start:
            return None, None
        k, v = self.waiting
        dims = k.shape[-1], v.shape[-1]
        tiles = [self.coder.decode(*tile, dims) for tile in self.coded]
        decoded = [[rearrange(x, "b h n t d -> b h (n t) d") for x in side] for side in zip(*tiles, strict=True)]
        keys, values = decoded or ([], [])
        dense = torch.cat([*keys, k], dim=2), torch.cat([*values, v], dim=2)
        stop = column - self.start
        k, v = (pack(x[:, :, :stop].to(k.dtype), Graded(((x.shape[-1], 16),))) for x in dense)
        return k, v


@dataclass(frozen=True)
class Tiled:
    """What rivals that code tiles share: settings of a `Method`, and a cache whose histories are tiles.

    Args:
        buffer: recent tokens kept dense.
        sinks: first tokens kept dense.
    """

    buffer: int = field(default=64, kw_only=True)
    sinks: int = field(default=4, kw_only=True)
    form: str = field(default="", init=False, repr=False)
    tile: int = field(default=1, init=False, repr=False)
    basis: Basis | None = field(default="identity", init=False, repr=False)
    seed: int = field(default=0, init=False, repr=False)
    chunk: int = field(default=CHUNK, init=False, repr=False)

    def check(self, d: int, dv: int, layer: int) -> None:
        """Raise a ValueError where keys or values of these dimensions cannot be coded."""

    def cache(self, model: "PreTrainedModel") -> "Cache":
        """Make a cache for an attached model.

        Raises:
            ValueError: a layer cannot be coded.
        """
        from swan.integrations.transformers import SwanCache

        cache = SwanCache(model, retention=1.0, buffer=self.buffer, sinks=self.sinks, prefill="windowed")
        for index, kv in cache.winnowed.items():
            assert kv.plan_layer is not None
            self.check(kv.plan_layer.keys.d, kv.plan_layer.values.d, index)
            kv.history = TileHistory(self, kv)
        return cache

    def code(self, k: Tensor, v: Tensor) -> tuple[Tile, Tile]:
        """Return all that is stored of keys and values."""
        raise NotImplementedError

    def decode(self, keys: Tile, values: Tile, dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return keys and values."""
        raise NotImplementedError


@dataclass(frozen=True)
class Kivi(Tiled):
    """Keys by channel and values by token at few bits, with 4 bytes for every 32 of them: ``(bits + 1) / 16`` of bf16.

    Args:
        bits: 2 or 4.
        buffer: recent tokens kept dense.
        sinks: first tokens kept dense.

    Source: KIVI, arXiv:2402.02750.
    """

    bits: int
    form: str = field(default="kivi", init=False, repr=False)
    tile: int = field(default=KIVI_GROUP, init=False, repr=False)

    @property
    def retention(self) -> float:
        """Return the bytes per history token over those in bf16."""
        return (self.bits + 1) / 16

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {"bits": self.bits, "group": KIVI_GROUP, "buffer": self.buffer, "sinks": self.sinks}

    def check(self, d: int, dv: int, layer: int) -> None:
        """Raise a ValueError where values cannot be cut into groups of 32 coordinates."""
        if not kivi_fits(dv):
            raise ValueError(
                f"KIVI needs values whose head dimension is a multiple of {KIVI_GROUP}, got {dv} in layer {layer}: "
                "leave it out for this model, as rivals() does"
            )

    def code(self, k: Tensor, v: Tensor) -> tuple[Tile, Tile]:
        """Code channels of 32 tokens, and 32 coordinates of a value."""
        groups = rearrange(v, "... t (n c) -> ... t n c", c=KIVI_GROUP)
        return affine(k.mT, self.bits, torch.bfloat16), affine(groups, self.bits, torch.bfloat16)

    def decode(self, keys: Tile, values: Tile, dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return what the codes stand for."""
        groups = undo_affine(values, KIVI_GROUP, self.bits)
        return undo_affine(keys, KIVI_GROUP, self.bits).mT, rearrange(groups, "... t n c -> ... t (n c)")


def kivi_fits(dv: int) -> bool:
    """Tell if values of a head dimension can be cut into KIVI's groups; keys can always, as theirs are of tokens."""
    return dv % KIVI_GROUP == 0


@dataclass(frozen=True)
class KVarN(Tiled):
    r"""Tiles of 128 tokens after a Hadamard transform, divided by deviations of their rows and columns, at few bits.

    `balanced` divides a tile by a factor for each channel and each token. Then keys have a scale and an offset for each
    channel of the tile, values for each token; the factors along the other axis are stored beside them. All of these
    take 16 bits: of a tile

        keys    128 d bits / 8 + 2 (2 d + 128) bytes
        values  128 d bits / 8 + 2 (2 * 128 + d) bytes

    Args:
        dims: head dimensions of keys and values.
        bits: of keys and of values.
        buffer: recent tokens kept dense.
        sinks: first tokens kept dense.

    Source: KVarN, arXiv:2606.03458.
    """

    dims: tuple[int, int]
    bits: tuple[int, int] = (4, 2)
    form: str = field(default="kvarn", init=False, repr=False)
    tile: int = field(default=KVARN_TILE, init=False, repr=False)

    @property
    def retention(self) -> float:
        """Return the bytes per history token over those in bf16."""
        (d, dv), (key_bits, value_bits), tile = self.dims, self.bits, KVARN_TILE
        keys = d * code_bytes(tile, key_bits) + 2 * (2 * d + tile)
        values = tile * code_bytes(dv, value_bits) + 2 * (2 * tile + dv)
        return (keys + values) / (2 * tile * (d + dv))

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        keys, values = self.bits
        return {"bits": f"K {keys} V {values}", "tile": KVARN_TILE, "buffer": self.buffer, "sinks": self.sinks}

    def code(self, k: Tensor, v: Tensor) -> tuple[Tile, Tile]:
        """Balance both, and code channels of keys and tokens of values."""
        sides: list[Tile] = []
        for x, bits, by_channel in ((k, self.bits[0], True), (v, self.bits[1], False)):
            mixed = x @ hadamard(x)
            tile, own, other = balanced(mixed.mT if by_channel else mixed)
            codes, scale, low = affine(tile, bits, torch.float32)
            sides.append((codes, (scale * own).half(), (low * own).half(), other.half()))
        return sides[0], sides[1]

    def decode(self, keys: Tile, values: Tile, dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return what the codes stand for, in the coordinates of the cache."""
        k = undo_affine(keys[:3], KVARN_TILE, self.bits[0]) * keys[3].float()
        v = undo_affine(values[:3], dims[1], self.bits[1]) * values[3].float()
        return k.mT @ hadamard(k.mT).mT, v @ hadamard(v).mT


def balanced(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divide matrices by factors of their rows and columns until all of those have a standard deviation of about 1.

    Columns and rows are divided by their deviations in turn; of all rounds that one is taken in which the largest and
    the smallest deviation of rows, and those of columns, are the least apart.

    Args:
        x: ``[..., rows, columns]``.

    Returns:
        The quotient, the factors of rows ``[..., rows, 1]`` and those of columns ``[..., 1, columns]``.
    """
    rows, columns = torch.ones_like(x[..., :1]), torch.ones_like(x[..., :1, :])
    best = (rows, columns)
    least = torch.full_like(x[..., :1, :1], torch.inf)
    for _ in range(KVARN_ROUNDS + 1):
        quotient = x / (rows * columns)
        apart = sum(_ratio(_deviation(quotient, dim)) for dim in (-1, -2))
        better = apart < least
        least = torch.where(better, apart, least)
        best = tuple(torch.where(better, new, old) for new, old in zip((rows, columns), best, strict=True))
        columns = _bounded(columns * _deviation(quotient, -2), -1)
        rows = _bounded(rows * _deviation(x / (rows * columns), -1), -2)
        mean = _geometric_mean(columns, -1)  # else one side may grow as the other falls, and both must fit into 16 bits
        rows, columns = rows * mean, columns / mean
    rows, columns = best
    return x / (rows * columns), rows, columns


def _bounded(factors: Tensor, dim: int) -> Tensor:
    """Keep factors near their mean: those of rows of zeros, say, would fall in each round."""
    mean = _geometric_mean(factors, dim)
    return factors.clamp(mean / APART, mean * APART)


def _geometric_mean(factors: Tensor, dim: int) -> Tensor:
    return factors.log().mean(dim=dim, keepdim=True).exp()


def _deviation(x: Tensor, dim: int) -> Tensor:
    """Return standard deviations; of rows or columns that are constant, or nearly so, the least that divides."""
    deviation = x.std(dim=dim, keepdim=True)
    largest = deviation.amax(dim=(-1, -2), keepdim=True)
    return torch.where(largest > 0, deviation.clamp(min=LEAST * largest), 1.0)


def _ratio(deviation: Tensor) -> Tensor:
    return deviation.amax(dim=(-1, -2), keepdim=True) / deviation.amin(dim=(-1, -2), keepdim=True)


def hadamard(x: Tensor) -> Tensor:
    """Return the matrix that mixes the coordinates of `x`."""
    return mix_of(((x.shape[-1], 8),), x.dtype, x.device)


def affine(x: Tensor, bits: int, dtype: torch.dtype) -> Tile:
    """Code with `bits` bits between minimum and maximum along the last axis; scales and minima are of a dtype."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    low = low.to(dtype)
    scale = ((high - low.float()) / (2**bits - 1)).to(dtype)
    steps = torch.where(scale > 0, (x - low.float()) / scale.float(), 0)
    code = steps.round().clamp(0, 2**bits - 1).to(torch.uint8)
    return torch.cat(pack_code(code, bits), dim=-1), scale, low


def undo_affine(coded: Tile, size: int, bits: int) -> Tensor:
    """Return what `affine` coded, float32."""
    codes, scale, low = coded
    return unpack_code(codes, size, bits) * scale.float() + low.float()
