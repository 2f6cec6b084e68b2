"""`ServedLayer`: bases and pages of one layer in one process of a server; and what a server may not ask for."""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swan.calibration import Calibration, Plan
from swan.integrations.vllm.pages import PageLayout
from swan.kernels import cuda
from swan.kernels.calls import kernels_on
from swan.storage import LayerPlan

__all__ = ["ServedLayer", "heads_of", "layers_of", "layouts_of", "refusal", "slots_of", "window_tokens"]


@dataclass(frozen=True)
class ServedLayer:
    """One layer in one process.

    Attributes:
        plan: layouts of all layers, buffer and sinks.
        index: of this one.
        key_basis: of the KV heads of this process ``[kv_heads, d, d]``.
        value_basis: likewise.
        dtype: dtype of the model.
    """

    plan: Plan
    index: int
    key_basis: Tensor
    value_basis: Tensor
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        calibration: Calibration,
        plan: Plan,
        index: int,
        *,
        rank: int,
        ranks: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "ServedLayer":
        """Take what belongs to a layer and the heads of a rank.

        Raises:
            ValueError: the calibration has no such layer, its keys and values differ in dimension, or some layer has no
                history.
        """
        if index >= len(plan.layers):
            raise ValueError(
                f"the calibration has {len(plan.layers)} layers of attention, and the model has a layer {index}"
            )
        plan_layer, bases = layers_of(plan)[index], calibration.layers[index]
        if plan_layer.keys.d != plan_layer.values.d:
            raise ValueError(
                f"swan does not serve keys and values of different dimensions ({plan_layer.keys.d} and "
                f"{plan_layer.values.d} in layer {index})"
            )
        heads = heads_of(bases.key_basis.shape[0], rank, ranks)
        key_basis, value_basis = (b[heads].to(device, dtype) for b in (bases.key_basis, bases.value_basis))
        return cls(plan, index, key_basis, value_basis, dtype)

    @property
    def kv_heads(self) -> int:
        """KV heads of this process."""
        return self.key_basis.shape[0]

    @property
    def d(self) -> int:
        """Head dimension."""
        return self.key_basis.shape[-1]

    def compile_ahead(self, tokens: int) -> None:
        """Compile the kernels of all layers for pages of so many tokens, at once, where there are GPU kernels."""
        device = self.key_basis.device
        if kernels_on(device) is cuda:
            _compile_once(self.plan, self.dtype, device, tokens)

    def layout(self, tokens: int) -> PageLayout:
        """Return the layout of pages of so many tokens.

        Raises:
            ValueError: pages cannot have so many.
        """
        return layouts_of(self.plan, tokens, self.dtype)[self.index]


@functools.cache
def _compile_once(plan: Plan, dtype: torch.dtype, device: torch.device, tokens: int) -> None:
    cuda.compile_ahead(layers_of(plan), dtype, device, tokens)


def layers_of(plan: Plan) -> list[LayerPlan]:
    """Return the layouts of all layers.

    Raises:
        ValueError: a layer has no history.
    """
    layers = [layer for layer in plan.layers if layer is not None]
    if len(layers) < len(plan.layers):
        index = plan.layers.index(None)
        raise ValueError(f"layer {index} has a sliding window: swan serves models without such layers only")
    return layers


def layouts_of(plan: Plan, tokens: int, dtype: torch.dtype) -> list[PageLayout]:
    """Return the pages of each layer.

    Where as many layers have pages of each size, vLLM takes that for a pattern that repeats, and cuts the windows,
    too, into groups, each of which gets whole blocks. So one layer is then padded, by a byte a slot, or to the next
    size where no two are alike.

    Raises:
        ValueError: a layer has no history, or is not `Graded`, or pages cannot have so many tokens.

    Example:
        >>> from swan import Graded
        >>> layers = [LayerPlan(*[Graded(((64, bits),))] * 2) for bits in (3, 4, 4, 3)]
        >>> [layout.slot_bytes for layout in layouts_of(Plan(tuple(layers), sinks=0), 128, torch.bfloat16)]
        [51, 66, 66, 50]
    """
    layouts = [PageLayout(layer, tokens, dtype, plan.sinks) for layer in layers_of(plan)]
    slots = [layout.slot_bytes for layout in layouts]
    if len(counts := Counter(slots)) > 1 and len(set(counts.values())) == 1:
        less, more = min(itertools.pairwise(sorted(counts)), key=lambda pair: pair[1] - pair[0])
        index = slots.index(less)
        alike = counts[less] > 1
        layouts[index] = dataclasses.replace(layouts[index], padding=1 if alike else more - less)
    return layouts


def slots_of(plan: Plan, tokens: int, dtype: torch.dtype) -> list[int]:
    """Return the bytes of a token and KV head in the pages of each layer, as `layouts_of` has them."""
    return [layout.slot_bytes for layout in layouts_of(plan, tokens, dtype)]


def window_tokens(plan: Plan, tokens: int, dtype: torch.dtype) -> int:
    """Return the tokens of a dense page: the most that divide those of a packed page, in at most as many bytes.

    Pages of all layers lie side by side: theirs together are what a dense page must fit into.

    Example:
        >>> from swan import Graded
        >>> window_tokens(Plan((LayerPlan(*[Graded(((64, 4),))] * 2),), sinks=0), 128, torch.bfloat16)
        32
    """
    slots = slots_of(plan, tokens, dtype)
    dense = sum(sum(layer.dense_nbytes(1, dtype.itemsize)) for layer in layers_of(plan))
    fitting = [n for n in range(1, tokens + 1) if tokens % n == 0 and n * dense <= tokens * sum(slots)]
    return max(fitting, default=1)


def heads_of(heads: int, rank: int, ranks: int) -> slice:
    """Return the KV heads of a rank: equal shares, or the same head in several ranks where there are fewer heads.

    Example:
        >>> heads_of(4, rank=1, ranks=2), heads_of(2, rank=3, ranks=4)
        (slice(2, 4, None), slice(1, 2, None))
    """
    if ranks > heads:
        first = rank * heads // ranks
        return slice(first, first + 1)
    share = heads // ranks
    return slice(rank * share, (rank + 1) * share)


def refusal(layer: Mapping[str, bool], config: Any) -> str | None:
    """Say what a server asks for that swan does not serve, or return None.

    Args:
        layer: whether a layer has something, by the name of it in a sentence.
        config: vLLM's configuration.
    """
    parallel = config.parallel_config
    server = {
        "speculative decoding by another method than ngram": _method(config.speculative_config) not in (None, "ngram"),
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "handing its cache to other servers (kv_transfer_config)": config.kv_transfer_config is not None,
        "with one kind of pages for all layers (disable_hybrid_kv_cache_manager)": (
            config.scheduler_config.disable_hybrid_kv_cache_manager is True
        ),
        "latent attention (MLA)": config.model_config.use_mla,
    }
    asked = [name for name, has in {**server, **layer}.items() if has]
    if not asked:
        return None
    return f"swan does not serve {', '.join(asked)}; leave --attention-backend CUSTOM out to serve this without swan"


def _method(speculative_config: Any) -> str | None:
    return None if speculative_config is None else speculative_config.method
