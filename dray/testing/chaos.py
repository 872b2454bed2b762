"""A TCP proxy that makes trouble: what a network, a crashed broker or a bad cable do, switched at run time."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
CHUNK = 65_536
START_S = 10.0
FLUSH_S = 1.0
RESET, NO_RESET = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)
"""What closing does to unsent data: drop it and send RST, or send it and FIN."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What a :class:`ChaosProxy` does. Up is from the client to the target, down is back. Times in seconds."""

    latency: float = 0.0
    """Each piece of data is held back for this long."""
    jitter: float = 0.0
    """Up to this much more or less than ``latency``, at random."""
    rate: int = 0
    """Bytes a second, for each direction of each connection; 0: as fast as it goes."""
    slice: int = 0
    """Data goes on in pieces of this many bytes: 1 finds every parser that takes a segment for a message."""
    corrupt: float = 0.0
    """The share of bytes of which one bit is flipped, 0 to 1."""
    cut_up_after: int | None = None
    """When this many more bytes have gone up (over all connections) that connection is cut, once: the target gets
    exactly these and then the end of the stream, the client a reset."""
    cut_down_after: int | None = None
    """The same for bytes that go down: the client gets exactly these and then the end, the target a reset."""
    swallow_up: bool = False
    """What comes from clients is read and thrown away: requests are lost."""
    swallow_down: bool = False
    """What comes from the target is read and thrown away: requests are obeyed, confirmations are lost."""
    stall: bool = False
    """Half-open: connections are accepted and kept, and nothing moves until this is over. What came in time waits."""
    refuse: bool = False
    """New connections are reset, as if nobody listened."""


