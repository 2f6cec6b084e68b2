"""Attention over a packed history on a CPU, in C++: one operator for eager and compiled code."""

from torch import Tensor

from swan.kernels import Recent, matrix_of, numbers_of, planes_of
from swan.kernels.cpu import operator
from swan.storage import Layout, Packed

__all__ = ["MOST_ROWS", "attend", "reads"]

MOST_ROWS = 16  # query rows of a KV head up to which the kernel is faster than tiles of tensor code


def attend(
    q: Tensor, k: Packed, v: Packed, mask: Tensor | None, scale: float, recent: Recent | None = None
) -> tuple[Tensor, Tensor]:
    r"""Attend with few queries to a packed history, in the coordinates in which keys and values are stored.

    This is `packed_attention` without the mixes. With `recent` it is all of `swan_attention`: queries and outputs
    are mixed here, and one softmax goes over history and recent tokens.

    Threads take KV heads and stretches of tokens. Where keys and values are both coded (`Graded`, no group of 16 bits)
    and the CPU has AVX2, or AVX-512 with VBMI and VNNI (up to 4 groups), each token is read once for four query rows:
    scores are products of codes with queries rounded to two bytes of their largest coordinate, outputs sums of codes
    with weights $p_j s_j$ rounded to 15 bits of their largest in 64 tokens (with AVX-512 in float32 four bytes, and not
    rounded). Else each token is unpacked to floats, once for all rows.

    Args:
        q: ``[batch, heads, queries, d]``, float32, bfloat16 or float16, on a CPU.
        k: packed keys, in a layout for which `reads` is True.
        v: packed values, likewise.
        mask: boolean ``[batch or 1, heads or 1, queries, tokens]``, True where a query sees a token. Stretches that
            no query sees are not read.
        scale: factor of the scores.
        recent: recent tokens beside the history.

    Returns:
        Output ``[batch, heads, queries, dv]`` and natural log-sum-exp ``[batch, heads, queries]``, both float32.

    Example:
        ```python
        out, lse = attend(q, pack(k, Graded(((64, 4),))), pack(v, Graded(((64, 4),))), None, 64**-0.5)
        ```

    Source: the split over the history is Dao et al., Flash-Decoding; the method arXiv:2511.18936.
    """
    keys, values = numbers_of(k.format), numbers_of(v.format)
    arguments = q, planes_of(k), keys, planes_of(v), values, k.planes[0].shape[2], mask, scale
    if recent is None:
        return operator("attend")(*arguments, [], [], None)
    mixes = [matrix_of(q, packed.format) for packed in (k, v)]
    return operator("attend")(*arguments, mixes, [recent.keys, recent.values], recent.mask)


def reads(layout: Layout) -> bool:
    """Tell if the kernel reads a layout."""
    return numbers_of(layout) is not None
