"""The chaos proxy, between a client and a small echo server. What happens is waited for, never slept for."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from dray.testing import ChaosProxy, Trouble

PATIENCE_S = 20.0


class Echo:
    """Sends back what it gets, and keeps a copy; counts how its connections ended."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.received = bytearray()
        self.ends: list[str] = []
        self.ended = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.settimeout(PATIENCE_S)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        end = "eof"
        try:
            with connection:
                while data := connection.recv(65_536):
                    self.received += data
                    connection.sendall(data)
        except ConnectionError:
            end = "reset"
        self.ends.append(end)
        self.ended.release()

    def wait_for_end(self) -> str:
        assert self.ended.acquire(timeout=PATIENCE_S), "the connection to the server did not end"
        return self.ends[-1]

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(PATIENCE_S)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[ChaosProxy]:
    with ChaosProxy(echo.address, seed=7) as proxy:
        yield proxy


def connect(proxy: ChaosProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE_S)


def read(client: socket.socket, size: int) -> bytes:
    """``size`` bytes, or what comes before the end."""
    data = b""
    while len(data) < size:
        piece = client.recv(size - len(data))
        if not piece:
            break
        data += piece
    return data


def ping(client: socket.socket) -> None:
    """Make sure that it is connected all the way: the kernel accepts before the proxy does."""
    client.sendall(b"p")
    assert read(client, 1) == b"p"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_silent(client: socket.socket) -> bool:
    """Nothing came, and the connection stands."""
    client.settimeout(0.05)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    finally:
        client.settimeout(PATIENCE_S)
    return False


def test_without_trouble_everything_passes(proxy: ChaosProxy, echo: Echo) -> None:
    data = bytes(range(256)) * 2000
    with connect(proxy) as client:
        sender = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
        sender.start()
        assert read(client, len(data) + 1) == data
        sender.join(PATIENCE_S)
    assert echo.wait_for_end() == "eof"
    assert (proxy.connections, proxy.bytes_up, proxy.bytes_down) == (1, len(data), len(data))


def test_latency_and_jitter_hold_back(proxy: ChaosProxy) -> None:
    proxy.set(latency=0.05, jitter=0.02)
    with connect(proxy) as client:
        began = time.monotonic()
        client.sendall(b"x")
        assert read(client, 1) == b"x"
        assert time.monotonic() - began >= 2 * (0.05 - 0.02)


def test_rate_holds_back(proxy: ChaosProxy) -> None:
    proxy.set(rate=20_000, slice=100)
    with connect(proxy) as client:
        began = time.monotonic()
        client.sendall(b"x" * 2000)
        read(client, 2000)
        assert time.monotonic() - began >= 0.1


@pytest.mark.parametrize("after", [0, 1, 5, 10])
def test_a_cut_on_the_way_up(proxy: ChaosProxy, echo: Echo, after: int) -> None:
    proxy.set(cut_up_after=after, swallow_down=True)
    with connect(proxy) as client:
        client.sendall(b"0123456789")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert echo.wait_for_end() in ("eof", "reset")
    assert bytes(echo.received) == b"0123456789"[:after]
    assert proxy.trouble.cut_up_after is None


def test_a_cut_on_the_way_down(proxy: ChaosProxy, echo: Echo) -> None:
    proxy.set(cut_down_after=4)
    with connect(proxy) as client:
        client.sendall(b"0123456789")
        assert read(client, 10) == b"0123"
    echo.wait_for_end()
    assert bytes(echo.received) == b"0123456789"
    with connect(proxy) as client:  # once
        client.sendall(b"again")
        assert read(client, 5) == b"again"


def test_a_cut_counts_over_pieces(proxy: ChaosProxy, echo: Echo) -> None:
    proxy.set(cut_up_after=4, slice=3)
    with connect(proxy) as client:
        client.sendall(b"0123456789")
        echo.wait_for_end()
    assert bytes(echo.received) == b"0123"


def test_swallowed_replies(proxy: ChaosProxy, echo: Echo) -> None:
    proxy.set(swallow_down=True)
    with connect(proxy) as client:
        client.sendall(b"obeyed")
        until(lambda: bytes(echo.received) == b"obeyed")
        assert is_silent(client)
        proxy.heal()
        client.sendall(b"heard")
        assert read(client, 5) == b"heard"


