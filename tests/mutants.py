"""Mistakes made on purpose, one at a time: some test has to notice each. `make mutants` runs it.

The mistakes are in tests/mutant_list.py. Each is made in a copy of the tree, whose tests then run; those of a mistake
that goes unnoticed pass, and it is a survivor: a test is missing, or the list says why there is nothing to notice.
"""

import argparse
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
AT_A_TIME = 2  # processes of one thread each
SECONDS = 300  # after which a mutant counts as noticed: its tests hang
PYTEST = ["-m", "pytest", "-x", "-q", "-n0", "--tb=no", "--durations=0", "-m", "not slow"]
ALONE = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # bytecode is told apart by size and second only


def mutated(source: str, mutant: Mutant) -> str:
    """The text of a file with the mistake in it; a ValueError unless what it replaces is there exactly once."""
    if (count := source.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} has {mutant.old!r} {count} times, once was expected")
    return source.replace(mutant.old, mutant.new)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mutants; 0 if every survivor is explained, 1 if not, 2 if they could not be run."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="one mutant (again for another)")
    parser.add_argument("--json", action="store_true", help="print one object; lines go to stderr")
    given = parser.parse_args(arguments)
    mutants = [m for m in MUTANTS if given.only is None or m.name in given.only]
    if unknown := set(given.only or ()) - {m.name for m in mutants}:
        parser.error(f"no mutant is named {', '.join(sorted(unknown))}")
    lines = sys.stderr if given.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=lines, flush=True)

    for mutant in mutants:
        mutated((ROOT / mutant.file).read_text(), mutant)
    with tempfile.TemporaryDirectory() as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for number in range(AT_A_TIME):
            trees.put(_copy(Path(folder) / str(number)))
        files = sorted({test for mutant in mutants for test in mutant.tests})
        say(f"the tests of {len(mutants)} mutants as they are: {', '.join(files)}")
        if broken := [row for row in _each(_as_it_is, files, trees, say) if row["outcome"] != "passes"]:
            say(f"{len(broken)} of these files fail without a mutant; make test says more")
            return 2
        rows = _each(_try, mutants, trees, say)
    return _report(rows, say, as_json=given.json)


def _copy(tree: Path) -> Path:
    for name in ("swan", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def _each(work: Any, items: Sequence[Any], trees: queue.Queue[Path], say: Any) -> list[dict[str, Any]]:
    """Rows of all items, each worked on in a tree that nobody else has meanwhile."""

    def one(item: Any) -> dict[str, Any]:
        tree, start = trees.get(), time.perf_counter()
        try:
            row = work(item, tree)
        finally:
            trees.put(tree)
        row["seconds"] = round(time.perf_counter() - start, 1)
        say(f"  {row['outcome']:8} {row['name']} {row['by'] and 'by ' + row['by']} ({row['seconds']:.0f} s)")
        return row

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(one, items))


def _as_it_is(file: str, tree: Path) -> dict[str, Any]:
    outcome, by = _pytest(tree, [file])
    return {"name": file, "outcome": "passes" if outcome == "survived" else "fails", "by": by}


def _try(mutant: Mutant, tree: Path) -> dict[str, Any]:
    file = tree / mutant.file
    source = file.read_text()
    file.write_text(mutated(source, mutant))
    try:
        outcome, by = _pytest(tree, mutant.tests)
    finally:
        file.write_text(source)
    return {"name": mutant.name, "file": mutant.file, "outcome": outcome, "by": by, "equivalent": mutant.equivalent}


def _pytest(tree: Path, tests: Sequence[str]) -> tuple[str, str]:
    """``"killed"`` and the test that failed, ``"survived"``, or ``"error"`` where tests did not get to run."""
    command = [sys.executable, *PYTEST, *(f"tests/{test}" for test in tests)]
    environment = os.environ | ALONE | {"PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "killed", f"tests that took more than {SECONDS} s"
    failed = re.search(r"^FAILED (?:tests/)?(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return "killed", failed[1]
    last = (done.stdout + done.stderr).strip().splitlines()[-1:]
    return ("survived", "") if done.returncode == 0 else ("error", f"pytest: {last}")


def _report(rows: list[dict[str, Any]], say: Any, as_json: bool) -> int:
    survivors = [row for row in rows if row["outcome"] == "survived"]
    killed, errors = (sum(row["outcome"] == outcome for row in rows) for outcome in ("killed", "error"))
    if as_json:
        print(json.dumps({"command": "mutants", "killed": killed, "of": len(rows), "rows": rows}, indent=1))
    say(f"killed {killed} of {len(rows)}" + (f", {errors} could not be run" if errors else ""))
    for row in survivors:
        say(f"survivor: {row['name']} in {row['file']}: {row['equivalent'] or 'NO TEST NOTICES IT'}")
    return 2 if errors else int(any(not row["equivalent"] for row in survivors))


if __name__ == "__main__":
    sys.exit(main())
