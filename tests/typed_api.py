"""What a type checker has to say about calls of tasks: each expected error stands beside its line.

Not imported by any test: ``test_task.py`` gives it to mypy.
"""

from __future__ import annotations

from typing import assert_type

from dray import AsyncResult, Dray, Retry

app = Dray()


@app.task
def add(x: int, y: int = 0) -> int:
    return x + y


@app.task(queue="http", retry=Retry(on=OSError))
async def fetch(url: str) -> bytes:
    return url.encode()


async def calls() -> None:
    assert_type(add.delay(1, y=2), AsyncResult[int])
    assert_type(add.delay(1).get(timeout=1), int)
    assert_type(add(1, 2), int)
    assert_type(fetch.delay("u"), AsyncResult[bytes])
    assert_type(await fetch("u"), bytes)
    assert_type(await add.adelay(1), AsyncResult[int])
    assert_type(add.options(countdown=5).delay(1), AsyncResult[int])
    assert_type(await fetch.options(queue="x").adelay("u"), AsyncResult[bytes])
    add.delay("2")  # error: arg-type
    add.delay()  # error: call-arg
    add.delay(1, z=2)  # error: call-arg
    fetch.delay(1)  # error: arg-type
    add.options(countdown=5).delay("2")  # error: arg-type
    add.s("2")  # error: arg-type
    await add.adelay("2")  # error: arg-type
    add("2")  # error: arg-type
