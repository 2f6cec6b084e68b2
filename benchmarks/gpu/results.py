"""The files of results, written at every row, and what is printed of them."""

import json
import re
import threading
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SAME_WORK = ("what", "length", "batch", "head_dim")


class Results:
    """Rows of two kinds, each in a file: ``gpu-correctness-CARD.json`` and ``gpu-speed-CARD.json``.

    Args:
        folder: of the files.
        command: that makes them.
        settings: of the run.
    """

    def __init__(self, folder: Path, command: str, settings: dict[str, Any]) -> None:
        self.folder, self.command, self.settings = folder, command, settings
        self.about: dict[str, Any] = {}
        self.rows: dict[str, list[Row]] = {"correctness": [], "speed": []}
        self.lock = threading.Lock()

    def describe(self, about: dict[str, Any]) -> None:
        """Take in what the machine is."""
        self.about = about
        gpu, machine = about["gpu"] or about["machine"]["cpu"], about["machine"]
        print(f"{gpu}, driver {machine['driver']}, torch {about['versions']['torch']}")
        bandwidth, cache = about["bandwidth"] / 1e9, machine["last_level_cache"] / 1e6
        print(f"memory gives {bandwidth:.0f} GB/s, last-level cache {cache:.0f} MB", flush=True)

    def add(self, file: str, row: Row) -> None:
        """Keep a row, print it, and write its file."""
        with self.lock:
            self.rows[file].append(row)
            if file == "speed":
                add_speedups(self.rows[file])
            print(shown(row), flush=True)
            self.write(file)

    def write(self, file: str) -> None:
        """Write a file, whole or not at all."""
        path = self.folder / f"gpu-{file}-{card(self.about.get('gpu'))}.json"
        head = {"command": self.command, "date": date.today().isoformat()}
        head |= {name: self.about.get(name) for name in ("versions", "machine")}
        settings = self.settings | {"bandwidth": self.about.get("bandwidth")}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(head | {"settings": settings, "rows": self.rows[file]}, indent=2) + "\n")
        part.replace(path)

    def conclude(self, seconds: float) -> int:
        """Print what failed and what was skipped; return the exit status."""
        correctness = self.rows["correctness"]
        counts = {
            result: sum(row["result"] == result for row in correctness) for result in ("passed", "failed", "skipped")
        }
        print(f"--- {seconds:.0f} s; results {', '.join(f'{n} {result}' for result, n in counts.items())}")
        for row in (*correctness, *self.rows["speed"]):
            if row.get("result", "passed") != "passed":
                print(shown(row))
        return 1 if counts["failed"] else 0


def add_speedups(rows: Sequence[Row]) -> None:
    """Set ``speedup`` over the fastest dense row of the same work; a row of a fixed memory has its own."""
    timed = [row for row in rows if row.get("median_ms") and row["what"] != "capacity"]
    for row in timed:
        same = [other for other in timed if all(other[name] == row[name] for name in SAME_WORK)]
        dense = [other["median_ms"] for other in same if other["form"] == "dense"]
        row["speedup"] = min(dense) / row["median_ms"] if dense else None


def card(gpu: str | None) -> str:
    """Write the name of a card as part of a file name, cpu where there is none."""
    return re.sub(r"[^a-z0-9]+", "-", (gpu or "cpu").lower()).strip("-")


def shown(row: Row) -> str:
    """Write a row as a line."""
    if "what" in row:
        return _shown_time(row)
    name = row["job"] if row["case"] in row["job"] else f"{row['job']}: {row['case']}"
    if row["error"] is None:
        return f"{name:66} {row['result']}: {row['reason']}"
    text = f"{name:66} {row['error']:9.2e} of {row['bound']:8.2e} {'' if row['result'] == 'passed' else 'OUT OF BOUND'}"
    return f"{text} {row.get('reason') or ''}".rstrip()


def _shown_time(row: Row) -> str:
    name = "{what} {length} x {batch}, d {head_dim}, {form} {retention}, {impl}".format(**row)
    if row["median_ms"] is None:
        return f"{name:66} no time: {row['error']}"
    numbers = [f"{row['median_ms']:9.4f} ms"]
    numbers += [f"{row['speedup']:.2f}x"] if row.get("speedup") else []
    numbers += [f"{row['bandwidth_fraction']:.0%} of bandwidth"] if row.get("bandwidth_fraction") else []
    numbers += [f"error {row['error']:.1e}"] if isinstance(row["error"], float) else []
    units = {
        "share": "of the attention",
        "launches": "launches",
        "host_us": "us of Python",
        "tokens_per_second": "tokens/s",
    }
    numbers += [f"{row[column]:.4g} {unit}" for column, unit in units.items() if row.get(column)]
    numbers += [f"{row['bytes'] / 2**20:.1f} MiB"] if row["what"] == "model" else []
    return f"{name:66} {'  '.join(numbers)}"
