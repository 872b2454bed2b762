"""``dray new`` writes things that work as written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dray.cli import cli
from dray.cli.new import KINDS


def new(*words: str) -> str:
    result = CliRunner().invoke(cli, ["new", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_passes_its_kit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "pytest" in new("plugin", kind, "my-own")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(command, cwd=tmp_path / "dray-my-own", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_a_new_plugin_is_found_once_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    new("plugin", "pool", "mine")
    import tomllib

    project = tomllib.loads((tmp_path / "dray-mine/pyproject.toml").read_text())["project"]
    info = tmp_path / "dray-mine" / "dray_mine-0.1.0.dist-info"  # what an installer would have made
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dray-mine\nVersion: 0.1.0\n")
    ((group, entries),) = project["entry-points"].items()
    lines = [f"{name} = {target}" for name, target in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "dray-mine")}
    command = [sys.executable, "-m", "dray", "plugins", "pools"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert "dray-mine 0.1.0" in done.stdout


def test_a_new_task_module_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    new("task-module", "jobs")
    dray = [sys.executable, "-m", "dray"]
    subprocess.run([*dray, "config", "check"], check=True, capture_output=True)
    with subprocess.Popen([*dray, "worker", "--log-level", "error"], stderr=subprocess.DEVNULL) as worker:
        try:
            call = [*dray, "call", "add", "2", "3", "--timeout", "30"]
            done = subprocess.run(call, check=True, capture_output=True, text=True)
            script = subprocess.run([sys.executable, "jobs.py"], check=True, capture_output=True, text=True)
        finally:
            worker.terminate()
    assert done.stdout == "5\n"
    assert script.stdout.endswith(" 5\n")
    assert worker.returncode == 0


@pytest.mark.parametrize("words", [("task-module", "jobs"), ("plugin", "pool", "jobs")])
def test_nothing_is_overwritten(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    new(*words)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = CliRunner().invoke(cli, ["new", *words])
    assert result.exit_code == 2
    assert "there already" in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_existing_configuration_is_left_alone_and_nothing_else_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dray.yaml").write_text("name: mine\n")
    assert CliRunner().invoke(cli, ["new", "task-module", "jobs"]).exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["dray.yaml"]
