"""Rivals as caches: what others store, scored by the same evaluation, with their bytes counted alike.

Those that code each token on its own are layouts (codes.py, trellis.py), so they share buffer, sinks and attention with
swan. Keys that share scales between tokens take a history of its own (tiles.py), and dropping tokens a cache of its own
(eviction.py). The caches of transformers run as they are (quantized.py).
"""

from swan.evaluation.baselines.codes import BlockBits as BlockBits
from swan.evaluation.baselines.codes import Float4 as Float4
from swan.evaluation.baselines.codes import Float8 as Float8
from swan.evaluation.baselines.codes import LloydMax as LloydMax
from swan.evaluation.baselines.collection import rivals as rivals
from swan.evaluation.baselines.eviction import Eviction as Eviction
from swan.evaluation.baselines.eviction import fit_linear_scores as fit_linear_scores
from swan.evaluation.baselines.quantized import TransformersQuantized as TransformersQuantized
from swan.evaluation.baselines.tiles import Kivi as Kivi
from swan.evaluation.baselines.tiles import KVarN as KVarN
from swan.evaluation.baselines.trellis import Trellis as Trellis
