"""What the filesystem transport and back end do beyond the contract: damage, other processes, large folders."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.core.clock import SystemClock
from dray.core.contracts import Durability
from dray.core.errors import SendError, Unavailable
from dray.core.message import Action, Outgoing, Settlement, State, StoredResult
from dray.plugins import _filesystem, _folder_reader
from dray.plugins._filesystem import readable_name, remove_dead_sleepers, safe_name
from dray.plugins._folder_queue import SEGMENT_BITS, Name
from dray.plugins.backends import filesystem as backend_module
from dray.plugins.backends.filesystem import FilesystemBackend
from dray.plugins.transports import filesystem as transport_module
from dray.plugins.transports.filesystem import FilesystemTransport
from dray.testing import FakeClock, plugin_context
from dray.testing.harness import ODD_NAMES, PROMPT_S, Background


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def transport(tmp_path: Path, clock: FakeClock) -> Any:
    transport = make(tmp_path, clock)
    yield transport
    transport.close()


def make(tmp_path: Path, clock: Any, **options: Any) -> FilesystemTransport:
    transport = FilesystemTransport(
        FilesystemTransport.Options(**options), plugin_context("filesystem", clock, tmp_path)
    )
    transport.open()
    return transport


def message(id_: str = "m", queue: str = "q", **fields: Any) -> Outgoing:
    return Outgoing(queue, id_, b"body", {"task": "t"}, **fields)


def message_files(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob(".dray/queue/queues/q/messages/*/*"))


# --- names ---------------------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300))
def test_any_text_has_a_safe_name(text: str) -> None:
    name = safe_name(text)
    assert 0 < len(name.encode()) <= 255
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-%~")
    assert readable_name(name) in {text, None}
    assert readable_name(name) == text or len(name) > 100


@given(
    st.integers(0, 9), st.integers(0, 2**63), st.integers(0, 2**31), st.sampled_from(["0" * 20, "0123456789abcdef0123"])
)
def test_a_file_name_tells_what_it_was_made_of(level: int, when: int, deliveries: int, tie: str) -> None:
    name = Name(level, when, tie, deliveries, "f" * 16)
    assert Name.parse(str(name)) == name


@given(st.text(max_size=80))
def test_foreign_names_are_recognised(text: str) -> None:
    assert Name.parse(text) is None


def test_odd_names_stay_inside_the_folder(tmp_path: Path, transport: FilesystemTransport) -> None:
    transport.send([message(name, name) for name in ODD_NAMES])
    transport.bury(dict.fromkeys(ODD_NAMES, "revoked"), 2e9)
    assert os.listdir(tmp_path) == [".dray"]
    assert os.listdir(tmp_path / ".dray") == ["queue"]
    assert set(transport.queues()) == set(ODD_NAMES)


@pytest.mark.parametrize("url", ["filesystem://{}/some%20dir", "file://{}/some%20dir"])
def test_a_url_names_the_folder(tmp_path: Path, clock: FakeClock, url: str) -> None:
    make(tmp_path / "elsewhere", clock, url=url.format(tmp_path)).close()
    assert (tmp_path / "some dir" / "queues").is_dir()


def test_fsync_claims_to_survive_power_loss(tmp_path: Path, clock: FakeClock) -> None:
    assert make(tmp_path, clock, fsync=True).features.durability == Durability.D3
    assert make(tmp_path, clock).features.durability == Durability.D2


# --- damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"D", b"D\x01\x00\x00\xff\xff", b"\xff" * 50, "cut off", "empty id"])
def test_a_damaged_message_is_set_aside_and_the_others_arrive(
    tmp_path: Path, transport: FilesystemTransport, content: Any
) -> None:
    transport.send([message("damaged"), message("fine")])
    [victim, _] = message_files(tmp_path)
    if content == "cut off":
        content = victim.read_bytes()[:-1]
    elif content == "empty id":
        content = _filesystem.enclose({"queue": "q"}, b"body")
    victim.write_bytes(content)
    assert [delivery.id for delivery in transport.consumer(["q"], 1).receive(10, 0)] == ["fine"]
    [letter] = transport.dead_list("q", 10)
    assert letter.body == content
    assert "not readable" in letter.reason
    assert transport.dead_get([letter.id]) == [letter]
    assert transport.dead_purge([letter.id]) == [letter.id]


def test_foreign_files_are_set_aside_and_hidden_ones_left_alone(tmp_path: Path, transport: FilesystemTransport) -> None:
    transport.send([message()])
    folder = message_files(tmp_path)[0].parent
    (folder / "README.txt").write_bytes(b"hello")
    (folder / ".nfs0001").write_bytes(b"in use")
    (folder.parent / "stray").write_bytes(b"stray")
    (folder.parent / "zz-folder").mkdir()
    (folder.parent.parent / "leased" / "odd").write_bytes(b"odd")
    consumer = transport.consumer(["q"], 1)
    assert [delivery.id for delivery in consumer.receive(10, 0)] == ["m"]
    assert {(letter.body, "not a file of dray's" in letter.reason) for letter in transport.dead_list(None, 10)} == {
        (b"hello", True),
        (b"stray", True),
        (b"odd", True),
    }
    assert (folder / ".nfs0001").exists()
    assert consumer.receive(10, 0) == []


@pytest.mark.parametrize("fail_at", [0, 2])
def test_a_full_disk_says_what_was_not_stored(
    tmp_path: Path, transport: FilesystemTransport, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    write, calls = os.write, iter(range(100))

    def full(fd: int, data: bytes) -> int:
        if next(calls) >= fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(_filesystem.os, "write", full)
        with pytest.raises(Unavailable, match=r"No space left.*make room"):
            transport.send([message("a"), message("b"), message("c")])
    assert transport.consumer(["q"], 1).receive(10, 0) == []
    assert list((tmp_path / ".dray/queue/tmp").iterdir()) == []


def test_a_batch_that_fails_half_way_says_the_rest(
    transport: FilesystemTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport.send([message("first")])
    rename, calls = os.rename, iter(range(100))

    def failing(source: Any, target: Any) -> None:
        if next(calls) >= 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(_filesystem.os, "rename", failing)
        with pytest.raises(SendError) as caught:
            transport.send([message("a"), message("b"), message("c"), message("d")])
    assert [item.id for item in caught.value.unsent] == ["c", "d"]
    assert [item.id for item in transport.consumer(["q"], 1).receive(10, 0)] == ["first", "a", "b"]


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Unavailable, match="a part of this path is a file"):
        make(tmp_path, clock, path="file/queue")


def test_a_crash_between_follow_ups_and_removal_loses_nothing(
    transport: FilesystemTransport, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport.send([message("first")])
    consumer = transport.consumer(["q"], 1)
    [delivery] = consumer.receive(1, 0)
    unlink = os.unlink

    def crash(path: Any) -> None:
        if "leased" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", crash)
        with pytest.raises(Unavailable):
            transport.settle([Settlement(delivery, Action.ACK, (message("next"),))])
    assert [item.id for item in consumer.receive(10, 0)] == ["next"]
    clock.advance(31)
    assert {item.id for item in consumer.receive(10, 0)} == {"first", "next"}


# --- other processes -----------------------------------------------------------------------------------------

_CONSUME = """
import sys
from pathlib import Path
from dray.core.clock import SystemClock
from dray.core.message import Action, Outgoing, Settlement
from dray.plugins.transports.filesystem import FilesystemTransport
from dray.testing import plugin_context
transport = FilesystemTransport(FilesystemTransport.Options(), plugin_context("fs", SystemClock(), Path(sys.argv[1])))
transport.open()
consumer = transport.consumer(["q"], 1)
while True:
    deliveries = consumer.receive(5, float(sys.argv[2]))
    if not deliveries:
        break
    for delivery in deliveries:
        print(delivery.id, flush=True)
    assert transport.settle([Settlement(delivery, Action.ACK) for delivery in deliveries]) == []
