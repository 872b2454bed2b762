"""Ids: unique, in order of time, also in forked children and threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from dray.core.clock import AddressedIds, TimeOrderedIds


def test_ids_are_unique_and_in_order_of_time() -> None:
    ids = TimeOrderedIds()
    made = [ids.new() for _ in range(5000)]
    assert len(set(made)) == 5000
    assert {len(one) for one in made} == {32}
    assert [one[:12] for one in made] == sorted(one[:12] for one in made)


def test_threads_never_draw_the_same() -> None:
    ids = TimeOrderedIds()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: ids.new(), range(20_000)))
    assert len({one[12:] for one in made}) == 20_000


def test_a_forked_child_draws_its_own() -> None:
    ids = TimeOrderedIds()
    ids.new()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, " ".join(ids.new()[12:] for _ in range(50)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        childs = set(pipe.read().split())
    os.waitpid(pid, 0)
    assert len(childs) == 50
    assert childs.isdisjoint({ids.new()[12:] for _ in range(300)})


def test_ids_can_end_with_the_address_of_their_maker() -> None:
    ids = AddressedIds(TimeOrderedIds(), "a1")
    first, second = ids.new(), ids.new()
    assert first != second
    assert first.endswith(".a1")
    assert first.count(".") == 1
