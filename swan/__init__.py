"""swan: attention on winnowed key-value caches (SWAN, arXiv:2511.18936)."""

import importlib
from typing import TYPE_CHECKING, Any

import swan.waiting  # isort: skip  # noqa: F401  # before torch is loaded
from swan.functional import dense_attention as dense_attention
from swan.functional import fold_value_rotation as fold_value_rotation
from swan.functional import graded_prune as graded_prune
from swan.functional import inverse_rotate as inverse_rotate
from swan.functional import merge_attention as merge_attention
from swan.functional import pack as pack
from swan.functional import packed_attention as packed_attention
from swan.functional import random_rotation as random_rotation
from swan.functional import rotate as rotate
from swan.functional import swan_attention as swan_attention
from swan.functional import topk_prune as topk_prune
from swan.modules import DenseBuffer as DenseBuffer
from swan.modules import KVCache as KVCache
from swan.modules import OrthoRotation as OrthoRotation
from swan.modules import StructuredPruner as StructuredPruner
from swan.modules import SwanAttention as SwanAttention
from swan.storage import ByHead as ByHead
from swan.storage import Graded as Graded
from swan.storage import LayerPlan as LayerPlan
from swan.storage import Layout as Layout
from swan.storage import Packed as Packed
from swan.storage import TopK as TopK
from swan.storage import unpack as unpack

if TYPE_CHECKING:
    from swan.calibration import Calibration as Calibration
    from swan.calibration import Plan as Plan
    from swan.calibration import calibrate as calibrate
    from swan.integrations import attach as attach
    from swan.integrations import detach as detach
    from swan.integrations import supported as supported
    from swan.integrations.transformers import SwanCache as SwanCache
    from swan.integrations.transformers.pretrained import from_pretrained as from_pretrained
    from swan.integrations.transformers.pretrained import save_pretrained as save_pretrained

__version__ = "0.1.0"

_LAZY = {
    "Calibration": "swan.calibration",
    "Plan": "swan.calibration",
    "calibrate": "swan.calibration",
    "attach": "swan.integrations",
    "detach": "swan.integrations",
    "supported": "swan.integrations",
    "from_pretrained": "swan.integrations.transformers.pretrained",
    "save_pretrained": "swan.integrations.transformers.pretrained",
    "SwanCache": "swan.integrations.transformers",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'swan' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    shown = [name for name, value in globals().items() if getattr(value, "__module__", "").startswith("swan.")]
    return sorted({*shown, *_LAZY, "__version__"})
