"""What the CUDA kernels cost for each advised pair of layouts, known without a GPU, as a table that tests hold.

python -m tests.kernels.cuda_costs [attend] [pages] [pack]    prints how costs of today differ from cuda_costs.json
python -m tests.kernels.cuda_costs --write            renews it
"""

import argparse
import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

import swan.kernels.cuda
from swan import Graded, Plan
from swan.kernels.cuda.build import nvrtc_version
from tests.kernels import attend_cuda, cubin

FILE = Path(__file__).parent / "cuda_costs.json"
FOLDER = Path(swan.kernels.cuda.__file__).parent
SOURCES = {"attend": FOLDER / "attend.cu", "pages": FOLDER / "attend.cu", "pack": FOLDER / "pack.cu"}
DEFINES = {"pages": {"PAGE": 64}}
ARCHS = ["sm_80", "sm_90", "sm_100"]
DIMS = [64, 80, 96, 128, 256]
RETENTIONS = [0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5]


class Row(NamedTuple):
    """The cost of a kernel: for `attend` the instructions are those for 32 tokens of a warp, for others all."""

    registers: int
    stack: int
    spilled: int
    instructions: int


def advised() -> dict[str, tuple[Graded, Graded]]:
    """The layouts of keys and values that `Plan.for_retention` gives, by their names."""
    plans = []
    for d in DIMS:
        for retention in RETENTIONS:
            try:
                plans.append(Plan.for_retention(retention, dims=[(d, d)]).layers[0])
            except ValueError:  # no plan fits
                assert retention < 0.2
    return {name_of(plan.keys, plan.values): (plan.keys, plan.values) for plan in plans if plan}


def name_of(*layouts: Graded) -> str:
    return "-".join("+".join(f"{size}x{bits}" for size, bits in layout.groups) for layout in layouts)


def costs(source: str, keys: Graded, values: Graded, arch: str) -> dict[str, Row]:
    """Compile a source; the cost of each kernel in it."""
    defines = attend_cuda.macros(keys, values, torch.bfloat16, **DEFINES.get(source, {}))
    found, binary = cubin.costs(SOURCES[source], defines, arch)
    codes = cubin.codes(binary)
    return {
        name: Row(
            cost.registers,
            cost.stack,
            cost.spill_stores + cost.spill_loads,
            codes[name].usual if name == "attend" else len(codes[name].instructions),
        )
        for name, cost in sorted(found.items())
    }


@functools.cache
def table() -> dict[tuple[str, str, str], dict[str, Row]]:
    """The table in the file: rows of each kernel by source, architecture and names of layouts."""
    rows = json.loads(FILE.read_text())["rows"]
    return {tuple(key.split()): {name: Row(*row) for name, row in rows[key].items()} for key in rows}


def main() -> None:
    """Compile everything, and print or write what it costs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "sources", nargs="*", choices=[*SOURCES, []], metavar="source", help="attend, pages, pack; or all"
    )
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    options.sources = options.sources or [*SOURCES]
    before = table() if FILE.exists() else {}
    rows = {key: row for key, row in before.items() if key[0] not in options.sources}
    for source in options.sources:
        for arch in ARCHS:
            for layouts, pair in advised().items():
                key = source, arch, layouts
                rows[key] = costs(source, *pair, arch)
                for name, row in rows[key].items():
                    old = before.get(key, {}).get(name)
                    if row != old:
                        print(*key, name, *(f"{field}={value}" for field, value in row._asdict().items()), "was", old)
    if options.write:
        lines = [f'  "{" ".join(key)}": {json.dumps(row)}' for key, row in sorted(rows.items())]
        head = f'{{"nvrtc": "{nvrtc_version()}", "columns": {json.dumps(Row._fields)}, "rows": {{\n'
        FILE.write_text(head + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
