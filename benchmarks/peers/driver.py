"""The caller's side of a measurement, run inside a peer's own environment by run.py. Prints one JSON line."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import sys
import time

WARM_UP = 20
PATIENCE_S = 3

loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)


def done(call: object) -> object:
    """What a peer's function returned; a coroutine is run first."""
    return loop.run_until_complete(call) if inspect.iscoroutine(call) else call


def enqueue(peer, count: int) -> dict[str, float]:
    done(peer.enqueue(1))  # opens the connection; counted among the tasks, not in the time
    began = time.perf_counter()
    done(peer.enqueue(count - 1))
    seconds = time.perf_counter() - began
    return {"rate": round((count - 1) / seconds, 1), "seconds": round(seconds, 3)}


def roundtrip(peer, count: int) -> dict[str, object]:
    """The milliseconds that each round trip took, up to the first whose result never came (``lost``)."""
    took: list[float] = []
    for turn in range(WARM_UP + count):
        began = time.perf_counter()
        try:
            done(peer.roundtrip(PATIENCE_S))
        except Exception as error:  # noqa: BLE001 - each peer has its own kinds of timeout
            return {"took_ms": took, "lost": f"{type(error).__name__}: {error}"}
        if turn >= WARM_UP:
            took.append((time.perf_counter() - began) * 1000)
    return {"took_ms": took, "lost": None}


if __name__ == "__main__":
    name, measure, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    name, _, variant = name.partition("-")
    module = importlib.import_module(f"{name}_peer")
    if measure == "workers":
        figures = {"workers": module.WORKERS[variant], "env": module.ENV}
    else:
        figures = globals()[measure](module, number)
    print(json.dumps(figures), flush=True)
    os._exit(0)  # a peer's helper threads must not hold up the measurement
