"""The fork server: a process that never started a thread, forked before anything was opened, and forks the children.

What was imported before it started is shared by all children, page by page. The parent makes the two channels of each
child (a socket pair for data, a pipe for tokens) and sends the child's ends along with the order to fork.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from struct import Struct
from typing import NamedTuple, NoReturn

SPAWN, KILL, END = range(1, 4)
NOT_SPAWNED, DIED = range(1, 3)
_MESSAGE = Struct("<IIii")  # what, slot, pid, status (a wait status; NOT_SPAWNED: an errno)
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_COORDINATED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that reach a whole process group; what they mean for the pool is the parent's decision."""

RunChild = Callable[[int, socket.socket, int], int]
"""``(slot, data socket, token pipe) -> exit status``: what a new child does."""


class Message(NamedTuple):
    """What the fork server tells."""

    what: int
    slot: int
    pid: int
    status: int


class ForkServer:
    """The parent's handle of the fork server."""

    def __init__(self, control: socket.socket, pid: int) -> None:
        self._control = control
        self.pid = pid
        self._reaped = False

    @classmethod
    def start(cls, run_child: RunChild) -> ForkServer:
        """Fork it. To be called before this process has a thread."""
        here, there = socket.socketpair()
        parent = os.getpid()
        flush_stdio()  # or each child writes the rest of our buffers once more
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                here.close()
                status = _Server(there, parent, run_child).serve()
            finally:
                os._exit(status)
        there.close()
        return cls(here, pid)

    def fileno(self) -> int:
        return self._control.fileno()

    def spawn(self, slot: int, data: socket.socket, tokens: int) -> None:
        """Fork a child for this slot with these ends, which are the caller's to close."""
        fds = array.array("i", [data.fileno(), tokens])
        with contextlib.suppress(OSError):  # it is dead: the end of its messages tells
            self._control.sendmsg(
                [_MESSAGE.pack(SPAWN, slot, 0, 0)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds.tobytes())]
            )

    def kill(self, slot: int) -> None:
        """SIGKILL the slot's child, if it lives. It reaps them itself, so this never hits a stranger's pid."""
        self._send(KILL, slot)

    def end(self) -> None:
        """SIGKILL and reap all children, tell so, exit."""
        self._send(END, 0)

    def messages(self) -> Iterator[Message]:
        """What it told since the last call; never blocks. Raises ``EOFError`` when it is gone."""
        while True:
            try:
                data = self._control.recv(_MESSAGE.size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if len(data) < _MESSAGE.size:
                raise EOFError
            yield Message(*_MESSAGE.unpack(data))

    def close(self) -> None:
        """Let go of it: its children and it itself end. Returns when it is reaped."""
        if not self._reaped:
            self._control.close()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self._reaped = True

    def _send(self, what: int, slot: int) -> None:
        with contextlib.suppress(OSError):
            self._control.sendall(_MESSAGE.pack(what, slot, 0, 0))


class _Server:
    """The loop inside the fork server: fork on command, reap, tell; end with everything when the parent is gone."""

    def __init__(self, control: socket.socket, parent: int, run_child: RunChild) -> None:
        self._control = control
        self._parent = parent
        self._run_child = run_child
        self._pids: dict[int, int] = {}  # pid -> slot
        self._wake_read, self._wake_write = os.pipe()

    def serve(self) -> int:
        _detach(self._parent, "dray-server")
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _ignore)
        gc.freeze()  # a collection in a child must not write to, and thereby copy, what is shared
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._wake_read:
                    os.read(self._wake_read, 4096)
                    self._reap(os.WNOHANG)
                elif not self._command():
                    return self._finish()

    def _command(self) -> bool:
        """Obey one order; False: the end."""
        data, fds, _, _ = socket.recv_fds(self._control, _MESSAGE.size, 2)
        if len(data) < _MESSAGE.size:
            return False
        what, slot, _, _ = _MESSAGE.unpack(data)
        if what == SPAWN:
            self._fork(slot, fds[0], fds[1])
        elif what == KILL:
            for pid in [pid for pid, at in self._pids.items() if at == slot]:
                os.kill(pid, signal.SIGKILL)
        return bool(what != END)

    def _fork(self, slot: int, data_fd: int, token_fd: int) -> None:
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self._tell(NOT_SPAWNED, slot, 0, error.errno or 0)
        else:
            if pid == 0:
                self._become_child(server, slot, data_fd, token_fd)
            self._pids[pid] = slot
        os.close(data_fd)
        os.close(token_fd)

    def _become_child(self, server: int, slot: int, data_fd: int, token_fd: int) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _detach(server, "dray-child")
            self._control.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            status = self._run_child(slot, socket.socket(fileno=data_fd), token_fd)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            flush_stdio()
            os._exit(status)

    def _reap(self, flags: int) -> None:
        while self._pids:
            pid, status = os.waitpid(-1, flags)
            if pid == 0:
                return
            slot = self._pids.pop(pid, None)
            if slot is not None:
                self._tell(DIED, slot, pid, status)

    def _finish(self) -> int:
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
        self._reap(0)
        return 0

    def _tell(self, what: int, slot: int, pid: int, status: int) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more: the next read sees the end
            self._control.sendall(_MESSAGE.pack(what, slot, pid, status))


def _detach(parent: int, name: str) -> None:
    """Die with the parent; handle no signal the way it did."""
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os._exit(0)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for number in _COORDINATED:
        signal.signal(number, _ignore)  # not SIG_IGN: programs that a task starts would inherit that


def _ignore(_signum: int, _frame: object) -> None:
    """A signal that is somebody else's business."""


def flush_stdio() -> None:
    """What tasks print shows while nothing runs, and is not lost when the process is ended."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
