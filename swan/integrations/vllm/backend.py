"""What vLLM calls: a backend, the metadata of a batch, the attention of a layer, and the layer of its dense window."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, SlidingWindowSpec

from swan.calibration import Plan
from swan.functional.rotation import inverse_rotate, rotate
from swan.integrations.vllm.attention import Batch, batch_attention
from swan.integrations.vllm.layer import ServedLayer, refusal, window_tokens
from swan.integrations.vllm.pages import PAGE, DensePages, PackedPages, PageLayout
from swan.integrations.vllm.settings import Settings, load

__all__ = ["SwanBackend", "SwanImpl", "SwanMetadata", "SwanMetadataBuilder", "WindowLayer"]

WINDOW = ".swan_window"  # what the name of a layer's window ends in


class SwanBackend(AttentionBackend):
    """Attention over packed pages and a dense window."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]
    layout: ClassVar[Callable[[int], PageLayout] | None] = None  # by the tokens of a page; each layer has a class

    @staticmethod
    def get_name() -> str:
        """Return the name under which vLLM knows backends that are not its own."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["SwanImpl"]:
        """Return the class of a layer's attention."""
        return SwanImpl

    @staticmethod
    def get_builder_cls() -> type["SwanMetadataBuilder"]:
        """Return the class that makes the metadata of a batch."""
        return SwanMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Return the tokens that a page may have."""
        return [MultipleOf(PAGE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Ask for pages whose heads follow each other, those of all layers side by side: layers may differ in bytes."""
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Shrink the pages of a layer to its packed bytes."""
        if cls.layout is None:
            return spec
        layout = cls.layout(spec.block_size)
        return dataclasses.replace(spec, dtype=torch.uint8, state_content_bytes=layout.slot_bytes)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Return False: handing pages to other servers is not tested."""
        return False


def backend_of(served: ServedLayer) -> type[SwanBackend]:
    """Return the backend of a layer, which knows its bytes."""
    return type("SwanLayerBackend", (SwanBackend,), {"layout": staticmethod(served.layout)})


class WindowBackend(SwanBackend):
    """The backend of the windows: dense pages of any number of tokens."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Return the tokens that a page may have."""
        return [MultipleOf(1)]


@dataclass
class SwanMetadata:
    """The sequences of a batch, and their pages of one kind.

    Attributes:
        starts: as in `Batch`.
        lengths: likewise.
        table: pages of each sequence ``[sequences, pages]``.
    """

    starts: list[int]
    lengths: list[int]
    table: Tensor
    _batch: Batch | None = None

    def beside(self, window: "SwanMetadata", plan: Plan) -> Batch:
        """Return the batch with packed pages of these and dense ones of the window, the same object to all layers."""
        if self._batch is None or self._batch.dense_table is not window.table:
            self._batch = Batch(self.starts, self.lengths, self.table, window.table, plan.buffer, plan.sinks)
        return self._batch


class SwanMetadataBuilder(AttentionMetadataBuilder[SwanMetadata]):
    """Makes the metadata of a batch from vLLM's."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SwanMetadata:
        """Make the metadata of a batch."""
        common = common_attn_metadata
        return SwanMetadata(
            common.query_start_loc_cpu[: common.num_reqs + 1].tolist(),
            common.seq_lens[: common.num_reqs].tolist(),
            common.block_table_tensor[: common.num_reqs],
        )


class WindowLayer(AttentionLayerBase):
    """What vLLM takes for a layer with a sliding window: it gives it pages, and frees those behind the window."""

    def __init__(self, served: ServedLayer) -> None:
        self.served = served
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Return the backend of the window."""
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> SlidingWindowSpec:
        """Describe the pages: as many tokens as fit into the bytes of packed ones."""
        served = self.served
        return SlidingWindowSpec(
            block_size=window_tokens(served.plan, vllm_config.cache_config.block_size, served.dtype),
            num_kv_heads=served.kv_heads,
            head_size=served.d,
            dtype=served.dtype,
            sliding_window=served.plan.buffer,
        )


class SwanImpl(AttentionImpl[SwanMetadata]):
    """The attention of a layer.

    Raises:
        ValueError: the server or the layer needs something that is not supported, named in the message.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        self.config = get_current_vllm_config()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.served: ServedLayer | None = None
        self._viewed: tuple[Tensor, Tensor, PackedPages, DensePages] | None = None  # vLLM's memory, and views of it
        layer = {
            "ALiBi": alibi_slopes is not None,
            "layers with a sliding window": sliding_window is not None,
            f"a KV cache of dtype {kv_cache_dtype}": kv_cache_dtype != "auto",
            "capped scores (softcap)": bool(logits_soft_cap),
            f"attention of the kind {attn_type}": attn_type != AttentionType.DECODER,
            "layers that use keys and values of others": kv_sharing_target_layer_name is not None,
            **{f"attention with {name}": value is not None for name, value in others.items()},
        }
        if reason := refusal(layer, self.config):
            raise ValueError(reason)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take the bases and the layouts of this layer, and register its window; now vLLM has given it a name."""
        layers = self.config.compilation_config.static_forward_context
        name, layer = next((name, layer) for name, layer in layers.items() if getattr(layer, "impl", None) is self)
        settings = Settings.of(self.config.additional_config)
        calibration, plan = load(settings)
        calibration.check_config(self.config.model_config.hf_config)
        self.served = ServedLayer.of(
            calibration,
            plan,
            extract_layer_index(name),
            rank=get_tensor_model_parallel_rank(),
            ranks=get_tensor_model_parallel_world_size(),
            dtype=act_dtype,
            device=self.config.device_config.device,
        )
        self.window = name + WINDOW
        layer.attn_backend = backend_of(self.served)
        layers[self.window] = WindowLayer(self.served)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Store new tokens: packed in the pages of the layer, dense in those of its window."""
        assert self.served is not None
        packed, _, dense, dense_slots = self._pages(kv_cache)
        k = rotate(_heads_first(key[: len(slot_mapping)]), self.served.key_basis)
        v = rotate(_heads_first(value[: len(slot_mapping)]), self.served.value_basis)
        packed.write(slot_mapping, k, v)
        dense.write(dense_slots, k, v)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SwanMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend with the new tokens of all sequences; they are stored already."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("swan does not quantize the output of attention")
        if attn_metadata is None:  # vLLM measures memory
            return output.zero_()
        assert self.served is not None
        packed, window, dense, _ = self._pages(kv_cache)
        q = rotate(_heads_first(query), self.served.key_basis)
        out = batch_attention(q, attn_metadata.beside(window, self.served.plan), packed, dense, self.scale)
        output.copy_(rearrange(inverse_rotate(out, self.served.value_basis), "1 h t d -> t h d"))
        return output

    def _pages(self, kv_cache: Tensor) -> tuple[PackedPages, SwanMetadata, DensePages, Tensor]:
        """Return the packed pages, and metadata, pages and slots of the window."""
        assert self.served is not None
        metadata, _, window, slots = get_attention_context(self.window)
        if self._viewed is None or self._viewed[0] is not kv_cache or self._viewed[1] is not window:
            self.served.compile_ahead(kv_cache.shape[2])
            packed = self.served.layout(kv_cache.shape[2]).pool(kv_cache)
            self._viewed = (kv_cache, window, packed, DensePages.split(window, self.served.d))
        _, _, packed, dense = self._viewed
        return packed, metadata, dense, slots


def _heads_first(x: Tensor) -> Tensor:
    return rearrange(x, "t h d -> 1 h t d")
