"""The newest vLLM: its hooks are those that swan was run with, and its Python code runs with them.

`make test-vllm` fetches it, into the folder that the variable SWAN_VLLM_NEWEST names.
"""

import ast
import importlib.util
import os
from pathlib import Path

import pytest

from tests.vllm.engine import run
from tests.vllm.served import prompts

NEWEST = Path(os.environ.get("SWAN_VLLM_NEWEST", "nowhere"))
pytestmark = pytest.mark.skipif(not NEWEST.is_dir(), reason="make test-vllm fetches the newest vllm")

# What swan overrides, calls or reads: by file, functions (with their arguments) and attributes (with their annotation).
HOOKS = {
    "v1/attention/backend.py": """
        AttentionBackend.get_name AttentionBackend.get_impl_cls AttentionBackend.get_builder_cls
        AttentionBackend.get_supported_kernel_block_sizes AttentionBackend.customize_spec
        AttentionBackend.supported_kv_cache_layouts AttentionBackend.supports_kv_connector
        AttentionBackend.forward_includes_kv_cache_update AttentionBackend.supported_dtypes
        AttentionBackend.supported_kv_cache_dtypes AttentionMetadataBuilder.__init__ AttentionMetadataBuilder.build
        AttentionImpl.__init__ AttentionImpl.forward AttentionImplBase.process_weights_after_loading
        AttentionType.DECODER MultipleOf.base CommonAttentionMetadata.query_start_loc_cpu
        CommonAttentionMetadata.seq_lens CommonAttentionMetadata.num_reqs CommonAttentionMetadata.block_table_tensor
    """,
    "v1/attention/backends/registry.py": "register_backend AttentionBackendEnum.CUSTOM AttentionBackendEnum.CPU_ATTN",
    "v1/kv_cache_interface.py": """
        AttentionSpec.dtype AttentionSpec.state_content_bytes AttentionSpec.num_kv_heads AttentionSpec.head_size
        SlidingWindowSpec.sliding_window compute_layer_kv_cache_shape_bytes create_kv_cache_views
    """,
    "v1/kv_cache_layout.py": "KVCacheLayout.BLHNC",
    "v1/worker/utils.py": "customize_attention_spec",
    "model_executor/layers/attention/attention.py": """
        get_attention_context unified_kv_cache_update Attention.get_attn_backend Attention.get_kv_cache_spec
    """,
    "model_executor/layers/attention_layer_base.py": """
        AttentionLayerBase.get_attn_backend AttentionLayerBase.get_kv_cache_spec AttentionLayerBase.bind_kv_cache
    """,
    "model_executor/models/utils.py": "extract_layer_index",
    "config/vllm.py": """
        get_current_vllm_config VllmConfig.additional_config VllmConfig.compilation_config VllmConfig.speculative_config
        VllmConfig.kv_transfer_config VllmConfig.scheduler_config VllmConfig.parallel_config VllmConfig.model_config
    """,
    "config/compilation.py": "CompilationConfig.static_forward_context",
    "config/parallel.py": "ParallelConfig.decode_context_parallel_size ParallelConfig.prefill_context_parallel_size",
    "config/scheduler.py": "SchedulerConfig.disable_hybrid_kv_cache_manager",
}
NAMES = [(file, name) for file, names in HOOKS.items() for name in names.split()]


def found_in(folder: Path, file: str, name: str) -> str:
    """What a source says of a name: the arguments of a function, the annotation or the value of an attribute."""
    node: ast.AST = ast.parse((folder / file).read_text())
    for part in name.split("."):
        inner = [child for child in node.body if part in names_of(child)]
        assert inner, f"{file} has no {name}"
        node = inner[0]
    match node:
        case ast.FunctionDef():
            return ast.unparse(node.args)
        case ast.AnnAssign():
            return ast.unparse(node.annotation)
        case ast.Assign():
            return ast.unparse(node.value)
    raise AssertionError(f"{name} in {file} is neither function nor attribute")


def names_of(node: ast.AST) -> list[str]:
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return [getattr(node, "name", ""), *(target.id for target in targets if isinstance(target, ast.Name))]


@pytest.mark.parametrize(("file", "name"), NAMES)
def test_a_hook_is_what_it_was(file, name):
    installed = importlib.util.find_spec("vllm")
    assert found_in(NEWEST / "vllm", file, name) == found_in(Path(installed.origin).parent, file, name)


def test_the_newest_runs(served):
    """It generates what the installed version does: without loss what both do by their own attention, and packed."""
    job = {"prompts": prompts(5, 64, 150, 200), "tokens": 20}
    whole = run(served.folder, [job], served.settings(1.0), sources=NEWEST)
    assert NEWEST.joinpath(f"vllm-{whole['version']}+cpu.dist-info").is_dir()
    assert whole["jobs"][0]["tokens"] == run(served.folder, [job], sources=NEWEST)["jobs"][0]["tokens"]
    packed = [run(served.folder, [job], served.settings(0.4), sources=each) for each in (NEWEST, None)]
    assert packed[0]["version"] != packed[1]["version"]
    assert packed[0]["jobs"][0]["tokens"] == packed[1]["jobs"][0]["tokens"]
