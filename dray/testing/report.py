"""What the conformance kits proved, as a JSON file: written by their tests, read by ``dray plugins --conformance``.

With ``DRAY_CONFORMANCE_REPORT=path`` each run of the kits replaces there what earlier runs said of the plugins that it
tested; runs spread over processes by pytest-xdist are merged. The author of a plugin ships the file as
``conformance.json`` beside the plugin's module; dray's own lies in this folder.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dray.testing import KIT_VERSION

if TYPE_CHECKING:
    import pytest

    from dray.core.plugins import PluginInfo
    from dray.testing.kit import Conformance

VARIABLE = "DRAY_CONFORMANCE_REPORT"
FILE_NAME = "conformance.json"
CONTRACT = "contract"
"""The name under which a report tells of the tests that need no ability."""
_RECORDER = "dray-conformance"
_WORST_LAST = ("not applicable", "passed", "failed")

Record = dict[str, Any]
"""What is known of one plugin."""


# --- reading -----------------------------------------------------------------------------------------------


def read(path: Path) -> list[Record]:
    """The records of a report; none if there is no such file, or it is no report."""
    try:
        records = json.loads(path.read_text("utf-8"))["plugins"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [record for record in records if isinstance(record, dict)] if isinstance(records, list) else []


def find(info: PluginInfo) -> Record | None:
    """What is proven of an installed plugin, by the report that its distribution ships."""
    module = info.target.partition(":")[0]
    for folder in (*_folder_of(module.rpartition(".")[0] or module), Path(__file__).parent):
        for record in read(folder / FILE_NAME):
            if (record.get("kind"), record.get("distribution")) == (info.kind, info.distribution) and (
                info.name == record.get("name") or info.target == _target(info, str(record.get("name")))
            ):
                return record
    return None


def _target(info: PluginInfo, name: str) -> str | None:
    """What another name means in the same distribution: one class may be offered under several."""
    entries = entry_points(group=f"dray.{info.kind}", name=name)
    return next((entry.value for entry in entries if entry.dist and entry.dist.name == info.distribution), None)


def _folder_of(module: str) -> Iterator[Path]:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent


# --- writing -----------------------------------------------------------------------------------------------


def note(request: pytest.FixtureRequest, kit: Conformance) -> None:
    """Called at the start of each test of a kit: its end is recorded, if a report is asked for."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    plugins = request.config.pluginmanager
    recorder = plugins.get_plugin(_RECORDER)
    if recorder is None:
        folder = request.getfixturevalue("tmp_path_factory").getbasetemp()
        recorder = Recorder(Path(path), folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)
        plugins.register(recorder, _RECORDER)
    recorder.expect(request.node.nodeid, request.function.__name__, kit)


class Recorder:
    """A pytest plugin that notes how the tests of kits end, and writes the report when the session does."""

    def __init__(self, path: Path, shared: Path) -> None:
        self._path = path
        self._shared = shared
        """A folder that all processes of this run, and no other run, see."""
        self._parts: dict[str, Record] = {}
        self._running: dict[str, tuple[Record, str]] = {}

    def expect(self, node: str, test: str, kit: Conformance) -> None:
        """The test ``node`` begins."""
        key = f"{type(kit).__module__}.{type(kit).__qualname__}"
        if key not in self._parts:
            plugin = kit.sample()
            declared = [ability for ability, is_declared in kit.abilities().items() if is_declared]
            name = str(getattr(type(plugin), "name", plugin.context.name))
            self._parts[key] = {
                "kind": kit.kind,
                "name": name,
                **_origin(kit.kind, name, type(plugin)),
                "abilities": sorted(kit.abilities()),
                "declared": declared,
                "tests": kit.kit_tests(),
                "ends": {},
            }
        self._running[node] = (self._parts[key], test)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.nodeid not in self._running or (report.when != "call" and report.passed):
            return
        part, test = self._running[report.nodeid]
        end = "not applicable" if report.skipped else report.outcome
        part["ends"][test] = _worse(part["ends"].get(test), end)

    def pytest_sessionfinish(self) -> None:
        mine = self._shared / f"{_RECORDER}-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.json"
        with open(self._shared / f"{_RECORDER}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            mine.write_text(json.dumps(list(self._parts.values())))
            parts = [part for file in self._shared.glob(f"{_RECORDER}-*.json") for part in json.loads(file.read_text())]
            _rewrite(self._path, [_record(same) for same in _grouped(parts)])


def _origin(kind: str, name: str, cls: type) -> Record:
    """The distribution that offers the plugin; none while it is not installed."""
    for entry in entry_points(group=f"dray.{kind}", name=name):
        if entry.dist is not None and entry.value == f"{cls.__module__}:{cls.__qualname__}":
            return {"distribution": entry.dist.name, "version": entry.dist.version}
    return {"distribution": None, "version": None}


def _grouped(parts: Iterable[Record]) -> list[list[Record]]:
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for part in parts:
        groups.setdefault((part["kind"], part["name"], str(part["distribution"])), []).append(part)
    return list(groups.values())


def _record(parts: list[Record]) -> Record:
    """What these parts say together: tests of one plugin, from several processes or classes."""
    first = parts[0]
    ends: dict[str, str] = {}
    for part in parts:
        for test, end in part["ends"].items():
            ends[test] = _worse(ends.get(test), end)
    declared = {CONTRACT, *(ability for part in parts for ability in part["declared"])}
    holes = {
        ability: sorted(
            test
            for test, needed in first["tests"].items()
            if (ability in needed or (ability == CONTRACT and not needed))
            and set(needed) <= declared
            and ends.get(test) != "passed"
        )
        for ability in declared
    }
    counts = Counter(ends.values())
    return {
        **{key: first[key] for key in ("kind", "name", "distribution", "version")},
        "kit": KIT_VERSION,
        "date": datetime.now(UTC).date().isoformat(),
        "proven": sorted(ability for ability, tests in holes.items() if not tests),
        "unproven": {ability: tests for ability, tests in sorted(holes.items()) if tests},
        "undeclared": sorted(
            name
            for name in set(first["abilities"]) - declared
            if not name.startswith("no_") and name not in ("driver_errors", "networked")
        ),
        "passed": counts["passed"],
        "failed": counts["failed"],
    }


def _worse(one: str | None, other: str) -> str:
    return other if one is None else max(one, other, key=_WORST_LAST.index)


def _rewrite(path: Path, records: list[Record]) -> None:
    """Replace the records of these plugins, keep those of others."""
    kept = {_key(record): record for record in [*read(path), *records]}
    lines = ",\n".join(json.dumps(kept[key], ensure_ascii=False) for key in sorted(kept))
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(f'{{"plugins": [\n{lines}\n]}}\n', "utf-8")
    fresh.replace(path)


def _key(record: Record) -> tuple[str, str, str]:
    return str(record.get("kind")), str(record.get("name")), str(record.get("distribution"))
