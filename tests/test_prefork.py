"""What only the prefork pool does: children that die, hang, leak or close everything, and nobody else notices."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from dray.core.contracts import Slot
from dray.core.errors import ConfigError, DrayError
from dray.core.message import Action, Delivery, Outcome, Outgoing, Settlement, State, StoredResult, acknowledged
from dray.plugins._prefork_child import ChildLoop, Retirement
from dray.plugins._prefork_crew import describe_exit
from dray.plugins._prefork_frames import (
    DRY,
    OUTCOMES,
    READY,
    TOKENS,
    FrameReader,
    frame,
    pack_items,
    pack_outcome,
    records,
    unpack_outcome,
)
from dray.plugins._prefork_memory import SlotMemory, shared_memory
from dray.plugins._prefork_server import _COORDINATED
from dray.plugins.pools.prefork import PreforkOptions, PreforkPool
from dray.testing.pool_kit import (
    PATIENCE_S,
    KitExecutor,
    PoolHarness,
    footprint,
    make_deliveries,
    make_delivery,
    pool_context,
    value_of,
)


class NastyExecutor(KitExecutor):
    """More commands, most of them fatal. ``began`` says who ran, and who was forked."""

    def __init__(self) -> None:
        super().__init__()
        self.forks = 0
        self.hoard: list[bytes] = []

    def forked(self) -> None:
        self.forks += 1

    def run(self, delivery: Delivery, slot: Slot) -> Outcome:
        if delivery.body == b"rich":
            then = (Outgoing("q", "next", b"body", {"a": "ä"}, 3, 1.5, None),)
            return Outcome(
                Settlement(delivery, Action.DEAD, then, "because"), StoredResult("r", State.RETRY, b"\0", 2.5)
            )
        return super().run(delivery, slot)

    def perform(self, delivery: Delivery, slot: Slot) -> str:
        command, _, argument = delivery.body.decode().partition(" ")
        if command == "mark":
            self.started.write(f"{delivery.id}\n".encode())
        elif command == "leave":
            os._exit(int(argument))
        elif command == "segfault":
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # pytest's fault handler would print
            ctypes.string_at(0)
        elif command == "close_all":
            os.closerange(0, 1024)
            return "closed"
        elif command == "fork":
            if os.fork() == 0:
                return "the other"
            return "the one"
        elif command == "pid":
            return str(os.getpid())
        elif command == "random":
            return str(random.random())
        elif command == "huge":
            return "x" * int(argument)
        elif command == "size":
            return str(len(delivery.body))
        elif command == "hoard":
            self.hoard.append(b"x" * int(argument))
        elif command == "forks":
            return str(self.forks)
        elif command == "subprocess_signals":
            code = "import signal; print([signal.getsignal(s).name for s in (signal.SIGTERM, signal.SIGHUP)])"
            return subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout.strip()
        else:
            return super().perform(delivery, slot)
        return "ok"


@pytest.fixture
def start() -> Iterator[Callable[..., PoolHarness]]:
    opened: list[PoolHarness] = []

    def start(size: int = 2, **options: int) -> PoolHarness:
        pool = PreforkPool(PreforkOptions(size=size, **options), pool_context("prefork"))
        opened.append(PoolHarness(pool, NastyExecutor()))
        return opened[-1]

    yield start
    for harness in opened:
        harness.close()
        harness.executor.close()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids_of(harness: PoolHarness) -> set[int]:
    """The pids of the children, all of which must be idle."""
    size = harness.pool.capacity
    before = len(harness.outcomes)
    harness.pool.submit([make_delivery(f"pid{n}", b"gate", task=f"pid{n}") for n in range(size)])
    harness.executor.started.lines(size)
    found = {task.pid for task in harness.pool.running()}
    harness.executor.open_gate(size)
    harness.wait_for(before + size)
    assert len(found) == size
    return found


# --- what a task may do to its process


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"leave 0", "exit code 0"),
        (b"leave 7", "exit code 7"),
        (b"segfault", "signal 11 (SIGSEGV)"),
    ],
)
def test_a_task_that_kills_its_process_is_charged_and_nobody_else(start, body: bytes, reason: str) -> None:
    harness = start(1)
    harness.run(*make_deliveries(200, b"mark"))
    harness.executor.started.lines(200)
    before, after = make_deliveries(30, b"mark", "before"), make_deliveries(30, b"mark", "after")
    values = harness.run(*before, make_delivery("killer", body), *after)
    assert values[30].startswith("lost: WorkerLost: the process that ran kit (task killer) died: " + reason)
    assert values[:30] == values[31:] == ["ok"] * 30
    # each ran once: what was finished before the death was kept, what was not begun moved
    assert harness.executor.started.lines(60) == [each.id for each in [*before, *after]]


def test_many_killers_in_a_row_are_served(start) -> None:
    harness = start(2)
    values = harness.run(*[make_delivery(f"k{n}", b"leave 9") for n in range(4)], make_delivery("good"))
    assert [value.startswith("lost: WorkerLost") for value in values] == [True] * 4 + [False]


def test_a_task_that_closes_every_descriptor_keeps_its_outcome(start) -> None:
    harness = start(1)
    assert harness.run(make_delivery("a", b"close_all"), *make_deliveries(5)) == ["closed"] + ["ok"] * 5


def test_a_task_that_forks_runs_once(start) -> None:
    harness = start(1)
    assert harness.run(*[make_delivery(f"f{n}", b"fork") for n in range(3)]) == ["the one"] * 3
    assert harness.run(*make_deliveries(50)) == ["ok"] * 50


def test_a_task_that_loops_for_ever_is_killed_by_its_hard_limit(start) -> None:
    harness = start(1)
    (value,) = harness.run(make_delivery("loop", b"spin", hard="0.2"))
    found = re.fullmatch(r"lost: TimeLimitExceeded: task loop was killed after ([0-9.]+) s: .*", value)
    assert found is not None
    assert 0.2 <= float(found[1]) < 2.0  # the promise is 0.3; this machine may be busy
    assert harness.run(make_delivery("after")) == ["ok"]


def test_a_hard_limit_ends_with_its_task(start) -> None:
    harness = start(1)
    pids = pids_of(harness)
    assert harness.run(make_delivery("a", hard="0.05"), make_delivery("b", b"work 0.2")) == ["ok", "ok"]
    assert pids_of(harness) == pids


def test_soft_and_hard_limits_together(start) -> None:
    harness = start(1)
    pids = pids_of(harness)
    (value,) = harness.run(make_delivery("a", b"spin", soft="0.05", hard="10"))
    assert value == "SoftTimeLimitExceeded: the soft time limit of 0.05 s of kit is over"
    assert pids_of(harness) == pids


# --- what passes between the processes


def test_everything_of_an_outcome_comes_back(start) -> None:
    harness = start(1)
    delivery = make_delivery("a", b"rich")
    harness.pool.submit([delivery])
    (ended,) = harness.wait_for(1)
    assert ended.settlement.delivery is delivery
    assert ended.settlement[1:] == (Action.DEAD, (Outgoing("q", "next", b"body", {"a": "ä"}, 3, 1.5, None),), "because")
    assert ended.result == StoredResult("r", State.RETRY, b"\0", 2.5)


def test_huge_bodies_and_outcomes_at_once(start) -> None:
    harness = start(2)
    body = b"size " + b"x" * (16 << 20)
    deliveries = [make_delivery(f"b{n}", body) for n in range(4)]
    deliveries += [make_delivery(f"o{n}", b"huge 20000000") for n in range(4)]
    values = harness.run(*deliveries)
    assert values[:4] == [str(len(body))] * 4
    assert [len(value) for value in values[4:]] == [20_000_000] * 4
    assert harness.run(make_delivery("after")) == ["ok"]


def test_a_huge_body_can_be_taken_back_while_it_is_on_its_way(start) -> None:
    harness = start(1)
    for number in range(5):
        before = len(harness.outcomes)
        harness.pool.submit([make_delivery(f"b{number}", b"size " + b"x" * (16 << 20))])
        begun = 1 - len(harness.pool.recall())
        harness.wait_for(before + begun)
        assert harness.run(make_delivery("next")) == ["ok"]


def test_outcomes_of_the_size_of_the_shared_log(start) -> None:
    harness = start(1)
    sizes = [65_000, 65_400, 65_500, 65_536, 66_000, 30_000, 30_000, 30_000]
    values = harness.run(*[make_delivery(f"h{size}{n}", f"huge {size}".encode()) for n, size in enumerate(sizes)])
    assert [len(value) for value in values] == sizes


def test_headers_that_are_no_plain_dict(start) -> None:
    class Headers(dict):  # type: ignore[type-arg]
        pass

    harness = start(1)
    delivery = make_delivery("a")._replace(headers=Headers(task="kit"))
    assert harness.run(delivery) == ["ok"]


def test_a_child_without_tokens_begins_nothing_and_drops_the_whole_generation() -> None:
    here, there = socket.socketpair()
    token_read, token_write = os.pipe()
    executor = KitExecutor()
    memory = SlotMemory(shared_memory(1), 0)
    loop = ChildLoop(there, token_read, memory, executor, time.monotonic, Retirement(None, None))
    statuses: list[int] = []
    child = threading.Thread(target=lambda: statuses.append(loop.run()))
    child.start()
    reader = FrameReader(here)
    heard: list[tuple[int, bytes]] = []

    def next_frame() -> tuple[int, bytes]:
        while not heard:
            assert reader.fill()
            heard.extend(reader.frames())
        return heard.pop(0)

    def send(generation: int, *numbers: int) -> None:
        here.sendall(frame(generation, pack_items([(n, make_delivery(f"d{n}")) for n in numbers])))

    assert next_frame()[0] == READY
    send(0, 1, 2)
    assert next_frame() == (DRY, bytes(8))
    send(0, 3)  # was on its way when its token was taken back
    os.write(token_write, TOKENS[4])
    send(1, 4)
    kind, payload = next_frame()
    assert kind == OUTCOMES
    assert [record[0] for record in records(payload)] == [4]
    here.shutdown(socket.SHUT_RDWR)
    child.join(PATIENCE_S)
    assert statuses == [0]
    here.close()
    os.close(token_write)
    executor.close()


class Text(str):
    """What ``marshal`` refuses."""


@pytest.mark.parametrize(
    "rest",
    [
        ((Action.ACK, (), "why"), None),
        ((Action.DEAD, (), Text("why")), None),
        ((Action.ACK, (), None), StoredResult("d", State.SUCCESS, b"value", None)),
        ((Action.ACK, (), None), StoredResult(Text("d"), State.RETRY, b"value", 2.5)),
        ((Action.ACK, (Outgoing("q", "d", b"body", {"task": "t"}, 9, 1.5, 2.5),), None), None),
        ((Action.ACK, (Outgoing("q", Text("d"), b"body", {"task": Text("t")}),), None), None),
    ],
)
def test_an_outcome_is_the_same_in_parent_and_child(rest: tuple[tuple[Any, ...], StoredResult | None]) -> None:
    delivery = make_delivery("d")
    outcome = Outcome(Settlement(delivery, *rest[0]), rest[1])
    packed = pack_outcome(outcome)
    assert packed
    assert unpack_outcome(delivery, packed) == outcome


def test_a_plain_acknowledgement_takes_no_bytes() -> None:
    outcome = acknowledged(make_delivery("d"))
    assert outcome == Outcome(Settlement(outcome.settlement.delivery, Action.ACK), None)
    assert (type(outcome), type(outcome.settlement)) == (Outcome, Settlement)
    assert pack_outcome(outcome) == b""


# --- who waits for whom


def test_no_short_task_waits_for_a_long_one_of_the_same_name(start) -> None:
    harness = start(2)
    harness.run(*make_deliveries(500))
    short = make_deliveries(10_000)
    harness.pool.submit([*short[:5_000], make_delivery("long", b"gate"), *short[5_000:]])
    harness.wait_for(10_500)  # while the long one runs
    assert [task.id for task in harness.pool.running()] == ["long"]
    harness.executor.open_gate(1)
    harness.wait_for(10_501)


def test_unbegun_work_moves_when_its_child_is_killed_from_outside(start) -> None:
    harness = start(2)
    harness.run(*make_deliveries(200))
    harness.pool.submit([make_delivery("one", b"gate"), make_delivery("two", b"gate")])
    harness.executor.started.lines(2)
    harness.pool.submit(make_deliveries(50))
    victim = next(task for task in harness.pool.running() if task.id == "one")
    os.kill(victim.pid, signal.SIGKILL)
    found = {each.settlement.delivery.id: value_of(each) for each in harness.wait_for(251)[200:]}
    assert "signal 9 (SIGKILL)" in found.pop("one")
    assert set(found.values()) == {"ok"}
    harness.executor.open_gate(1)
    harness.wait_for(252)


# --- the life of children


def test_a_child_killed_while_idle_charges_nobody_and_is_replaced(start) -> None:
    harness = start(2)
    for _ in range(2):
        victim = pids_of(harness).pop()
        count = len(harness.outcomes)
        os.kill(victim, signal.SIGKILL)
        until(lambda victim=victim: not is_alive(victim), "the victim is dead")
        assert victim not in pids_of(harness)
        assert len(harness.outcomes) == count + 2


def test_each_child_is_told_once_that_it_was_forked(start) -> None:
    harness = start(2)
    assert set(harness.run(*[make_delivery(f"f{n}", b"forks") for n in range(20)])) == {"1"}


def test_children_do_not_share_their_random_numbers(start) -> None:
    harness = start(1, max_tasks_per_child=1)
    assert len(set(harness.run(*[make_delivery(f"r{n}", b"random") for n in range(4)]))) == 4


def test_max_tasks_per_child(start) -> None:
    harness = start(1, max_tasks_per_child=10)
    pids = harness.run(*[make_delivery(f"p{n}", b"pid") for n in range(40)])
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [10] * 4


def test_max_memory_per_child(start) -> None:
    # A child begins with the memory of this process, which is large after other tests.
    harness = start(1, max_memory_per_child=psutil.Process().memory_info().rss + (260 << 20))
    pids = []
    for number in range(6):
        harness.run(make_delivery(f"h{number}", b"hoard 120000000"))
        pids += harness.run(make_delivery(f"p{number}", b"pid"))
    assert 2 <= len(set(pids)) <= 4


def test_signals_to_the_group_are_the_parents_business(start) -> None:
    harness = start(2)
    pids = pids_of(harness)
    for pid in pids:
        for number in _COORDINATED:
            os.kill(pid, number)
    assert pids_of(harness) == pids
    assert harness.run(make_delivery("s", b"subprocess_signals")) == ["['SIG_DFL', 'SIG_DFL']"]


def test_stop_kills_what_outlasts_it_and_leaves_nothing() -> None:
    before = footprint()
    pool = PreforkPool(PreforkOptions(size=2), pool_context("prefork"))
    executor = NastyExecutor()
    harness = PoolHarness(pool, executor)
    spinning = [make_delivery(f"s{n}", b"spin 1000") for n in range(3)]
    pool.submit(spinning)
    until(lambda: len(pool.running()) == 2, "two run")
    assert pool.stop(0.05) == spinning
    harness.close()
    executor.close()
    assert harness.outcomes == []
    assert footprint() == before


def test_the_death_of_the_fork_server_ends_the_pool_and_loses_nothing(start, caplog) -> None:
    pool = PreforkPool(PreforkOptions(size=2), pool_context("prefork"))
    executor = NastyExecutor()
    pool.start(executor, lambda _: None, lambda _: None)
    given = [*make_deliveries(2, b"gate"), *make_deliveries(5, prefix="w")]
    pool.submit(given)
    executor.started.lines(2)
    pids = [task.pid for task in pool.running()]
    with caplog.at_level(logging.CRITICAL, "dray.pool"):
        os.kill(pool._server.pid, signal.SIGKILL)
        with pytest.raises(DrayError, match="the fork server of pool prefork"):
            pool.run(threading.Event())
    assert pool.stop(5.0) == given
    until(lambda: not any(map(is_alive, pids)), "the children are gone")
    executor.close()


def test_the_death_of_the_parent_takes_all_along(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, time
        from dray.plugins.pools.prefork import PreforkOptions, PreforkPool
        from dray.testing.pool_kit import KitExecutor, make_deliveries, pool_context
        pool = PreforkPool(PreforkOptions(size=2), pool_context("prefork"))
        executor = KitExecutor()
        pool.start(executor, lambda _: None, lambda _: None)
        pool.submit(make_deliveries(2, b"spin 1000"))
        while len(pool.running()) < 2:
            time.sleep(0.005)
        print(pool._server.pid, *[task.pid for task in pool.running()], flush=True)
        sys.stdin.read()
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent.stdin, parent.stdout:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(is_alive, pids))
        parent.kill()
        parent.wait()
        until(lambda: not any(map(is_alive, pids)), "fork server and children are gone")


class LoggingExecutor(KitExecutor):
    """Writes down each run, then does what the body says."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def perform(self, delivery: Delivery, slot: Slot) -> str:
        os.write(self.log, f"{delivery.id}\n".encode())
        return super().perform(delivery, slot)

    def close(self) -> None:
        super().close()
        os.close(self.log)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_each_delivery_ends_once_and_runs_at_most_once(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    executor = LoggingExecutor(tmp_path / "runs")
    pool = PreforkPool(PreforkOptions(size=3, max_tasks_per_child=150), pool_context("prefork"))
    harness = PoolHarness(pool, executor)
    bodies = [b"ok"] * 90 + [b"work 0.001"] * 8 + [b"work 0.02"] * 2
    deliveries = [make_delivery(f"d{n}", chance.choice(bodies), task=f"t{n % 3}") for n in range(3_000)]
    taken: list[Delivery] = []

    def enough(wanted: int) -> bool:
        return len(harness.outcomes) >= wanted

    for at in range(0, 3_000, 50):
        pool.submit(deliveries[at : at + 50])
        match chance.randrange(8):
            case 0:
                taken += pool.recall()
            case 1 | 2:
                victim = chance.choice(deliveries[: at + 50])
                taken += [victim] if pool.cancel(victim) else []
            case 3:
                for task in pool.running()[:1]:
                    with contextlib.suppress(ProcessLookupError):  # it was hit before
                        os.kill(task.pid, signal.SIGKILL)
            case 4:
                harness.wait(partial(enough, min(len(harness.outcomes) + 20, at - len(taken))), "some progress")
    harness.wait(partial(enough, 2_900 - len(taken)), "nearly all")
    taken += pool.stop(PATIENCE_S)
    harness.close()
    executor.close()
    ended = [each.settlement.delivery for each in harness.outcomes]
    assert sorted(map(id, [*ended, *taken])) == sorted(map(id, deliveries))
    runs = (tmp_path / "runs").read_text().split()
    assert len(runs) == len(set(runs))
    assert {each.id for each in taken}.isdisjoint(runs)
    finished = {each.settlement.delivery.id for each in harness.outcomes if value_of(each) == "ok"}
    assert finished <= set(runs)


@pytest.mark.parametrize("option", ["size", "max_tasks_per_child", "max_memory_per_child"])
def test_options_that_make_no_sense(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} is 0"):
        PreforkOptions(**{option: 0})


def test_exits_are_described() -> None:
    assert describe_exit(3 << 8) == "exit code 3"
    assert describe_exit(9) == "signal 9 (SIGKILL)"
    assert describe_exit(63) == "signal 63"
