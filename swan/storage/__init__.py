"""The storage of a winnowed cache: layouts, `Packed` and `unpack`; `swan.pack` fills it.

A *layout* says how one vector of ``d`` coordinates is stored. There are three forms:

- `TopK`: every vector keeps its own ``keep`` largest coordinates (the paper, arXiv:2511.18936);
- `Graded`: every vector keeps the same coordinates, group by group of the sorted basis;
- `ByHead`: the KV heads of a layer have `Graded` layouts of their own.

A class of your own with the members of `Layout` is a layout too.
"""

from swan.storage.by_head import ByHead as ByHead
from swan.storage.graded import Graded as Graded
from swan.storage.layout import LayerPlan as LayerPlan
from swan.storage.layout import Layout as Layout
from swan.storage.packed import Packed as Packed
from swan.storage.packed import unpack as unpack
from swan.storage.topk import TopK as TopK