def test_swallowed_requests(proxy: ChaosProxy, echo: Echo) -> None:
    proxy.set(swallow_up=True)
    with connect(proxy) as client:
        client.sendall(b"lost")
        assert is_silent(client)
        proxy.heal()
        client.sendall(b"kept")
        assert read(client, 4) == b"kept"
    assert bytes(echo.received) == b"kept"


def test_half_open_from_the_start(proxy: ChaosProxy, echo: Echo) -> None:
    proxy.set(stall=True)
    with connect(proxy) as client:
        client.sendall(b"waits")
        assert is_silent(client)
        assert bytes(echo.received) == b""
        proxy.set(stall=False)
        assert read(client, 5) == b"waits"


def test_half_open_in_the_middle(proxy: ChaosProxy, echo: Echo) -> None:
    with connect(proxy) as client:
        client.sendall(b"one")
        assert read(client, 3) == b"one"
        proxy.set(stall=True)
        client.sendall(b"two")
        client.shutdown(socket.SHUT_WR)
        assert is_silent(client)
        assert echo.ends == []
        proxy.heal()
        assert read(client, 4) == b"two"
    assert echo.wait_for_end() == "eof"


def test_refusal(proxy: ChaosProxy, echo: Echo) -> None:
    with connect(proxy) as standing:
        ping(standing)
        proxy.set(refuse=True)
        with pytest.raises(ConnectionResetError), connect(proxy) as client:
            client.recv(1)
        standing.sendall(b"x")
        assert read(standing, 1) == b"x"
    proxy.heal()
    with connect(proxy) as client:
        client.sendall(b"y")
        assert read(client, 1) == b"y"


def test_a_target_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = nobody.getsockname()
    with ChaosProxy(address) as proxy, pytest.raises(ConnectionResetError), connect(proxy) as client:
        client.recv(1)


def test_single_bytes(proxy: ChaosProxy) -> None:
    proxy.set(slice=1)
    with connect(proxy) as client:
        client.sendall(b"abc" * 100)
        assert read(client, 300) == b"abc" * 100


def flipped(echo: Echo, seed: int) -> bytes:
    with ChaosProxy(echo.address, seed=seed) as proxy:
        proxy.set(corrupt=0.01, swallow_down=True)
        before = len(echo.received)
        with connect(proxy) as client:
            client.sendall(b"\0" * 20_000)
            until(lambda: len(echo.received) == before + 20_000)
        return bytes(echo.received[before:])


def test_flipped_bits_are_one_a_byte_and_decided_by_the_seed(echo: Echo) -> None:
    first = flipped(echo, 1)
    changed = [byte for byte in first if byte]
    assert 100 < len(changed) < 320
    assert all(byte.bit_count() == 1 for byte in changed)
    assert flipped(echo, 1) == first
    assert flipped(echo, 2) != first


def test_reset_all_resets_both_sides(proxy: ChaosProxy, echo: Echo) -> None:
    with connect(proxy) as client:
        client.sendall(b"x")
        read(client, 1)
        proxy.reset_all()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert echo.wait_for_end() == "reset"


def test_a_client_that_resets_is_passed_on(proxy: ChaosProxy, echo: Echo) -> None:
    client = connect(proxy)
    client.sendall(b"x")
    read(client, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    echo.wait_for_end()


def test_a_name_that_is_no_trouble(proxy: ChaosProxy) -> None:
    with pytest.raises(TypeError, match=r"no such trouble: blackhole; there is .*stall"):
        proxy.set(blackhole=True)
    proxy.set(latency=1)
    proxy.set(rate=5)
    assert proxy.trouble == Trouble(latency=1, rate=5)


def test_it_leaks_nothing(echo: Echo) -> None:
    def once() -> None:
        with ChaosProxy(echo.address) as proxy:
            clients = [connect(proxy) for _ in range(5)]
            for client in clients:
                ping(client)
            proxy.set(stall=True)
            clients += [connect(proxy)]
            for client in clients:
                client.sendall(b"x" * 100)
        for client in clients:
            client.close()
        proxy.stop()  # again

    once()
    until(lambda: len(echo.ends) >= 5)
    process = psutil.Process()
    before = process.num_fds()
    for _ in range(5):
        once()
    until(lambda: process.num_fds() <= before)
    assert not any("chaos" in thread.name for thread in threading.enumerate())


def test_stop_before_start() -> None:
    proxy = ChaosProxy(("127.0.0.1", 1))
    proxy.stop()
    with pytest.raises(RuntimeError, match="does not run"):
        proxy.set(latency=1)
