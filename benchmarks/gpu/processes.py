"""The processes of a part: starts them, reads their lines, ends those that hang, replaces those that ended early."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .results import Results

ROOT = Path(__file__).parents[2]
GRACE = 8.0  # seconds beyond its deadline after which a process is ended
LEAST = 15.0  # seconds in which it is worth to start another one
MARK = "@"  # as in rows.py, which imports torch
WORKER = [sys.executable, "-m", f"{__package__}.worker"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@dataclass(frozen=True)
class Part:
    """Some jobs.

    Attributes:
        name: of the part, and of the module with its jobs.
        file: that its rows go to.
        processes: at once, on a GPU; else one.
        until: seconds from the start of everything until which it may run.
        silence: seconds in which a process must say something, or it hangs.
    """

    name: str
    file: str
    processes: int
    until: float
    silence: float


@dataclass
class Worker:
    """A process, and what it does."""

    process: "subprocess.Popen[str]"
    heard: float = field(default_factory=time.time)
    job: tuple[int, str] = (-1, "starting")
    waiting: dict[int, str] = field(default_factory=dict)  # jobs that are prepared and not begun
    ended: str | None = None  # why it was ended


def run_part(part: Part, options: list[str], results: Results, start: float) -> None:
    """Run all jobs of a part, until they are done or its time is over."""
    deadline = start + part.until
    count = part.processes if "cuda" in options else 1
    workers: dict[int, Worker] = {}
    threads = [
        threading.Thread(target=_serve, args=(first, count, part, options, results, deadline, workers), daemon=True)
        for first in range(count)
    ]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
            for worker in list(workers.values()):
                _end_if_late(worker, part, deadline)
    finally:
        for worker in workers.values():
            worker.process.kill()


def _end_if_late(worker: Worker, part: Part, deadline: float) -> None:
    if worker.ended is None and time.time() > deadline + GRACE:
        worker.ended = "the time is over"
    elif worker.ended is None and time.time() > worker.heard + part.silence:
        worker.ended = f"it said nothing for {part.silence:.0f} s"
    if worker.ended is not None:
        worker.process.kill()


def _serve(
    first: int,
    count: int,
    part: Part,
    options: list[str],
    results: Results,
    deadline: float,
    workers: dict[int, Worker],
) -> None:
    """Run every `count`-th job of a part, in one process after the other if one ends early."""
    begin = 0
    while begin == 0 or time.time() < deadline - LEAST:
        numbers = {"first": first, "step": count, "begin": begin, "deadline": deadline}
        command = [*WORKER, part.name, *options]
        command += [text for name, number in numbers.items() for text in (f"--{name}", str(number))]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=_environment()
        ) as process:
            worker = workers[first] = Worker(process)
            _read(worker, part, results)
        if process.returncode == 0:
            return
        _note_end(worker, part, results)
        begin = worker.job[0] + 1
        if begin == 0:  # it did not come to its first job, and another would not either
            return


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _read(worker: Worker, part: Part, results: Results) -> None:
    """Take in what a process says until its output ends."""
    assert worker.process.stdout is not None
    for line in worker.process.stdout:
        worker.heard = time.time()
        if not line.startswith(MARK):
            print(line, end="", flush=True)
            continue
        ((kind, content),) = json.loads(line.removeprefix(MARK)).items()
        match kind:
            case "about":
                results.describe(content)
            case "prepare":
                worker.job = (content[0], content[1])
                worker.waiting[content[0]] = content[1]
            case "job":
                worker.job = (content[0], content[1])
                worker.waiting.pop(content[0], None)
            case _:
                results.add(part.file, content)


def _note_end(worker: Worker, part: Part, results: Results) -> None:
    """Make rows of what a process was doing when it ended, and of what it had prepared."""
    index, name = worker.job
    reason = worker.ended or f"the process ended with status {worker.process.returncode}"
    late = worker.ended == "the time is over"
    results.add(part.file, _row(name, "skipped" if late else "failed", reason))
    for other, waiting in worker.waiting.items():
        if other != index:
            results.add(part.file, _row(waiting, "skipped", f"its process ended in another job: {reason}"))


def _row(name: str, result: str, reason: str) -> dict[str, Any]:
    return {"job": name, "case": name, "error": None, "bound": None, "result": result, "reason": reason}