class ChaosProxy:
    """Stands on the loopback interface between a client and ``target``, and lets through what it is told to.

    ::

        with ChaosProxy(("127.0.0.1", 6379)) as proxy:
            transport = MyTransport(Options(url=f"mine://127.0.0.1:{proxy.port}"), context)
            proxy.set(latency=0.02, jitter=0.01, rate=64_000)    # a slow link
            proxy.set(cut_up_after=137)                          # reset after 137 more bytes of request
            proxy.set(swallow_down=True)                         # the confirmation is lost
            proxy.heal()                                         # no more trouble, what was kept goes on
            proxy.reset_all()                                    # RST on every open connection

    See :class:`Trouble` for all that can be set; ``set`` keeps what it does not name. One background thread carries
    everything; leaving the block (or :meth:`stop`) resets what is open and ends it. ``seed`` decides every random
    choice; with one connection and the same bytes the same bits flip. All methods may be called from any thread.
    """

    def __init__(self, target: tuple[str, int], *, seed: int = 0) -> None:
        self.target = target
        self.port = 0
        """Where clients connect, on 127.0.0.1; the same for the whole life of the proxy."""
        self.connections = 0
        """How many were accepted so far, refused ones included."""
        self.bytes_up = 0
        self.bytes_down = 0
        """What was forwarded so far: how a test finds the places worth cutting at."""
        self._trouble = Trouble()
        self._random = random.Random(seed)
        self._links: set[_Link] = set()
        self._handlers: dict[asyncio.Task[None], socket.socket] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._listener: socket.socket | None = None

    # --- life ----------------------------------------------------------------------------------------------

    def start(self) -> ChaosProxy:
        """Listen. Raises ``OSError``."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dray-chaos", daemon=True)
        self._thread.start()
        self._call(self._listen())
        return self

    def stop(self) -> None:
        """Reset every connection and let go of everything. Idempotent, safe before :meth:`start`."""
        if self._loop is not None and self._thread is not None:
            self._call(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(START_S)
            self._loop.close()
            self._loop = None

    def __enter__(self) -> ChaosProxy:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- trouble -------------------------------------------------------------------------------------------

    @property
    def trouble(self) -> Trouble:
        """What is set now."""
        return self._trouble

    def set(self, **changes: Any) -> None:
        """Change some of the :class:`Trouble`; in force for all connections when this returns."""
        known = {field.name for field in fields(Trouble)}
        if unknown := changes.keys() - known:
            raise TypeError(f"no such trouble: {', '.join(sorted(unknown))}; there is {', '.join(sorted(known))}")
        self._call(self._apply(replace(self._trouble, **changes)))

    def heal(self) -> None:
        """No more trouble. What was swallowed is lost, what was kept goes on."""
        self._call(self._apply(Trouble()))

    def reset_all(self) -> None:
        """Reset (RST) every connection that is open now, on both sides."""
        self._call(self._reset_all())

    # --- the thread's side ---------------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            work.close()
            raise RuntimeError("the proxy does not run: use it in a with block, or start() it")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_S)

    async def _listen(self) -> None:
        # No asyncio server: one that is closed while it accepts leaves a socket open.
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def _close(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        for task in self._handlers:
            task.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)
        await asyncio.sleep(0)  # transports close their sockets in the loop's next round

    async def _apply(self, trouble: Trouble) -> None:
        self._trouble = trouble
        self._changed.set()
        self._changed = asyncio.Event()

    async def _reset_all(self) -> None:
        for link in list(self._links):
            link.reset()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            self.connections += 1
            task = asyncio.get_running_loop().create_task(self._serve(sock))
            self._handlers[task] = sock
            task.add_done_callback(lambda task: self._handlers.pop(task).close())  # also one that never began

    async def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            if self._trouble.refuse:
                return
            there = await asyncio.open_connection(*self.target)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_RESET)
            try:
                here = await asyncio.open_connection(sock=sock)
            except BaseException:  # the client is gone already, or the proxy ends
                there[1].transport.abort()
                raise
            link = _Link(self, here, there)
            self._links.add(link)
            try:
                await link.carry()
            finally:
                self._links.discard(link)

    async def pieces(self, data: bytes) -> AsyncIterator[bytes]:
        """``data`` as it goes on: in time, in slices, with flipped bits."""
        size = self._trouble.slice or len(data)
        for at in range(0, len(data), size):
            piece = data[at : at + size]
            trouble = self._trouble
            pause_s = trouble.latency + self._random.uniform(-trouble.jitter, trouble.jitter) if at == 0 else 0.0
            if trouble.rate:
                pause_s += len(piece) / trouble.rate
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            await self.moving()
            yield self._corrupted(piece)

    async def moving(self) -> None:
        """Wait until nothing stalls."""
        while self._trouble.stall:
            await self._changed.wait()

    def allowed(self, size: int, *, up: bool) -> int | None:
        """How many of ``size`` bytes still pass before a cut; None: all, and no cut."""
        left = self._trouble.cut_up_after if up else self._trouble.cut_down_after
        if left is None:
            return None
        rest = None if left <= size else left - size
        self._trouble = replace(self._trouble, cut_up_after=rest) if up else replace(self._trouble, cut_down_after=rest)
        return left if rest is None else None

    def _corrupted(self, data: bytes) -> bytes:
        share = self._trouble.corrupt
        if not share:
            return data
        flip, bit = self._random.random, self._random.randrange
        return bytes(byte ^ (1 << bit(8)) if flip() < share else byte for byte in data)


class _Link:
    """One client's connection and the one to the target that goes with it."""

    def __init__(
        self,
        proxy: ChaosProxy,
        here: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        there: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._proxy = proxy
        self._here, self._there = here, there

    async def carry(self) -> None:
        """Move bytes both ways until both sides are done, or one is broken."""
        ways = (self._pipe(self._here[0], self._there[1], up=True), self._pipe(self._there[0], self._here[1], up=False))
        try:
            await asyncio.gather(*ways)
            for _, writer in (self._here, self._there):
                await _close(writer)
        finally:
            self.reset()

    def reset(self) -> None:
        for _, writer in (self._here, self._there):
            _reset(writer)

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        proxy = self._proxy
        try:
            while data := await reader.read(CHUNK):
                async for piece in proxy.pieces(data):
                    trouble = proxy.trouble
                    if trouble.swallow_up if up else trouble.swallow_down:
                        continue
                    limit = proxy.allowed(len(piece), up=up)
                    passing = piece if limit is None else piece[:limit]
                    if up:
                        proxy.bytes_up += len(passing)
                    else:
                        proxy.bytes_down += len(passing)
                    writer.write(passing)
                    await writer.drain()
                    if limit is not None:
                        await self._cut(self._here[1] if up else self._there[1], writer)
                        return
            await proxy.moving()  # while nothing moves, the end of a stream does not either
            if writer.can_write_eof():
                writer.write_eof()
        except OSError:
            self.reset()  # what breaks one side breaks the other

    async def _cut(self, sender: asyncio.StreamWriter, receiver: asyncio.StreamWriter) -> None:
        _reset(sender)
        await _close(receiver)


async def _close(writer: asyncio.StreamWriter) -> None:
    """Close once what was written is on its way."""
    writer.close()
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(FLUSH_S):
            await writer.wait_closed()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN, as a process that was killed with unread data does."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
