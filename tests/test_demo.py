"""``dray demo`` on small input, with a real worker."""

from __future__ import annotations

import email
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dray.cli import cli, demo
from dray.cli.demo_tasks import survey


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Enough files that both children are busy half-way, and some that cannot be parsed."""
    for number in range(150):
        (tmp_path / f"m{number}.py").write_text("class A:\n" + "    def f(self): ...\n" * (number + 1))
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "nul.py").write_bytes(b"x = 1\0\n")
    (tmp_path / "latin.py").write_bytes(b"name = '\xe9'\n")
    (tmp_path / "declared.py").write_bytes(b"# coding: latin-1\nname = '\xe9'\n")
    (tmp_path / "empty.py").touch()
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").touch()
    return tmp_path


def test_a_child_is_killed_and_the_totals_agree(sources: Path) -> None:
    result = run("demo", str(sources), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["agree"] is True
    assert found["tasks"] == found["plain"]
    assert found["tasks"]["files"] == 155
    assert found["tasks"]["unparsable"] == 3
    assert found["tasks"]["functions"] == sum(range(1, 151))
    assert found["tasks"]["classes"] == 150
    assert found["killed_pid"] > 1
    with pytest.raises(ProcessLookupError):
        os.kill(found["killed_pid"], 0)


def test_people_see_what_happens() -> None:
    folder = str(Path(email.__file__).parent)
    result = run("demo", folder, "--no-kill", "--size", "1")
    assert result.exit_code == 0, result.output
    assert "every task ran; totals agree" in result.stdout
    assert "the longest function: " in result.stdout
    assert "killed" not in result.output
    assert "tasks queued in" in result.stderr


def test_totals_that_differ_are_told(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "survey", lambda path: survey(path) | {"lines": 7})
    monkeypatch.setattr(demo.survey, "name", survey.name, raising=False)
    monkeypatch.setattr(demo.survey, "fn", survey.fn, raising=False)
    result = run("demo", str(sources), "--no-kill", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["agree"] is False
    assert "the totals do not agree" in result.stderr


def test_survey_finds_the_longest_function(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text("def short(): ...\n\nasync def long():\n    await x\n    return 1\n\nclass C: ...\n")
    found = survey(str(file))
    assert found["longest"] == [3, "long", 3]
    assert (found["lines"], found["functions"], found["classes"]) == (7, 2, 1)
    assert survey(str(tmp_path / "absent.py"))["error"] == "FileNotFoundError"


def test_the_environment_does_not_change_the_demo(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAY_TRANSPORT", "memory")
    assert run("demo", str(sources), "--no-kill", "--json").exit_code == 0
    assert os.environ["DRAY_TRANSPORT"] == "memory"


def test_a_worker_that_dies_is_told(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TARGET", "dray.cli.demo_tasks:absent")
    monkeypatch.setattr(demo, "LOOK_S", 0.2)
    result = run("demo", str(sources))
    assert result.exit_code == 1
    assert "the worker ended with code 2" in result.stderr
    assert "has no 'absent'" in result.stderr
