"""Taking tokens into layers whose KV heads have layouts of their own (`ByHead`): a launch for each run of heads."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from swan.kernels.cuda.layouts import coded, groups_of
from swan.storage.by_head import BY_HEAD

__all__ = ["pairs_of", "take_in_runs"]


def take_in_runs(take_in: Callable[..., None]) -> Callable[..., None]:
    """Return `swan.kernels.cuda.pack.take_in` for layouts by head too."""

    def take_in_by_run(
        k: Tensor,
        v: Tensor,
        k_recent: Tensor,
        v_recent: Tensor,
        k_history: list[Tensor],
        v_history: list[Tensor],
        k_layout: list[int],
        v_layout: list[int],
        mixes: list[Tensor],
        *others: Any,
    ) -> None:
        if BY_HEAD not in (k_layout[0], v_layout[0]):
            return take_in(k, v, k_recent, v_recent, k_history, v_history, k_layout, v_layout, mixes, *others)
        count, kv_heads = _runs_in(k_layout), k.shape[1]
        of_keys = _cut(k_layout, kv_heads, k_history, mixes[:count])
        of_values = _cut(v_layout, kv_heads, v_history, mixes[count:])
        for keys, values in _meeting(of_keys, of_values):
            dense = [x[:, keys.start : keys.stop] for x in (k, v, k_recent, v_recent)]
            take_in(*dense, keys.tensors, values.tensors, keys.layout, values.layout, [keys.mix, values.mix], *others)

    return take_in_by_run


def pairs_of(k_layout: list[int], v_layout: list[int]) -> list[tuple[list[int], list[int]]]:
    """Return the layouts of keys and of values, where they differ from head to head each pair that some head has."""
    if BY_HEAD not in (k_layout[0], v_layout[0]):
        return [(k_layout, v_layout)]
    sides = [_cut(layout, _heads_in(k_layout, v_layout)) for layout in (k_layout, v_layout)]
    return [(keys.layout, values.layout) for keys, values in _meeting(*sides)]


class _Part(NamedTuple):
    """Keys or values of neighbouring KV heads in one layout."""

    start: int
    stop: int
    layout: list[int]
    tensors: list[Tensor]
    mix: Tensor | None

    def of_heads(self, start: int, stop: int) -> "_Part":
        heads = slice(start - self.start, stop - self.start)
        return self._replace(start=start, stop=stop, tensors=[x[:, heads] for x in self.tensors])


def _numbers(layout: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Read the numbers of a layout by head: how many heads each run has, and its layout."""
    place = 1
    while place < len(layout):
        heads, count = layout[place : place + 2]
        yield heads, layout[place + 2 : place + 2 + count]
        place += 2 + count


def _cut(layout: list[int], heads: int, tensors: Sequence[Tensor] = (), mixes: Sequence[Tensor] = ()) -> list[_Part]:
    """Cut keys or values into runs, of which each has as many tensors as its layout stores."""
    if layout[0] != BY_HEAD:
        return [_Part(0, heads, layout, list(tensors), mixes[0] if mixes else None)]
    parts, start, left = list[_Part](), 0, iter(tensors)
    for number, (size, numbers) in enumerate(_numbers(layout)):
        groups = groups_of(numbers)
        count = 2 * bool(coded(groups)) + any(bits == 16 for _, bits in groups)
        of_run = list(itertools.islice(left, count))
        parts.append(_Part(start, start + size, numbers, of_run, mixes[number] if mixes else None))
        start += size
    return parts


def _meeting(keys: list[_Part], values: list[_Part]) -> Iterator[tuple[_Part, _Part]]:
    """Cut both where the layout of either changes."""
    edges = sorted({part.start for part in (*keys, *values)} | {keys[-1].stop})
    for start, stop in itertools.pairwise(edges):
        here = [next(part for part in side if part.start <= start < part.stop) for side in (keys, values)]
        yield here[0].of_heads(start, stop), here[1].of_heads(start, stop)


def _heads_in(k_layout: list[int], v_layout: list[int]) -> int:
    """Count the KV heads, given at least one layout by head."""
    return sum(heads for heads, _ in _numbers(k_layout if k_layout[0] == BY_HEAD else v_layout))


def _runs_in(layout: list[int]) -> int:
    return sum(1 for _ in _numbers(layout)) if layout[0] == BY_HEAD else 1
