"""The report of the conformance kits: what it says, how it is merged, how it is shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from dray.core import plugins
from dray.core.plugins import PluginInfo
from dray.testing import KIT_VERSION, report

MODULE = """
import os
from dray.core.contracts import NoOptions
from dray.plugins.backends.memory import MemoryBackend
from dray.plugins.serializers.json import JsonSerializer
from dray.testing import ResultBackendConformance, SerializerConformance, plugin_context

class Expires(MemoryBackend):
    def fetch(self, ids):
        if "BROKEN" in os.environ:
            return {key: self._results[key] for key in ids if key in self._results}
        return super().fetch(ids)

class TestMine(ResultBackendConformance):
    def make(self, clock):
        return Expires(NoOptions(), plugin_context("mine", clock))

class TestJson(SerializerConformance):
    def make(self):
        return JsonSerializer(JsonSerializer.Options(), plugin_context("json"))
"""


def run(folder: Path, *arguments: str, **environment: str) -> dict[str, dict[str, Any]]:
    """Run the kits over two plugins; the report by the plugin's name."""
    (folder / "test_mine.py").write_text(MODULE)
    target = folder / "report" / "conformance.json"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py", *arguments],
        cwd=folder,
        env={**clean, "DRAY_CONFORMANCE_REPORT": str(target), **environment},
        capture_output=True,
        timeout=110,
    )
    return {record["name"]: record for record in report.read(target)}


def test_a_report_is_merged_over_processes_and_runs(tmp_path: Path) -> None:
    found = run(tmp_path, "-n", "2")
    mine, json_ = found["mine"], found["json"]
    assert (mine["kind"], mine["distribution"], mine["kit"]) == ("backends", None, KIT_VERSION)
    assert (json_["distribution"], json_["version"]) == ("dray", distribution("dray").version)
    assert mine["proven"] == ["barrier", "contract", "keeps", "push"]
    assert mine["undeclared"] == ["durable", "shared"]
    assert (mine["unproven"], mine["failed"]) == ({}, 0)
    assert json_["proven"] == ["contract", "rich", "safe"]

    broken = run(tmp_path, "-k", "TestMine and (expire or wait)", BROKEN="1")
    assert broken["json"] == json_
    assert broken["mine"]["failed"] == 2
    assert "test_an_expired_state_that_is_not_terminal_is_gone" in broken["mine"]["unproven"]["keeps"]
    assert "contract" in broken["mine"]["unproven"], "what did not run is not proven"


def test_our_report_tells_of_all_our_plugins() -> None:
    for kind in plugins.KINDS.keys() - {"hooks"}:
        for info in plugins.available(kind):
            if info.distribution != "dray":
                continue
            record = report.find(info)
            assert record is not None, f"{kind}: {info.name} is not in the report; run `make conformance`"
            assert (record["unproven"], record["failed"]) == ({}, 0)
            assert record["kit"] == KIT_VERSION, "the kit changed since; run `make conformance`"


def test_a_plugin_ships_its_report_beside_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "their_plugin"
    package.mkdir()
    (package / "__init__.py").touch()
    record = {"kind": "transports", "name": "theirs", "distribution": "their-plugin", "proven": ["contract"]}
    (package / "conformance.json").write_text(json.dumps({"plugins": [record]}))
    monkeypatch.syspath_prepend(str(tmp_path))

    def info(name: str, distribution_: str) -> PluginInfo:
        return PluginInfo(name, "transports", distribution_, "1", "their_plugin.transport:Theirs", None, None)

    assert report.find(info("theirs", "their-plugin")) == record
    assert report.find(info("theirs", "another")) is None
    assert report.find(info("other", "their-plugin")) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plugins": 3}', '{"plugins": [3]}', "\xff"])
def test_what_is_no_report_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "conformance.json").write_text(text, "latin-1")
    assert report.read(tmp_path / "conformance.json") == []


def test_the_command_shows_it() -> None:
    command = [sys.executable, "-m", "dray", "plugins", "transports", "serializers", "--conformance"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith((" transports", " serializers"))}
    assert "atomic then" in rows["sqlite"]
    assert f"dray {distribution('dray').version}" in rows["sqlite"]
    assert KIT_VERSION in rows["sqlite"]
    assert rows["rediss"].split()[4:] == rows["redis"].split()[4:], "another name of the same class"
    printed = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, timeout=60).stdout
    shown = {row["name"]: row["conformance"] for row in json.loads(printed)}
    assert shown["signed"]["proven"] == ["contract"]
    assert "leases" in shown["memory"]["proven"]
