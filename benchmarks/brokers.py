"""``python -m benchmarks brokers``: dray against its goals and its peers, on RabbitMQ and Redis.

Everything runs on private servers that this starts. Each round measures every contest once: dray first, then each of
its peers, so that what the machine does otherwise meets all alike. ``--smoke`` proves in half a minute that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import servers
from benchmarks.contests import CONTESTS, Contest
from benchmarks.tables import Report, show
from dray.cli.bench import surroundings

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import run as peers

QUIET_BUSY, QUIET_S, QUIET_MAX_S = 0.12, 0.5, 15.0
RUN_MAX_S = 240.0
SMOKE_TASKS, SMOKE_PEER_TASKS, SMOKE_PEERS_S = 300, 200, 22.0
PEER_MEASURE = {"drain": "drain", "latency": "roundtrip", "memory": "memory"}
PEER_FIGURES = {"rate": "per_s", "pss_mb": "idle_mb"}
Run = dict[str, Any]
Running = Mapping[str, servers.Server]


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks brokers", description=__doc__)
    parser.add_argument("contests", nargs="*", metavar="WORD", help="only contests whose names hold all these words")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every run; `chart` and `table` read it")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--minutes", type=float, default=13, help="no round is begun that would end later")
    parser.add_argument("--long", action="store_true", help="also the million queued and the two million run: + 10 min")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few hundred tasks, only what is installed")
    given = parser.parse_args(words)
    chosen = [contest for contest in CONTESTS if _wanted(contest, given)]
    if not chosen:
        parser.error(f"no contest is named like that; there are: {', '.join(contest.key for contest in CONTESTS)}")
    report: Report = {**surroundings("python -m benchmarks"), "servers": {}, "runs": []}
    began = time.monotonic()
    with _started({contest.system for contest in chosen} | {"redis"}) as running:
        report["servers"] = {name: server.version() for name, server in running.items()}
        possible = [contest for contest in chosen if {contest.system, "redis"} <= running.keys()]
        for run in _runs(possible, running, given):
            report["runs"].append(run)
            print(json.dumps(run), flush=True)
            if given.json:
                given.json.write_text(json.dumps(report, indent=1) + "\n")
    if not given.smoke:
        show(report)
    print(f"{len(report['runs'])} runs in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return int(any("error" in run for run in report["runs"] if run["who"] == "dray"))


def _runs(contests: Sequence[Contest], running: Running, given: argparse.Namespace) -> Iterator[Run]:
    """Round after round, while there is time; then what is measured once."""
    began = time.monotonic()
    for at in range(1 if given.smoke else given.rounds):
        if at and (time.monotonic() - began) * (at + 1) / at > given.minutes * 60:
            print(f"{at} rounds: another one would take more than {given.minutes:g} minutes", file=sys.stderr)
            break
        for contest in contests:
            if not contest.once:
                yield from ({"round": at, **run} for run in _round(contest, running, given, began))
    for contest in contests:
        if contest.once:
            yield from ({"round": 0, **run} for run in _round(contest, running, given, began))


def _wanted(contest: Contest, given: argparse.Namespace) -> bool:
    if given.smoke:
        return contest.smoke
    return (given.long or not contest.long) and all(word in contest.key.split() for word in given.contests)


@contextlib.contextmanager
def _started(names: set[str]) -> Iterator[Running]:
    """The private servers; what is not installed is left out, and said."""
    with contextlib.ExitStack() as stack:
        running = {}
        for name, start in {"redis": servers.redis, "rabbitmq": servers.rabbitmq}.items():
            if name in names:
                try:
                    running[name] = stack.enter_context(start())
                except servers.ServerError as error:
                    print(f"left out: {error}", file=sys.stderr)
        yield running


def _round(contest: Contest, running: Running, given: argparse.Namespace, began: float) -> Iterator[Run]:
    """dray once, each peer once."""
    yield _measured("dray", contest, running, given.smoke)
    if given.no_peers:
        return
    for peer, tasks in contest.peers:
        if not peers.installed(peer):
            print(f"left out: {peer}; `make bench-peers` installs it", file=sys.stderr)
        elif given.smoke and (contest.measure != "drain" or time.monotonic() - began > SMOKE_PEERS_S):
            continue
        else:
            yield _measured(peer, contest, running, given.smoke, tasks)


def _measured(who: str, contest: Contest, running: Running, smoke: bool, tasks: int = 0) -> Run:
    broker, redis = running[contest.system], running["redis"]
    for server in {broker, redis}:
        server.clean()
    run: Run = {
        "who": who, "queue": contest.queue, "system": contest.system, "measure": contest.measure,
        "results": contest.results, "contest": contest.key,
    }  # fmt: skip
    run["busy"] = 0.0 if smoke else _quiet()
    began = time.monotonic()
    try:
        if who == "dray":
            run["tasks"] = SMOKE_TASKS if smoke else contest.tasks
            run |= _dray(contest, broker, redis, run["tasks"])
        else:
            run["tasks"] = SMOKE_PEER_TASKS if smoke else tasks
            run |= _peer(who, contest, broker, redis, run["tasks"])
    except (peers.PeerError, BenchError, subprocess.TimeoutExpired) as error:
        text = str(error)
        run["error"] = text if len(text) < 2000 else f"{text[:500]} ... {text[-1500:]}"
    return run | {"took_s": round(time.monotonic() - began, 1)}


class BenchError(Exception):
    """``dray bench`` failed; the message is what it said."""


def _dray(contest: Contest, broker: servers.Server, redis: servers.Server, tasks: int) -> Run:
    """``dray bench``, as anybody may call it."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [
            sys.executable, "-m", "dray", "bench", contest.measure, "--transport", _transport(contest, broker),
            "--backend", redis.url[:-1] + "1" if contest.results else "null", "--pool", "prefork", "--size", "2",
            "--tasks", str(tasks), "--repeats", "1", "--broker-pid", str(broker.pid), "--json", file.name,
        ]  # fmt: skip
        done = subprocess.run(
            command, env=peers.clean_environment(), capture_output=True, text=True, timeout=RUN_MAX_S, check=False
        )
        if done.returncode:
            raise BenchError(done.stderr)
        figures: Run = json.loads(Path(file.name).read_text())["measures"][contest.measure]["runs"][0]
        return figures


def _transport(contest: Contest, broker: servers.Server) -> str:
    if contest.system == "redis":
        return broker.url
    # a queue cannot change its type: each type has names of its own
    return json.dumps({"url": broker.url, "queue_type": contest.queue, "prefix": f"bench-{contest.queue}"})


def _peer(peer: str, contest: Contest, broker: servers.Server, redis: servers.Server, tasks: int) -> Run:
    backend = redis.url[:-1] + "1"
    measure = PEER_MEASURE[contest.measure]
    found = peers.measure(peer, measure, tasks, contest.results, RUN_MAX_S, broker.url, backend)
    return {PEER_FIGURES.get(name, name): value for name, value in found.items() if name not in ("measure", "results")}


def _quiet() -> float:
    """Wait until the machine does nothing else, not for ever; the share of it that was busy in the end."""
    import psutil

    deadline = time.monotonic() + QUIET_MAX_S
    while (busy := psutil.cpu_percent(QUIET_S) / 100) > QUIET_BUSY and time.monotonic() < deadline:
        pass
    return round(busy, 2)
