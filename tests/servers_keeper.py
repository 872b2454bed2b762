"""Runs one server for as long as its owner lives; started by tests/servers_process.py.

    python -I -S servers_keeper.py OWNER_PID FOLDER PID_FD COMMAND...

The server gets a process group of its own. When the owner is gone, however it died, the group is killed and the folder
removed: no test run leaves a server behind. The owner's pidfd is watched, not a pipe: forked children keep a pipe open.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys


def main(owner: int, folder: str, pid_fd: int, command: list[str]) -> None:
    try:
        owner_fd = os.pidfd_open(owner)
    except ProcessLookupError:
        return
    server = os.posix_spawnp(
        command[0], command, os.environ, setsid=True, file_actions=[(os.POSIX_SPAWN_CLOSE, pid_fd)]
    )
    os.write(pid_fd, str(server).encode())
    os.close(pid_fd)
    ended = select.poll()
    ended.register(owner_fd, select.POLLIN)
    ended.register(os.pidfd_open(server), select.POLLIN)
    owner_is_gone = any(fd == owner_fd for fd, _ in ended.poll())
    try:
        os.killpg(server, signal.SIGKILL)  # with what the server left in its group
    except ProcessLookupError:
        pass
    os.waitpid(server, 0)
    if owner_is_gone:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
