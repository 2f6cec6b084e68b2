"""Fused kernels over `Packed`, compiled at the first use, and what they share: layouts as numbers."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swan.storage import ByHead, Graded, Layout, Packed, TopK
from swan.storage.by_head import in_runs, parts_of


class Recent(NamedTuple):
    """Dense recent tokens: keys and values ``[batch, kv_heads, tokens, d]``, and a mask of those that a query sees."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None

    def beside(self, other: "Recent") -> "Recent":
        """Return these tokens and others; both have masks.

        Raises:
            ValueError: one of them has none.
        """
        if self.mask is None or other.mask is None:
            raise ValueError("give both a mask")
        keys, values = (torch.cat(pair, dim=2) for pair in ((self.keys, other.keys), (self.values, other.values)))
        return Recent(keys, values, torch.cat([self.mask, other.mask], dim=3))


class Seen(NamedTuple):
    """The packed tokens that queries see, as numbers: kernels read no more than these.

    Where packed token ``i`` is column ``start + i`` of the sequence, query ``q`` of row ``b`` sees the columns from
    ``first[b]`` to before ``end[q]``.

    Attributes:
        first: ``[batch]``, int64; or None: all from the first packed one.
        end: ``[queries]``, or one for all, int64; or None: all to the last packed one.
        start: the column of the first packed token.

    Example:
        >>> Seen(None, torch.tensor([12, 13]), start=10).mask(4)[0, 0].int()
        tensor([[1, 1, 0, 0],
                [1, 1, 1, 0]], dtype=torch.int32)
    """

    first: Tensor | None
    end: Tensor | None
    start: int

    def mask(self, tokens: int) -> Tensor:
        """Return the same as booleans ``[batch or 1, 1, queries or 1, tokens]``.

        Raises:
            ValueError: neither `first` nor `end` is given: all is seen, and needs no mask.
        """
        bounds = [t for t in (self.first, self.end) if t is not None]
        if not bounds:
            raise ValueError("give first or end; where neither is there, queries see all, and there is no mask")
        columns = torch.arange(tokens, device=bounds[0].device) + self.start
        after = columns >= 0 if self.first is None else columns >= self.first.view(-1, 1, 1, 1)
        return after if self.end is None else after & (columns < self.end.view(1, 1, -1, 1))


def numbers_of(layout: Layout) -> list[int] | None:
    """Write a layout as every kernel takes it: 0, then size and bits of each group; or 1, d, keep and bits.

    For `ByHead` 2, then for each run its heads, how many numbers follow, and those of its layout.

    Return None for layouts that no kernel reads: those of other forms, and `TopK` with a list of positions.
    """
    match layout:
        case Graded() | ByHead():
            return layout.numbers
        case TopK() if layout.positions == "bitmap" or layout.keep == layout.d:
            return layout.numbers
    return None


def dim_of(numbers: Sequence[int]) -> int:
    """Return the dimension of vectors in a layout that is given as `numbers_of` does."""
    match numbers[0]:
        case 0:
            return sum(numbers[1::2])
        case 1:
            return numbers[1]
        case _:
            return dim_of(numbers[3 : 3 + numbers[2]])


def matrices_of(x: Tensor, layout: Layout) -> list[Tensor]:
    """Return the matrix that mixes vectors like `x` in a layout, or an empty tensor; for `ByHead` one for each run."""
    if isinstance(layout, ByHead):
        return [matrix for run in layout.runs for matrix in matrices_of(x, run.layout)]
    matrix = layout.mix(x.dtype, x.device)
    return [x.new_empty(0) if matrix is None else matrix]


def planes_of(packed: Packed) -> list[Tensor]:
    """Return codes, values in the dtype of the cache, scales, positions; empty tensors where there are none.

    For `ByHead` these four of each run.
    """
    if isinstance(packed.format, ByHead):
        return [plane for part in parts_of(packed) for plane in planes_of(part)]
    codes = whole = empty = packed.planes[0].new_empty(0)
    for plane in packed.planes:
        if plane.is_floating_point():
            whole = plane
        else:
            codes = plane
    scales, positions = packed.scales, packed.positions
    return [codes, whole, empty if scales is None else scales, empty if positions is None else positions]


def attend_in_runs(
    attend: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Packed,
    v: Packed,
    seen: Tensor | Seen | None,
    recent: Recent | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to each run of KV heads of a `ByHead` by itself: ``attend(q, k, v, seen, recent)`` of its heads.

    Returns:
        Outputs and log-sum-exps of all heads.
    """
    group_size, found = q.shape[1] // k.shape[1], list[tuple[Tensor, Tensor]]()
    for heads, keys, values in in_runs(k, v):
        rows = slice(heads.start * group_size, heads.stop * group_size)
        mask = seen[:, rows] if isinstance(seen, Tensor) and seen.shape[1] > 1 else seen
        beside = recent
        if recent is not None:
            near = recent.mask[:, rows] if recent.mask is not None and recent.mask.shape[1] > 1 else recent.mask
            beside = Recent(recent.keys[:, heads], recent.values[:, heads], near)
        found.append(attend(q[:, rows], keys, values, mask, beside))
    return torch.cat([out for out, _ in found], dim=1), torch.cat([lse for _, lse in found], dim=1)


def first_error(error: BaseException, pattern: str = r"\berror:") -> str:
    """Return the first error that a compiler printed, by a pattern, or else the first line of the message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if re.search(pattern, line)), lines[0] if lines else repr(error))
