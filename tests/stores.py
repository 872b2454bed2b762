"""What goes wrong with stores that are files."""

from __future__ import annotations

import shutil
from pathlib import Path


def spoil(path: Path) -> None:
    """Put something there that is neither a folder nor a database."""
    if path.is_dir():
        shutil.rmtree(path)
    for beside in path.parent.glob(f"{path.name}-*"):  # SQLite's log: it would restore the file
        if beside.is_file():
            beside.unlink()
    garbage = path.with_name("garbage")
    garbage.write_bytes(b"this is not what it was\n" * 1000)
    garbage.replace(path)
