"""What ``dray demo`` and ``dray bench`` run in their worker."""

from __future__ import annotations

import ast
import os
import warnings
from typing import Any

from dray.core.app import Dray

app = Dray()


@app.task
def survey(path: str) -> dict[str, Any]:
    """Lines, functions, classes and the longest function of one Python file; ``error`` for one that cannot be parsed.

    ``pid`` is the process that did it.
    """
    found: dict[str, Any] = {"path": path, "pid": os.getpid(), "lines": 0, "functions": 0, "classes": 0}
    try:
        with open(path, "rb") as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the files do wrong is not our business
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return found | {"error": type(error).__name__}
    longest = (0, "", 0)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found["classes"] += 1
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found["functions"] += 1
            longest = max(longest, ((node.end_lineno or node.lineno) - node.lineno + 1, node.name, node.lineno))
    return found | {"lines": len(source.splitlines()), "longest": list(longest)}


@app.task
def nothing() -> None:
    """The smallest task there is."""
