"""`nn.Module` building blocks, thin mirrors of `swan.functional`."""

from swan.modules.attention import SwanAttention as SwanAttention
from swan.modules.buffer import DenseBuffer as DenseBuffer
from swan.modules.cache import KVCache as KVCache
from swan.modules.pruner import StructuredPruner as StructuredPruner
from swan.modules.rotation import OrthoRotation as OrthoRotation
