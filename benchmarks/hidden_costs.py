"""What failpoints and hooks cost while nobody uses them: the same drain with their checks, and with these cut out.

Two copies of the package are made: one as it is, one without the statements ``if ...faults is not None:`` and ``if
...hooks.NAME is not None:``. Both drain the same queue, side by side, so that whatever else the machine does hits
both.
"""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent / "dray"
POOLS = ("solo", "prefork")
DRAIN = """
import resource, sys, threading, time
from dray import Dray

count, pool = int(sys.argv[1]), sys.argv[2]
app = Dray(transport="memory", backend="null", workers={"default": {"pool": pool}})

@app.task
def noop(): pass

def watch():
    while worker.parts.settler.settled < count: time.sleep(0.005)
    worker.stop()

app.send_many(noop.s() for _ in range(count))
worker = app.worker(on_ready=threading.Thread(target=watch).start)
began = time.process_time()
worker.run()
below = resource.getrusage(resource.RUSAGE_CHILDREN)
print((time.process_time() - began + below.ru_utime + below.ru_stime) / count * 1e6)
"""


class _Stripper(ast.NodeTransformer):
    """Cuts out what happens only when a failpoint is armed, or a hook listened to."""

    def __init__(self) -> None:
        self.cut = 0

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        if not _asks_for_a_listener(node.test):
            return node
        self.cut += 1
        return node.orelse or ast.copy_location(ast.Pass(), node)


def _asks_for_a_listener(test: ast.expr) -> bool:
    match test:
        case ast.Compare(
            left=ast.Attribute() | ast.Name() as subject, ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]
        ):
            *owners, name = ast.unparse(subject).replace("_faults", "faults").replace("_hooks", "hooks").split(".")
            return name == "faults" or "hooks" in owners[-1:]
    return False


def copy_package(target: Path, strip: bool) -> int:
    """Write the package below ``target``; returns how many statements were left out."""
    stripper = _Stripper()
    for source in PACKAGE.rglob("*.py"):
        tree = ast.parse(source.read_text())
        tree = stripper.visit(tree) if strip else tree
        file = target / source.relative_to(PACKAGE.parent)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    return stripper.cut


def _cpu_us(packages: Sequence[Path], count: int, pool: str) -> list[float]:
    """Microseconds of CPU per task, of the worker and its children, with each package: all at once, on equal terms."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", DRAIN, str(count), pool],
            env=env | {"PYTHONPATH": str(package)}, cwd=package, stdout=subprocess.PIPE, text=True,
        )
        for package in packages
    ]  # fmt: skip
    return [float(process.communicate(timeout=300)[0]) for process in running]


def hidden_costs(scale: float) -> dict[str, Any]:
    """memory transport: CPU per no-op task with unarmed failpoints and unheard hooks, against a copy without them."""
    count, rounds = max(2_000, int(100_000 * scale)), 6 if scale >= 1 else 2
    figures: dict[str, Any] = {"n": count}
    with tempfile.TemporaryDirectory(prefix="dray-bench-") as folder:
        whole, stripped = Path(folder, "whole"), Path(folder, "stripped")
        copy_package(whole, strip=False)
        figures["cut"] = copy_package(stripped, strip=True)
        for pool in POOLS:
            _cpu_us([whole, stripped], 100, pool)  # writes the byte code
            pairs = [_cpu_us([whole, stripped], count, pool) for _ in range(rounds)]
            pairs += [_cpu_us([stripped, whole], count, pool)[::-1] for _ in range(rounds)]
            figures[pool] = {
                "whole_us": _spread([one for one, _ in pairs]),
                "stripped_us": _spread([other for _, other in pairs]),
                "ratio": _spread([one / other for one, other in pairs]),
            }
    return {**figures, "reach": "a ratio of 1.0, within the spread"}


def _spread(values: list[float]) -> dict[str, float]:
    return {name: round(pick(values), 3) for name, pick in (("median", statistics.median), ("min", min), ("max", max))}