transport.close()
"""


def spawn(tmp_path: Path, patience_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _CONSUME, str(tmp_path), str(patience_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_share_a_queue_without_sharing_a_message(tmp_path: Path) -> None:
    transport = make(tmp_path, SystemClock())
    transport.send([message(f"m{number}") for number in range(150)])
    children = [spawn(tmp_path, 1) for _ in range(2)]
    transport.send([message(f"m{number}") for number in range(150, 300)])
    seen: list[str] = []
    for child in children:
        output, _ = child.communicate(timeout=60)
        assert child.returncode == 0
        seen += output.split()
    assert Counter(seen) == Counter(f"m{number}" for number in range(300))
    transport.close()


def test_a_killed_process_leaves_its_messages_and_no_fifo(tmp_path: Path) -> None:
    transport = make(tmp_path, SystemClock(), lease=1)
    child = spawn(tmp_path, 60)
    waiters = tmp_path / ".dray/queue/waiters"
    deadline = time.monotonic() + 30
    while not any(name for name in os.listdir(waiters) if not name.startswith(".")):
        assert time.monotonic() < deadline, "the child never waited"
        threading.Event().wait(0.01)
    child.kill()
    child.communicate(timeout=30)
    assert os.listdir(waiters) != []
    transport.send([message()])
    assert os.listdir(waiters) == [], "the sender found a FIFO that nobody reads, and left it"
    assert [item.id for item in transport.consumer(["q"], 1).receive(1, PROMPT_S)] == ["m"]
    transport.close()


def test_senders_wake_consumers_without_polling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "POLL_S", 60.0)
    receiver, sender = make(tmp_path, SystemClock()), make(tmp_path, SystemClock())
    consumer = receiver.consumer(["q"], 1)
    found: list[str] = []
    background = Background()
    background.start(lambda: found.extend(item.id for item in consumer.receive(1, 30)))
    waiters = tmp_path / ".dray/queue/waiters"
    deadline = time.monotonic() + PROMPT_S
    while not any(not name.startswith(".") for name in os.listdir(waiters)):
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)
    sender.send([message(queue="another")])
    assert found == []
    sender.send([message()])
    background.join(PROMPT_S)
    assert found == ["m"]
    receiver.close()
    assert os.listdir(waiters) == []
    sender.close()


def test_a_consumer_whose_fifo_was_removed_makes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = make(tmp_path, SystemClock())
    consumer = transport.consumer(["q"], 1)
    assert consumer.receive(1, 0.01) == []
    waiters = tmp_path / ".dray/queue/waiters"
    for name in os.listdir(waiters):
        (waiters / name).unlink()
    assert consumer.receive(1, 0.01) == []
    assert len(os.listdir(waiters)) == 1
    remove_dead_sleepers(waiters)
    assert len(os.listdir(waiters)) == 1, "a FIFO that is read was taken for a dead process's"
    transport.close()


def test_without_fifos_consumers_still_wake_and_poll(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(_filesystem.os, "mkfifo", refuse)
    monkeypatch.setattr(transport_module, "POLL_S", 0.05)
    transport = make(tmp_path, SystemClock())
    consumer = transport.consumer(["q"], 1)
    assert consumer.receive(1, 0.01) == []
    background = Background()
    background.start(lambda: consumer.receive(1, 30))
    transport.send([message()])
    background.join(PROMPT_S)
    transport.close()


# --- large folders -------------------------------------------------------------------------------------------


def test_a_long_queue_is_not_listed_for_each_claim(
    transport: FilesystemTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport.send([message(f"m{number:04}") for number in range(2000)])
    listed, entries = os.listdir, []

    def count(path: Any) -> list[str]:
        names = listed(path)
        entries.append(len(names))
        return names

    monkeypatch.setattr(_filesystem.os, "listdir", count)
    consumer = transport.consumer(["q"], 1)
    found = [delivery.id for _ in range(200) for delivery in consumer.receive(10, 0)]
    assert found == [f"m{number:04}" for number in range(2000)]
    assert sum(entries) < 3 * 2000, "the folder was listed again and again"


def test_an_urgent_message_passes_a_listing_made_before(transport: FilesystemTransport) -> None:
    transport.send([message(f"m{number}") for number in range(10)])
    consumer = transport.consumer(["q"], 1)
    assert [item.id for item in consumer.receive(1, 0)] == ["m0"]
    transport.send([message("urgent", priority=5)])
    assert [item.id for item in consumer.receive(2, 0)] == ["urgent", "m1"]


def test_many_delayed_messages_are_not_listed_for_each_claim(
    transport: FilesystemTransport, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_folder_reader, "_LARGE", 10)
    now = clock.time()
    # All of them in the folder that is looked at now, the rest in those of later times.
    transport.send([message(f"m{number}", not_before=now + 1 + number / 1000) for number in range(100)])
    transport.send([message("far", not_before=now + 10 * (1 << SEGMENT_BITS) / 1e6)])
    listed, entries = os.listdir, []

    def count(path: Any) -> list[str]:
        names = listed(path)
        entries.append(len(names))
        return names

    monkeypatch.setattr(_filesystem.os, "listdir", count)
    consumer = transport.consumer(["q"], 1)
    for _ in range(50):
        assert consumer.receive(10, 0) == []
    assert sum(entries) < 1000
    clock.advance(2)
    assert len(consumer.receive(1000, 0)) == 100


def test_folders_of_messages_are_removed_when_they_are_empty(
    tmp_path: Path, transport: FilesystemTransport, clock: FakeClock
) -> None:
    consumer = transport.consumer(["q"], 1)
    for _ in range(4):
        transport.send([message()])
        assert transport.settle([Settlement(item, Action.ACK) for item in consumer.receive(10, 0)]) == []
        clock.advance(3 * (1 << SEGMENT_BITS) / 1e6)
        assert consumer.receive(10, 0) == []
    assert list((tmp_path / ".dray/queue/queues/q/messages").iterdir()) == []


def test_what_is_old_is_removed(tmp_path: Path, transport: FilesystemTransport, clock: FakeClock) -> None:
    leftover = tmp_path / ".dray/queue/tmp" / f"{int(clock.time() * 1e6):016x}-left"
    leftover.write_bytes(b"half a mess")
    orphan = (
        tmp_path / ".dray/queue/queues/q/dead" / f".{int(clock.time() * 1e6):016x}-{Name(9, 1, '0' * 20, 1, '0' * 16)}"
    )
    consumer = transport.consumer(["q"], 1)
    orphan.write_bytes(b"why")

    def kill(id_: str) -> None:
        transport.send([message(id_)])
        transport.settle([Settlement(item, Action.DEAD, (), "why") for item in consumer.receive(1, 0)])

    kill("old")
    transport.bury({str(number): "revoked" for number in range(300)}, clock.time() + 100)
    clock.advance(31 * 86400)
    kill("new")
    assert [letter.id for letter in transport.dead_list(None, 10)] == ["new"]
    assert not orphan.exists()
    for _ in range(256):
        transport.bury({}, clock.time())
    assert [path for path in (tmp_path / ".dray/queue/tombstones").rglob("*") if path.is_file()] == []
    make(tmp_path, clock).close()
    assert not leftover.exists()


# --- result back end -----------------------------------------------------------------------------------------


def make_backend(tmp_path: Path, clock: Any) -> FilesystemBackend:
    backend = FilesystemBackend(FilesystemBackend.Options(), plugin_context("filesystem", clock, tmp_path))
    backend.open()
    return backend


@pytest.mark.parametrize("content", [b"", b"D\x01", b"\xff" * 30])
def test_a_damaged_result_is_unknown_and_may_be_stored_anew(
    tmp_path: Path, clock: FakeClock, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    backend = make_backend(tmp_path, clock)
    backend.store([StoredResult("r", State.SUCCESS, b"first", None)])
    [file] = (tmp_path / ".dray/results/results").glob("*/*")
    file.write_bytes(content)
    assert backend.fetch(["r"]) == {}
    assert "not readable" in caplog.text
    backend.store([StoredResult("r", State.SUCCESS, b"second", None)])
    assert backend.fetch(["r"])["r"].body == b"second"


def test_expired_results_and_groups_are_swept(tmp_path: Path, clock: FakeClock) -> None:
    backend = make_backend(tmp_path, clock)
    backend.store([StoredResult(f"r{number}", State.SUCCESS, b"", clock.time() + 60) for number in range(300)])
    backend.store([StoredResult("ever", State.SUCCESS, b"", None), StoredResult("s", State.STARTED, b"", 1.0)])
    assert not backend.arrive("g", "a", 2)
    clock.advance(31 * 86400)
    for _ in range(256):
        clock.advance(10)
        backend.store([])
    files = [path.name for path in (tmp_path / ".dray/results").rglob("*") if path.is_file()]
    assert len(files) == 1
    assert set(backend.fetch(["ever", "s", "r1"])) == {"ever"}


def test_a_result_wakes_who_waits_without_polling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "POLL_S", 60.0)
    waiting, storing = make_backend(tmp_path, SystemClock()), make_backend(tmp_path, SystemClock())
    found: list[str] = []
    background = Background()
    background.start(lambda: found.extend(waiting.wait(["r"], 30)))
    waiters = tmp_path / ".dray/results/waiters"
    deadline = time.monotonic() + PROMPT_S
    while not any(not name.startswith(".") for name in os.listdir(waiters)):
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)
    storing.store([StoredResult("other", State.SUCCESS, b"", None)])
    storing.store([StoredResult("r", State.SUCCESS, b"", None)])
    background.join(PROMPT_S)
    assert found == ["r"]
    assert os.listdir(waiters) == []
