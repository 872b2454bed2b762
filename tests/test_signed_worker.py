"""Signed messages through a real worker: only what was signed runs, and a replay of what ended does not."""

from __future__ import annotations

from pathlib import Path

from tests.project import Project

CONFIG = """
transport: sqlite
backend: sqlite
serializer: {use: signed, inner: json, algorithm: hmac, keys: {one: "${KEY}"}, signing_key: one}
compression: {use: zlib, over: 1KiB}
"""
TASKS = """
@app.task(retry=Retry(max=2, delay=0.01))
def flaky(n: int) -> int:
    log("flaky")
    if current().attempt < 2:
        raise OSError("not yet")
    return n

@app.task
def size(text: str) -> int:
    current().progress(1, 2, step="half")
    return len(text)
"""


def test_signed_calls_run_and_forged_or_replayed_ones_do_not(tmp_path: Path) -> None:
    project = Project(tmp_path, CONFIG, TASKS)
    project.env["KEY"] = "0123456789abcdef" * 4
    with project.worker("--pool", "prefork", "--size", "1"):
        assert project.python("print(flaky.delay(7).get(20), size.delay('x' * 100_000).get(20))") == "7 100000"
        code = """
        message = app.connections().client._message(note, (1,), {}, __import__("dray").CallOptions())
        assert "sig" in message.headers
        app.transport.send([message, message._replace(id="forged", body=b"[[2],{}]")])
        print(app.result(message.id).get(20))
        app.transport.send([message])  # a replay, after it ended
        print(note.delay(3).get(20))
        print(app.transport.dead_get(["forged"])[0].reason)
        """
        first, third, reason = project.python(code).splitlines()
    assert (first, third) == ("1", "3")
    assert reason.startswith("SignatureError")
    runs = project.runs()
    assert (runs["1"], runs["2"], runs["3"], runs["flaky"]) == (1, 0, 1, 3)
    assert "ended before" in project.log()
    assert project.env["KEY"] not in project.log()
