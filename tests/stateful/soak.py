"""Run the stateful tests for long: `make soak`, or `python -m tests.stateful.soak --seconds 600 --seed 7`.

Each round has its own seed, counted up from the one that is printed: a round runs again with `--seed ROUND --rounds 1`.
"""

import argparse
import random
import time
import traceback
import warnings
from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.stateful.machine import CacheMachine
from tests.stateful.swan_machine import SwanMachine

__all__ = ["main", "run_round"]

MACHINES = [CacheMachine, SwanMachine]
EXAMPLES, STEPS = 8, 50  # of a round
SHOWN = 30  # lines of a disagreement


def run_round(machine: type, number: int) -> Exception | None:
    """Run one round; return what a disagreement raised."""
    chosen = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    try:
        run_state_machine_as_test(seed(number)(type(machine.__name__, (machine,), {})), settings=chosen)
    except Exception as error:
        return error
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run rounds until the time or the steps are over; return how many of them disagreed."""
    parser = argparse.ArgumentParser(prog="python -m tests.stateful.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start, number, disagreements = time.perf_counter(), given.seed, []

    def steps() -> int:
        return sum(machine.counted[0] for machine in MACHINES)

    def report() -> None:
        seconds = time.perf_counter() - start
        print(
            f"seed {given.seed}, {number - given.seed} rounds, {steps()} steps, {steps() / seconds:.0f} a second, "
            f"{len(disagreements)} disagreements",
            flush=True,
        )

    print(f"seed {given.seed}", flush=True)
    shown = start
    while time.perf_counter() - start < given.seconds and steps() < given.steps:
        for machine in MACHINES:
            if (error := run_round(machine, number)) is not None:
                disagreements.append(number)
                place = traceback.extract_tb(error.__traceback__)[-1]
                notes = "\n".join(getattr(error, "__notes__", [])).splitlines()
                print(f"round {number}, step {steps()}, {machine.__name__}: {type(error).__name__}: {error}")
                print(f"{place.filename}:{place.lineno}: {place.line}", *notes[-SHOWN:], sep="\n  ", flush=True)
        number += 1
        if number - given.seed == given.rounds:
            break
        if time.perf_counter() - shown > 60:
            shown = time.perf_counter()
            report()
    report()
    return min(len(disagreements), 1)


if __name__ == "__main__":
    raise SystemExit(main())
