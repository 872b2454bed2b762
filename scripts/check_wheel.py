"""Builds the wheel, installs it into a scratch environment without extras and proves that it works there.

What the source tree hides shows up here: a file missing from the wheel, an undeclared dependency, a wrong entry point.
"""

# ruff: noqa: S603, T201 - a script: it prints, and runs what this repository holds
from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Runs inside the scratch environment. A plugin may miss its driver only where an extra of ours installs that driver.
SMOKE = """
import re, sys
from importlib import metadata

import dray

assert dray.__file__.startswith(sys.prefix), f"not the installed package: {dray.__file__}"
files = {str(file) for file in metadata.files("dray")}
assert "dray/py.typed" in files, "the wheel has no py.typed"
optional = {re.match(r"[A-Za-z0-9_]+", line)[0] for line in metadata.requires("dray") if "extra ==" in line}
loaded = 0
for entry in metadata.distribution("dray").entry_points:
    try:
        entry.load()
        loaded += 1
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in optional:
            sys.exit(f"{entry.group}: {entry.name} = {entry.value} does not load: {error}")
print(f"wheel: {len(files)} files, {loaded} entry points load without extras")
"""


def run(*command: str | Path, cwd: Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode:
        what = "the wheel's smoke test" if SMOKE in words else f"`{' '.join(words)}`"
        sys.exit(f"{what} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    began = time.monotonic()
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    with tempfile.TemporaryDirectory(prefix="dray-wheel-") as name:
        scratch = Path(name)
        run(sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", scratch, ROOT, cwd=scratch)
        (wheel,) = scratch.glob("dray-*.whl")
        run(sys.executable, "-m", "venv", "--without-pip", scratch / "env", cwd=scratch)
        python = scratch / "env" / "bin" / "python"
        run(sys.executable, *pip, "--python", python, "install", wheel, cwd=scratch)
        print(run(python, "-c", SMOKE, cwd=scratch), end="")
        version = run(scratch / "env" / "bin" / "dray", "--version", cwd=scratch).strip()
        expected = wheel.name.split("-")[1]
        if expected not in version:
            sys.exit(f"`dray --version` says {version!r}, the wheel is {expected}")
    print(f"wheel: `dray --version` says {version!r}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
