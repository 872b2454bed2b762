"""The fenced code blocks of a Markdown page, with the comments that say how they are checked.

``<!-- no-run: reason -->`` before a block: it is only compiled.
``<!-- worker: tasks:app -->``: from here to the end of the page a worker runs ``tasks:app``.
A first line ``# some/file.py`` names the file that the block is written to before it is imported.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^\s*(`{3,}|~{3,})\s*([\w+-]*)")
COMMENT = re.compile(r"^\s*<!--\s*(no-run|worker):\s*(.+?)\s*-->\s*$")
FILE_NAME = re.compile(r"^# ([\w./-]+\.(?:py|ya?ml|toml))$")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block. ``line`` is that of its first line of code."""

    language: str
    code: str
    line: int
    no_run: str | None = None
    """Why it is not run; None: it is."""
    worker: str | None = None
    """The application whose worker is started before this block."""

    @property
    def file_name(self) -> str | None:
        first, *_ = self.code.split("\n", 1)
        named = FILE_NAME.match(first.strip())
        return named[1] if named else None


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    said: dict[str, str] = {}
    index = 0
    while index < len(lines):
        line = lines[index]
        index += 1
        if comment := COMMENT.match(line):
            said[comment[1]] = comment[2]
        elif fence := FENCE.match(line):
            start = index
            while index < len(lines) and not lines[index].strip().startswith(fence[1]):
                index += 1
            code = textwrap.dedent("\n".join(lines[start:index])) + "\n"
            index += 1
            yield Block(fence[2].lower(), code, start + 1, said.pop("no-run", None), said.pop("worker", None))
        elif line.strip() and "no-run" in said:
            raise SystemExit(f"{page}:{index}: `<!-- no-run -->` belongs directly before a code block")


def prose(page: Path) -> str:
    """The page without its code: fenced blocks and inline code blanked, line numbers kept."""
    out = []
    fence = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if fence:
            fence = "" if line.strip().startswith(fence) else fence
            out.append("")
        elif opened := FENCE.match(line):
            fence = opened[1]
            out.append("")
        else:
            out.append(re.sub(r"`[^`]*`", "", line))
    return "\n".join(out)
