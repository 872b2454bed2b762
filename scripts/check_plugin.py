"""Builds dray's wheel and the example plugin's, installs both in a scratch environment, and uses the plugin there.

What a stranger's plugin needs: that the public modules are in the wheel, that the entry point is found, that the
conformance kit and the pytest plugin work outside of this repository.
"""

# ruff: noqa: S603, T201 - a script: it prints, and runs what this repository holds
from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
CONFIG = """
imports: [tasks]
transport: sqlite
backend: {use: dbm, path: results.dbm}
plugins: {allow: {dbm: dray-dbm}}
workers: {default: {pool: threads, size: 1}}
"""
TASKS = """
from dray import Dray
app = Dray()

@app.task
def add(x: int, y: int) -> int:
    return x + y
"""


def run(*command: str | Path, cwd: Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode:
        sys.exit(f"`{' '.join(words)}` failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dray-plugin-") as name:
        scratch = Path(name)
        source = ROOT / "examples" / "plugin"
        run(sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", scratch, ROOT, source, cwd=scratch)
        run(sys.executable, "-m", "venv", "--without-pip", scratch / "env", cwd=scratch)
        bin_ = scratch / "env" / "bin"
        (dray_wheel,), (plugin_wheel,) = scratch.glob("dray-*.whl"), scratch.glob("dray_dbm-*.whl")
        wheels = (f"{dray_wheel}[testing]", plugin_wheel)
        run(sys.executable, *PIP, "--python", bin_ / "python", "install", *wheels, cwd=scratch)
        run_a_task(bin_, scratch / "project")
        shutil.copytree(source / "tests", scratch / "tests")
        print("plugin:", run(bin_ / "python", "-m", "pytest", "-q", "tests", cwd=scratch).strip().splitlines()[-1])
    print(f"plugin: dray-dbm works with dray's wheel; {time.monotonic() - began:.0f} s")


def run_a_task(bin_: Path, project: Path) -> None:
    """A worker with the plugin that the YAML names, a call, its result."""
    project.mkdir()
    (project / "dray.yaml").write_text(CONFIG)
    (project / "tasks.py").write_text(TASKS)
    worker = subprocess.Popen([bin_ / "dray", "worker", "--log-level", "warning"], cwd=project)
    try:
        answer = run(bin_ / "dray", "call", "tasks.add", "2", "3", "--wait", "--timeout", "60", cwd=project).strip()
    finally:
        worker.terminate()
        code = worker.wait(60)
    if answer != "5" or code != 0 or not list(project.glob("results.dbm*")):
        sys.exit(f"a task over the plugin: answer {answer!r}, the worker's exit code {code}")


if __name__ == "__main__":
    main()
