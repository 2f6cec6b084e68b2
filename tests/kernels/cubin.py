"""What a kernel costs, known without a GPU: registers and spills from the compiler, instructions from nvdisasm.

python -m tests.kernels.cubin SOURCE [ARCH ...] [-D NAME=VALUE ...]    prints a table
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from swan.kernels.cuda import build


class Loop(NamedTuple):
    """Instructions between a label and the branch back to it, and how many of them are for tensor cores."""

    first: int
    instructions: int
    mma: int


class Cost(NamedTuple):
    """Registers of a thread; bytes of its stack and spills; bytes of static shared memory of a program."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


class Code(NamedTuple):
    """The instructions of a kernel, without the padding at its end, and its loops in the order of the code.

    Attributes:
        targets: for each branch, the place where it goes.
    """

    instructions: list[str]
    loops: list[Loop]
    targets: dict[int, int]

    def count(self, *names: str) -> int:
        """Count the instructions with these names, such as ``"STL"`` and ``"LDL"`` for local memory."""
        return sum(name_of(each) in names for each in self.instructions)

    @property
    def hot(self) -> Loop | None:
        """The loop with the most work for tensor cores; of several, the shortest (all the rest is around it)."""
        return max(self.loops, key=lambda loop: (loop.mma, -loop.instructions), default=None)

    @property
    def usual(self) -> int:
        """Count the instructions that an iteration of a loop issues, of that with the most work for tensor cores.

        Compilers put code that is rarely run in the middle of a loop or far from it. What an iteration issues is taken
        to be the shortest way around that has the most products and copies to shared memory.
        """
        turns = [self._way(first, last) for last, first in self.targets.items() if first <= last]
        return -max((x for x in turns if x), default=(0, 0))[1]

    def _way(self, first: int, last: int) -> tuple[int, int] | None:
        """Find the best way from an instruction to a branch: how much work is on it, and minus its instructions."""
        order: list[int] = []
        state: dict[int, bool] = {}  # of instructions that were seen: whether all behind them were
        ahead: dict[int, list[int]] = {}
        stack = [first]
        while stack:  # what is reached from the first one, those that are reached last in front
            i = stack[-1]
            if i not in state:
                state[i] = False
                ahead[i] = [n for n in self._next(i) if state.get(n) is not False] if i != last else []
                stack += [n for n in ahead[i] if n not in state]
            else:
                stack.pop()
                if not state[i]:
                    state[i] = True
                    order.append(i)
        best: dict[int, tuple[int, int]] = {}
        for i in order:  # those behind first
            behind = [best[n] for n in ahead[i] if n in best]
            if i == last or behind:
                work, short = max(behind, default=(0, 0))
                best[i] = work + _is_work(self.instructions[i]), short - 1
        return best.get(first)

    def _next(self, i: int) -> list[int]:
        """List where the code goes on behind an instruction."""
        text = self.instructions[i]
        ends = re.match(r"(EXIT|RET|BRA `)", text) is not None
        after = [] if ends or i + 1 == len(self.instructions) else [i + 1]
        return after + ([self.targets[i]] if i in self.targets else [])


def _is_work(instruction: str) -> bool:
    return name_of(instruction).endswith("MMA") or name_of(instruction) == "LDGSTS"


def costs(source: Path, defines: Mapping[str, object], arch: str) -> tuple[dict[str, Cost], bytes]:
    """Compile a source; return the cost of each kernel, and the cubin."""
    cubin, log = build.compile_now(source, defines, arch)
    parts = re.split(r"Compiling entry function '(\w+)'", log)[1:]
    return {name: cost_of(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}, cubin


def cost_of(text: str) -> Cost:
    """Read what ptxas printed of a kernel."""

    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0

    patterns = (
        r"Used (\d+) registers",
        r"(\d+) bytes stack frame",
        r"(\d+) bytes spill stores",
        r"(\d+) bytes spill loads",
        r"(\d+) bytes smem",
    )
    return Cost(*map(number, patterns))


def disassembler() -> str | None:
    """Find nvdisasm: on the path, or in Triton's package."""
    if found := shutil.which("nvdisasm"):
        return found
    triton = importlib.util.find_spec("triton")
    folders = (triton and triton.submodule_search_locations) or []
    files = [Path(folder) / "backends" / "nvidia" / "bin" / "nvdisasm" for folder in folders]
    return next((str(file) for file in files if file.exists()), None)


def codes(cubin: bytes) -> dict[str, Code]:
    """Disassemble a cubin: the code of each kernel."""
    tool = disassembler()
    assert tool is not None, "nvdisasm is neither on the path nor in Triton's package"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\.text\.(\w+):", printed, flags=re.MULTILINE)[1:]
    return {name: code_of(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def code_of(text: str) -> Code:
    """Read the disassembly of a kernel."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(found[1])
    while instructions and name_of(instructions[-1]) == "NOP":
        instructions.pop()
    loops = set()
    targets = {}
    for last, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*`\((\.L\w+)\)", instruction)
        first = labels[target[1]] if target else last
        if target:
            targets[last] = first
        if first < last:
            inside = instructions[first : last + 1]
            loops.add(Loop(first, len(inside), sum(name_of(each).endswith("MMA") for each in inside)))
    return Code(instructions, sorted(loops), targets)


def name_of(instruction: str) -> str:
    """Return the name of an instruction, without its predicate and its modifiers."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def main() -> None:
    """Print what the kernels of a source cost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("arch", nargs="*", default=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("-D", dest="defines", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    defines = dict(each.split("=", 1) for each in options.defines)
    print("kernel           arch    registers  stack  spilled  shared  instructions  hot loop  of it mma")
    for arch in options.arch:
        found, cubin = costs(options.source, defines, arch)
        for name, code in codes(cubin).items():
            cost, hot = found[name], code.hot or Loop(0, 0, 0)
            spilled = cost.spill_stores + cost.spill_loads
            print(
                f"{name:16} {arch:8}{cost.registers:9}{cost.stack:7}{spilled:9}{cost.shared:8}"
                f"{len(code.instructions):14}{hot.instructions:10}{hot.mma:11}"
            )


if __name__ == "__main__":
    main()
