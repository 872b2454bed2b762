"""Runs the Python blocks of one page, in order and in one namespace, in the current (scratch) directory.

check_docs.py starts one process for each page. A traceback shows the page and the line in it.
"""

# ruff: noqa: S307, S603 - running what the page holds is the purpose
from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import os
import subprocess
import sys
import types
from contextlib import ExitStack
from pathlib import Path

from docblocks import Block, blocks


def write_file(block: Block, name: str) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.code, encoding="utf-8")
    if path.suffix == ".py" and block.no_run is None:
        module = ".".join(path.with_suffix("").parts)
        sys.modules.pop(module, None)
        importlib.invalidate_caches()
        importlib.import_module(module)


def run_block(block: Block, page: Path, namespace: dict[str, object]) -> None:
    source = "\n" * (block.line - 1) + block.code
    code = compile(source, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if block.no_run is None:
        outcome = eval(code, namespace)
        if inspect.iscoroutine(outcome):
            asyncio.run(outcome)


def start_worker(application: str, until: ExitStack) -> None:
    command = [str(Path(sys.executable).parent / "dray"), "worker", application]
    worker = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def stop() -> None:
        worker.terminate()
        try:
            worker.wait(20)
        except subprocess.TimeoutExpired:
            worker.kill()

    until.callback(stop)


def main(page: Path) -> None:
    sys.path.insert(0, os.getcwd())
    module = types.ModuleType("docs_page")
    sys.modules[module.__name__] = module
    with ExitStack() as until:
        for block in blocks(page):
            if block.worker:
                start_worker(block.worker, until)
            if block.file_name:
                write_file(block, block.file_name)
            elif block.language in {"python", "py"}:
                run_block(block, page, module.__dict__)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
