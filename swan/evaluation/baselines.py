"""Rivals as caches: what others store, scored by the same evaluation, with their bytes counted alike.

Those that code each token on its own are layouts, so they share buffer, sinks and attention with swan. KIVI's
keys share scales between tokens, which takes a cache of its own. The caches of transformers run as they are.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from swan.calibration import Plan
from swan.calibration.bases import Basis
from swan.evaluation.perplexity import CHUNK, Method, Setting
from swan.functional import pack
from swan.functional.dispatch import Impl
from swan.modules import KVCache
from swan.modules.buffer import Evicted
from swan.modules.history import History
from swan.storage import Graded, LayerPlan, Layout, Packed, TopK
from swan.storage.codes import code_bytes, pack_code, unpack_code

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["Float8", "Kivi", "LloydMax", "TransformersQuantized", "rivals"]

KIVI_GROUP = 32  # tokens of a key channel, or coordinates of a value, that share a scale and an offset


@dataclass(frozen=True)
class Float8:
    """Every coordinate as an 8-bit float (e4m3) without scale: the fp8 cache of most servers. ``d`` bytes.

    Args:
        d: head dimension.

    Source: Micikevicius et al., arXiv:2209.05433.
    """

    form: ClassVar[str] = "fp8"

    d: int

    def vector_bytes(self, itemsize: int = 2) -> int:
        """Return one byte for each coordinate."""
        return self.d

    def pack(self, x: Tensor) -> Packed:
        """Code coordinates as the nearest 8-bit floats."""
        limit = torch.finfo(torch.float8_e4m3fn).max
        codes = x.clamp(-limit, limit).to(torch.float8_e4m3fn).view(torch.uint8)
        return Packed((codes,), None, None, self, x.dtype)

    def unpack(self, packed: Packed) -> Tensor:
        """Return the 8-bit floats in the dtype of the cache."""
        return packed.planes[0].view(torch.float8_e4m3fn).to(packed.dtype)

    def mix(self, dtype: torch.dtype, device: torch.device) -> None:
        """Return None: nothing is mixed."""


@dataclass(frozen=True)
class LloydMax:
    r"""Every coordinate on the Lloyd-Max grid of a normal distribution, and the length of the vector in 16 bits.

    After a random rotation the coordinates of a vector, times $\sqrt d / \lVert x \rVert$, are close to
    standard normal; the grid has the least squared error for that. ``ceil(d * bits / 8) + 2`` bytes.

    Args:
        d: head dimension.
        bits: 1 to 6, or 8.

    Source: TurboQuant, arXiv:2504.19874.
    """

    form: ClassVar[str] = "random-rotation"

    d: int
    bits: int

    def vector_bytes(self, itemsize: int = 2) -> int:
        """Count the bytes of the codes and of the length."""
        return code_bytes(self.d, self.bits) + 2

    def pack(self, x: Tensor) -> Packed:
        """Code coordinates as the nearest grid points."""
        length = x.float().norm(dim=-1, keepdim=True).to(torch.float16)
        grid = normal_grid(self.bits).to(x.device)
        unit = x.float() * (math.sqrt(self.d) / length.float().clamp(min=1e-30))
        code = torch.bucketize(unit, (grid[1:] + grid[:-1]) / 2).to(torch.uint8)
        return Packed((torch.cat(pack_code(code, self.bits), dim=-1),), length, None, self, x.dtype)

    def unpack(self, packed: Packed) -> Tensor:
        """Return grid points times the length."""
        code = unpack_code(packed.planes[0], self.d, self.bits)
        assert packed.scales is not None
        grid = normal_grid(self.bits).to(code.device)
        return (grid[code.int()] * (packed.scales.float() / math.sqrt(self.d))).to(packed.dtype)

    def mix(self, dtype: torch.dtype, device: torch.device) -> None:
        """Return None: nothing is mixed."""


@functools.cache
def normal_grid(bits: int) -> Tensor:
    """Compute the grid of ``2 ** bits`` points with the least squared error for a standard normal variable, float32.

    Example:
        >>> normal_grid(2)
        tensor([-1.5104, -0.4528,  0.4528,  1.5104])
    """
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    count = 2**bits
    grid = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(2000):
        middle = (grid[1:] + grid[:-1]) / 2
        edges = torch.cat([middle.new_tensor([-torch.inf]), middle, middle.new_tensor([torch.inf])])
        density = torch.where(edges.isinf(), 0, normal.log_prob(edges.clamp(-40, 40)).exp())
        mass = normal.cdf(edges.clamp(-40, 40))
        grid = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    return grid.float()


class KiviHistory(History):
    """Keys coded by channel over 32 tokens, values by token over 32 coordinates, with an offset and a scale each.

    Tokens that leave the buffer wait dense until 32 of them are there.
    """

    def __init__(self, bits: int, cache: KVCache) -> None:
        super().__init__(cache.plan_layer, cache.state, cache.buffer.sinks)
        self.bits = bits
        self.coded: list[tuple[Tensor, ...]] = []  # codes, scales and offsets of keys, then of values
        self.waiting: tuple[Tensor, Tensor] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Codes, scales and offsets, and the tokens that wait."""
        return [t for group in self.coded for t in group] + list(self.waiting or ())

    def kernel(self, k: Tensor, v: Tensor, impl: Impl) -> None:
        """Return None: no kernel stores this rival's codes."""

    def append(self, evicted: Evicted, impl: Impl = "auto") -> None:
        """Code tokens, as soon as there are 32 of them."""
        k, v, _ = evicted
        if self.waiting is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.waiting, (k, v), strict=True))
        whole = k.shape[2] // KIVI_GROUP * KIVI_GROUP
        if whole:
            keys = rearrange(k[:, :, :whole], "b h (n t) d -> b h n d t", t=KIVI_GROUP)
            values = rearrange(v[:, :, :whole], "b h t (n c) -> b h t n c", c=KIVI_GROUP)
            self.coded.append((*_affine(keys, self.bits), *_affine(values, self.bits)))
        self.waiting = k[:, :, whole:].clone(), v[:, :, whole:].clone()

    def until(self, column: int | None) -> tuple[Packed | None, Packed | None]:
        """Keys and values before a column, dense: a rival is scored, not timed."""
        if self.waiting is None or column is None or column <= self.start:
            return None, None
        stop = column - self.start
        keys, values = [], []
        for group in self.coded:
            k, v = _undo_affine(group[:3], self.bits), _undo_affine(group[3:], self.bits)
            keys.append(rearrange(k, "b h n d t -> b h (n t) d"))
            values.append(rearrange(v, "b h t n c -> b h t (n c)"))
        dense = torch.cat([*keys, self.waiting[0]], dim=2), torch.cat([*values, self.waiting[1]], dim=2)
        k, v = (pack(x[:, :, :stop], Graded(((x.shape[-1], 16),))) for x in dense)
        return k, v


