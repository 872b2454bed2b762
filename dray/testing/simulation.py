"""Deterministic simulation of dray's own worker and client: ``python -m dray.testing.simulation --help``.

One seed is one history of a small world: producers, workers and a broker with a result store, in virtual time. The real
``Client`` and the real ``Worker`` run in it, loops and shutdown included, over the reference transport and result back
end; processes are killed, paused and restarted, requests are refused, cut off or lose their answers, slots die under
their tasks. After a while the faults end, and everything has to come to rest. Then every promise is checked.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence

from dray.testing.sim_kernel import one_cpu
from dray.testing.sim_world import Report, World

__all__ = ["Report", "main", "simulate"]
FAILING_SHOWN = 20


def simulate(seed: int, keep_trace: bool = False) -> Report:
    """The history of this seed. Patches the worker's modules while it runs: one at a time in a process."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # lost leases and dead letters by the thousand
    try:
        with one_cpu():
            return World(seed, keep_trace).run()
    finally:
        logging.disable(disabled)


def _brief(seed: int) -> tuple[int, list[str], Counter[str], int, int]:
    report = simulate(seed)
    return seed, report.violations, report.faults, report.tasks, report.runs


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _replay(seed: int) -> int:
    report = simulate(seed, keep_trace=True)
    for line in report.trace or ():
        _say(line)
    for violation in report.violations:
        _say(f"BROKEN {violation}")
    _say(
        f"seed {seed}: trace {report.digest}, {report.tasks} tasks, {report.runs} runs, {report.faults.total()} faults"
    )
    return 1 if report.violations else 0


def _many(seeds: range, jobs: int) -> int:
    began, done, faults, tasks, runs = time.monotonic(), 0, Counter[str](), 0, 0
    failing: list[int] = []
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for seed, violations, injected, tasks_of, runs_of in pool.imap_unordered(_brief, seeds, chunksize=10):
            done, tasks, runs = done + 1, tasks + tasks_of, runs + runs_of
            faults += injected
            if violations:
                failing.append(seed)
                if len(failing) <= FAILING_SHOWN:
                    _say(f"seed {seed}: {violations[0]}")
            if done % 1000 == 0:
                _say(f"{done} of {len(seeds)} seeds, {len(failing)} failing, {time.monotonic() - began:.0f} s")
    _say(
        f"{done} seeds in {time.monotonic() - began:.1f} s: {tasks} tasks, {runs} runs, {faults.total()} faults "
        f"({', '.join(f'{name} {count}' for name, count in sorted(faults.items()))}); {len(failing)} failing"
    )
    return 1 if failing else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit code 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m dray.testing.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=50_000, help="how many (default 50000)")
    parser.add_argument("--start", type=int, default=0, help="the first one (default 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per CPU)")
    parser.add_argument("--replay", type=int, metavar="SEED", help="show the trace of one seed instead")
    given = parser.parse_args(arguments)
    if given.replay is not None:
        return _replay(given.replay)
    return _many(range(given.start, given.start + given.seeds), given.jobs)


if __name__ == "__main__":
    sys.exit(main())
