"""Pure functions on tensors and `Packed`; state goes in and comes out."""

from swan.functional.attention import dense_attention as dense_attention
from swan.functional.attention import merge_attention as merge_attention
from swan.functional.attention import packed_attention as packed_attention
from swan.functional.attention import swan_attention as swan_attention
from swan.functional.packing import pack as pack
from swan.functional.pruning import graded_prune as graded_prune
from swan.functional.pruning import topk_prune as topk_prune
from swan.functional.rotation import fold_value_rotation as fold_value_rotation
from swan.functional.rotation import inverse_rotate as inverse_rotate
from swan.functional.rotation import random_rotation as random_rotation
from swan.functional.rotation import rotate as rotate
from swan.kernels import Seen as Seen