def _affine(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Code with `bits` bits between minimum and maximum along the last axis; scales and minima take 16 bits."""
    low, high = x.float().aminmax(dim=-1, keepdim=True)
    low = low.to(torch.bfloat16)
    scale = ((high - low.float()) / (2**bits - 1)).to(torch.bfloat16)
    steps = torch.where(scale > 0, (x.float() - low.float()) / scale.float(), 0)
    code = steps.round().clamp(0, 2**bits - 1).to(torch.uint8)
    return torch.cat(pack_code(code, bits), dim=-1), scale, low


def _undo_affine(coded: tuple[Tensor, ...], bits: int) -> Tensor:
    codes, scale, low = coded
    return unpack_code(codes, KIVI_GROUP, bits) * scale.float() + low.float()


@dataclass(frozen=True)
class Kivi:
    """Keys by channel and values by token at few bits, with 4 bytes for every 32 of them: ``(bits + 1) / 16`` of bf16.

    Args:
        bits: 2 or 4.
        buffer: recent tokens kept dense.
        sinks: first tokens kept dense.

    Source: KIVI, arXiv:2402.02750.
    """

    bits: int
    buffer: int = 64
    sinks: int = 4
    form: str = field(default="kivi", init=False, repr=False)
    basis: Basis | None = field(default="identity", init=False, repr=False)
    seed: int = field(default=0, init=False, repr=False)
    chunk: int = field(default=CHUNK, init=False, repr=False)

    @property
    def retention(self) -> float:
        """Return the bytes per history token over those in bf16."""
        return (self.bits + 1) / 16

    def cache(self, model: "PreTrainedModel") -> "Cache":
        """Make a cache for an attached model.

        Raises:
            ValueError: the values of a layer cannot be cut into groups of 32 coordinates.
        """
        from swan.integrations.transformers import SwanCache

        cache = SwanCache(model, retention=1.0, buffer=self.buffer, sinks=self.sinks, prefill="windowed")
        for index, kv in cache.winnowed.items():
            assert kv.plan_layer is not None
            if not _kivi_fits(kv.plan_layer.values.d):
                raise ValueError(
                    f"KIVI needs values whose head dimension is a multiple of {KIVI_GROUP}, got "
                    f"{kv.plan_layer.values.d} in layer {index}: leave it out for this model, as rivals() does"
                )
            kv.history = KiviHistory(self.bits, kv)
        return cache

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {"bits": self.bits, "group": KIVI_GROUP, "buffer": self.buffer, "sinks": self.sinks}


def _kivi_fits(dv: int) -> bool:
    """Tell if values of a head dimension can be cut into KIVI's groups; keys can always, as theirs are of tokens."""
    return dv % KIVI_GROUP == 0


@dataclass(frozen=True)
class TransformersQuantized:
    """`QuantizedCache` of transformers with one of its backends; scored in chunks, its dense tail 0 to 127 tokens.

    Its own form: no sinks, and the whole history is coded anew each time the tail is full.

    Args:
        backend: ``"quanto"`` or ``"hqq"``.
        bits: 2 or 4.

    Source: transformers, whose cache follows KIVI, arXiv:2402.02750.
    """

    backend: str
    bits: int
    group: int = field(default=64, init=False, repr=False)
    tail: int = field(default=128, init=False, repr=False)
    basis: Basis | None = field(default=None, init=False, repr=False)  # runs on the model as it is
    seed: int = field(default=0, init=False, repr=False)
    chunk: int = field(default=128, init=False, repr=False)

    @property
    def form(self) -> str:
        """Return the name of the backend."""
        return self.backend

    @property
    def retention(self) -> float:
        """Return the retention: codes, and a scale and an offset of 16 bits for every group."""
        return (self.bits + 32 / self.group) / 16

    def cache(self, model: "PreTrainedModel") -> "Cache":
        """Make a cache for a model that is not attached."""
        from transformers import QuantizedCache

        axis = 0 if self.backend == "quanto" else 1
        return QuantizedCache(
            self.backend, model.config, nbits=self.bits, axis_key=axis, axis_value=axis, q_group_size=self.group,
            residual_length=self.tail,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {"bits": self.bits, "group": self.group, "buffer": self.tail // 2, "sinks": 0}


def rivals(dims: Sequence[tuple[int, int]], *, buffer: int = 64, sinks: int = 4, seeds: int = 3) -> list[Method]:
    """Collect the methods that swan is measured against, at the bytes that each of them takes.

    Args:
        dims: head dimensions of keys and values of each layer.
        buffer: recent tokens kept dense.
        sinks: first tokens kept dense.
        seeds: how many rotations a random one is drawn.

    Returns:
        Window and sinks alone; fp8; top-k without rotation (8-bit values; Mustafar, arXiv:2505.22913) at two
        retentions; half the principal components of keys and values at 16 bits; a random rotation with 4, 3 and 2
        bits; KIVI with 4 and 2 bits, where the head dimensions of values are multiples of 32; and, where their
        packages are installed, the quantized caches of transformers.
    """
    from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

    def stored(make: Callable[[int], Layout]) -> Plan:
        return Plan(tuple(LayerPlan(make(d), make(dv)) for d, dv in dims), buffer=buffer, sinks=sinks)

    def topk(retention: float) -> Plan:
        return stored(lambda d: TopK(d, math.floor(2 * d * retention) - 2 - -(-d // 8)))

    methods: list[Method] = [
        Setting(Plan((None,) * len(dims), buffer=buffer, sinks=sinks)),
        Setting(stored(Float8), basis="identity"),
        *(Setting(topk(r), basis="identity", name="topk, no rotation") for r in (0.5, 0.33)),
        Setting(stored(lambda d: Graded.leading(d, d // 2)), "pca", name="low rank"),
    ]
    for bits in (4, 3, 2):
        plan = stored(lambda d, bits=bits: LloydMax(d, bits))
        methods += [Setting(plan, basis="random", seed=seed) for seed in range(seeds)]
    if all(_kivi_fits(dv) for _, dv in dims):
        methods += [Kivi(bits, buffer=buffer, sinks=sinks) for bits in (4, 2)]
    for backend, installed in (("quanto", is_optimum_quanto_available()), ("hqq", is_hqq_available())):
        if installed:
            methods += [TransformersQuantized(backend, bits) for bits in (4, 2)]
    return methods
