"""What is measured, one function a row of ``docs/performance.md``. Each returns a mapping of figures."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import Bench, pss_bytes

Figures = dict[str, Any]
MEASURES: dict[str, Callable[[float], Figures]] = {}


def measure(function: Callable[[float], Figures]) -> Callable[[float], Figures]:
    """Registers a measure; ``scale`` 1 is the full size, less makes it quicker and rougher."""
    MEASURES[function.__name__] = function
    return function


IN_PROCESS = """
import threading, time
from dray import Dray
app = Dray(transport="memory", backend="null", workers={{"default": {{"pool": "solo"}}}})
done = 0
@app.task
def noop():
    global done
    done += 1
worker = app.worker()
def drive():
    app.send_many(noop.s() for _ in range(200))
    while done < 200: time.sleep(0.001)
    began = time.perf_counter()
    app.send_many(noop.s() for _ in range({count}))
    while done < {count} + 200: time.sleep(0.0005)
    print({count} / (time.perf_counter() - began))
    worker.stop()
threading.Thread(target=drive).start()
worker.run()
"""


@measure
def memory_solo(scale: float) -> Figures:
    """memory transport, solo pool, no-op tasks: sent and run in one process."""
    code = IN_PROCESS.format(count=max(2000, int(200_000 * scale)))
    rates = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3 if scale >= 1 else 1)]
    return {"rate": round(statistics.median(rates)), "reach": 50_000}


@measure
def sqlite_drain(scale: float) -> Figures:
    """sqlite, prefork 2: the rate of draining a filled queue, results off."""
    return _drain(scale, results=False, reach=12_000)


@measure
def sqlite_drain_results(scale: float) -> Figures:
    """The same with results stored."""
    return _drain(scale, results=True, reach=8_000)


def _drain(scale: float, results: bool, reach: int) -> Figures:
    count = max(2000, int(60_000 * scale))
    rates = []
    for _ in range(3 if scale >= 1 else 1):
        with Bench(results=results) as bench:
            rates.append(bench.drain(count, None, "--pool", "prefork", "--size", "2"))
    return {"n": count, "rate": round(statistics.median(rates)), "reach": reach}


@measure
def sqlite_send(scale: float) -> Figures:
    """sqlite: single ``delay()`` and ``send_many``, no worker."""
    count = max(500, int(20_000 * scale))
    with Bench() as bench:
        single = bench.drive(
            f"noop.delay()\nt = time.perf_counter()\nfor _ in range({count}): noop.delay()\n"
            f"print({count} / (time.perf_counter() - t))"
        )
    with Bench() as bench:
        many = bench.drive(
            f"noop.delay()\nt = time.perf_counter()\napp.send_many(noop.s() for _ in range({count * 5}))\n"
            f"print({count * 5} / (time.perf_counter() - t))"
        )
    return {"delay_rate": round(float(single)), "many_rate": round(float(many)), "reach": [6_000, 80_000]}


@measure
def sqlite_roundtrip(scale: float) -> Figures:
    """sqlite, prefork 2, results on: ``delay()`` and ``get()``, one at a time."""
    count = max(50, int(2000 * scale))
    code = (
        "import json\nfrom benchmarks.harness import percentiles\n"
        "for _ in range(50): noop.delay().get(20)\ntook = []\n"
        f"for _ in range({count}):\n"
        "    t = time.perf_counter(); noop.delay().get(20); took.append(time.perf_counter() - t)\n"
        "print(json.dumps(percentiles(took)))"
    )
    with Bench(results=True) as bench, bench.worker("--pool", "prefork", "--size", "2"):
        return {"n": count, **json.loads(bench.drive(code)), "reach": {"p50_ms": 2, "p99_ms": 8}}


@measure
def start_up(scale: float) -> Figures:
    """``import dray`` over bare Python; a worker's start until its first task has run."""
    runs = 15 if scale >= 1 else 3

    def took(statement: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        return time.perf_counter() - began

    took("import dray")
    imports = [took("import dray") - took("pass") for _ in range(runs)]
    firsts = []
    with Bench() as bench:
        for at in range(max(3, runs // 2)):
            bench.drive("noop.delay()")
            began = time.perf_counter()
            with bench.worker("--pool", "prefork", "--size", "2"):
                firsts.append(bench.await_total(at + 1, every_s=0.0002) - began)
    return {
        "import_ms": round(statistics.median(imports) * 1e3, 1),
        "first_task_ms": round(statistics.median(firsts) * 1e3),
        "reach": {"import_ms": 45, "first_task_ms": 350},
    }


@measure
def memory_use(scale: float) -> Figures:
    """Proportional memory of a worker (prefork 2) with its tree: idle, after 50,000 tasks, and its growth from there.

    The first tasks touch pages that parent and children shared until then, and fill SQLite's cache; what grows
    after that would be a leak.
    """
    warm_up, count = max(2_000, int(50_000 * scale)), max(5_000, int(500_000 * scale))
    with Bench() as bench, bench.worker("--pool", "prefork", "--size", "2") as worker:
        sizes, total = [], 0
        for more in (20, warm_up, count):
            total += more
            bench.drive(f"app.send_many(noop.s() for _ in range({more}))")
            bench.await_total(total)
            time.sleep(1)
            sizes.append(pss_bytes(worker) / 2**20)
    idle, warm, after = sizes
    return {
        "n": count,
        "idle_mb": round(idle, 1),
        "warm_mb": round(warm, 1),
        "growth_mb": round(after - warm, 2),
        "reach": {"idle_mb": 50, "growth_mb": 3},
    }


@measure
def delayed(scale: float) -> Figures:
    """100,000 tasks an hour away, beside the same number of others that run: what they add to the worker's memory."""
    count = max(2_000, int(100_000 * scale))
    with Bench() as bench, bench.worker("--pool", "prefork", "--size", "2") as worker:
        sizes, total = [], 0
        for countdown in ("", ".options(countdown=3600)"):
            if countdown:
                bench.drive(f"app.send_many(noop{countdown}.s() for _ in range({count}))")
            for _ in range(2):
                total += count
                bench.drive(f"app.send_many(noop.s() for _ in range({count}))")
                bench.await_total(total)
            time.sleep(1)
            sizes.append(pss_bytes(worker) / 2**20)
    return {"n": count, "added_mb": round(sizes[1] - sizes[0], 2), "reach": {"added_mb": 0}}


@measure
def deep_queue(scale: float) -> Figures:
    """The drain rate with a million tasks queued, against ten thousand."""
    deep = max(20_000, int(1_000_000 * scale))
    small, large = [], []
    for _ in range(3 if scale >= 1 else 1):
        with Bench() as bench:
            small.append(bench.drain(20_000, 10_000, "--pool", "prefork", "--size", "2"))
        with Bench() as bench:
            large.append(bench.drain(deep, 20_000, "--pool", "prefork", "--size", "2"))
    ratio = statistics.median(large) / statistics.median(small)
    return {
        "n": deep, "small_rate": round(statistics.median(small)), "deep_rate": round(statistics.median(large)),
        "ratio": round(ratio, 2), "reach": 0.9,
    }  # fmt: skip


@measure
def long_beside_short(scale: float) -> Figures:
    """One long task first, then 10,000 short ones of the same name, prefork 2: when the last short one ran."""
    count, long_s = max(1_000, int(10_000 * scale)), 60 if scale >= 1 else 8
    with Bench() as bench:
        bench.drive(f"app.send_many([nap.s({long_s}), *(nap.s(0) for _ in range({count}))])")
        with bench.worker("--pool", "prefork", "--size", "2"):
            first = bench.await_total(1, every_s=0.0002)
            last = bench.await_total(count + 1, long_s + 30)
    return {"n": count, "long_s": long_s, "short_done_s": round(last - first, 3), "reach": "well below long_s"}


COUNTING = """
import sys
from dray import Dray
app = Dray(transport="memory", backend="null")
@app.task
def noop(): pass
noop.delay()
calls, deepest = 0, 0
def profile(frame, event, arg):
    global calls
    if event == "call" and "/dray/" in frame.f_code.co_filename: calls += 1
sys.setprofile(profile); noop.delay(); sys.setprofile(None)
print(calls)
"""


@measure
def frames(_: float) -> Figures:
    """Own Python calls per enqueue (tests/test_client.py and test_executor.py count the frames)."""
    calls = int(subprocess.check_output([sys.executable, "-c", COUNTING]))
    return {"calls_per_enqueue": calls, "reach": 40}
