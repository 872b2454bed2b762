"""What an installed distribution can do by being installed: nothing, until the configuration names its plugin."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HOSTILE = """
import os
with open(os.environ["MARK"], "a") as mark:
    mark.write(f"{__name__} was imported\\n")

from dray.core.contracts import Plugin, Pool, PoolFeatures
from dray.plugins.backends.memory import MemoryBackend
from dray.plugins.transports.memory import MemoryTransport

class Transport(MemoryTransport):
    pass

class Backend(MemoryBackend):
    pass

class Hooks(Plugin):
    api = 1
"""
KINDS = {"transports": "Transport", "backends": "Backend", "hooks": "Hooks"}
OTHERS = ("serializers", "compressors", "pools")
TASKS = """
from dray import Dray
app = Dray()

@app.task
def add(x: int, y: int) -> int:
    return x + y

@app.task(name="limited", time_limit=5)
def limited() -> None: ...
"""


class Site:
    """A folder of installed distributions, and processes that see them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = folder / "mark"
        (folder / "shop.py").write_text(TASKS)
        self.env = {
            **os.environ,
            "PYTHONPATH": str(folder / "site"),
            "MARK": str(self.mark),
            "XDG_CACHE_HOME": str(folder / "cache"),  # stevedore's: no other test's entry points
        }

    def install(self, distribution: str, name: str, *, value: str | None = None) -> None:
        """A distribution that offers ``name`` as a plugin of every kind."""
        module = distribution.replace("-", "_").replace(".", "_").lower()
        info = self.folder / "site" / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (self.folder / "site" / f"{module}.py").write_text(HOSTILE)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [
            f"[dray.{kind}]\n{name} = {value or module}:{cls}"
            for kind, cls in {**KINDS, **dict.fromkeys(OTHERS, "Transport")}.items()
        ]
        (info / "entry_points.txt").write_text("\n\n".join(lines) + "\n")

    def configure(self, text: str) -> None:
        (self.folder / "dray.yaml").write_text(textwrap.dedent(text))

    def dray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._run("-m", "dray", *arguments)

    def call(self) -> subprocess.CompletedProcess[str]:
        """Send a task, run it in a worker's steps, read its result."""
        return self._run(
            "-c",
            "import shop; from dray.testing import InlineWorker\n"
            "result = shop.add.delay(1, 2); print(shop.app.transport.context.name, shop.app.hooks is not None)\n"
            "with InlineWorker(shop.app) as worker: print(shop.add.delay(1, 2).get())",
        )

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=60
        )

    @property
    def imported(self) -> bool:
        return self.mark.exists()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


ORDINARY = "transport: memory\nbackend: memory\nimports: [shop]\n"


def test_a_plugin_that_is_not_named_is_not_imported(site: Site) -> None:
    site.install("hostile", "hostile")
    site.configure(ORDINARY)
    done = site.call()
    assert done.stdout == "memory True\n3\n", done.stderr
    for arguments in (["doctor"], ["config", "show"], ["config", "check"], ["worker", "--help"]):
        done = site.dray(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    assert not site.imported


def test_a_worker_that_cannot_start_imports_no_other_plugin_to_say_so(site: Site) -> None:
    site.install("hostile", "hostile")
    site.configure(ORDINARY + "workers: {default: {pool: solo}}\n")
    done = site.dray("worker", "shop:app")
    assert done.returncode != 0
    assert "Pools that can: prefork" in done.stderr
    assert not site.imported


@pytest.mark.parametrize("key", ["transport", "backend", "hooks"])
def test_the_one_that_is_named_is_imported(site: Site, key: str) -> None:
    """The proof that the tests above would see it."""
    site.install("hostile", "hostile")
    settings = {"transport": "memory", "backend": "memory", "hooks": "[]"}
    settings[key] = "[hostile]" if key == "hooks" else "hostile"
    site.configure("".join(f"{name}: {value}\n" for name, value in settings.items()))
    site.call()
    assert site.mark.read_text() == "hostile was imported\n"


# --- plugins.allow -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "allow", "message"),
    [
        ("transport: hostile", "{}", "dray.transports comes from Hostile-Dist, and plugins.allow does not list it"),
        ("transport: hostile", "{hostile: good-dist}", "takes it from 'good-dist' only"),
        ("transport: memory\nhooks: [hostile]", "{other: x}", "dray.hooks comes from Hostile-Dist"),
        ("transport: memory\nbackend: {use: hostile}", "{}", "dray.backends comes from Hostile-Dist"),
        ("transport: memory\nserializer: hostile", "{}", "dray.serializers comes from Hostile-Dist"),
        ("transport: memory\naccept: [json, hostile]", "{}", "dray.serializers comes from Hostile-Dist"),
        ("transport: memory\ncompression: hostile", "{}", "dray.compressors comes from Hostile-Dist"),
        ("transport: memory", "{memory: good-dist}", "comes from dray, and plugins.allow takes it from 'good-dist'"),
    ],
)
def test_a_plugin_that_is_not_allowed_is_refused_unimported(site: Site, chosen: str, allow: str, message: str) -> None:
    site.install("Hostile-Dist", "hostile")
    site.configure(f"{chosen}\nplugins: {{allow: {allow}}}\n")
    done = site.call()
    assert done.returncode != 0
    assert "PluginRefused: dray.yaml:" in done.stderr or "PluginRefused: the plugin" in done.stderr, done.stderr
    assert message in done.stderr
    assert not site.imported


def test_the_command_line_refuses_it_too(site: Site) -> None:
    site.install("hostile", "hostile")
    site.configure("transport: hostile\nhooks: [hostile]\nworkers: {default: {pool: hostile}}\nplugins: {allow: {}}\n")
    for arguments in (["doctor"], ["config", "check"], ["worker", "shop:app"], ["worker", "--pool", "hostile"]):
        done = site.dray(*arguments)
        assert done.returncode != 0, arguments
        assert "plugins.allow does not list it" in " ".join((done.stdout + done.stderr).split()), (arguments, done)
    site.dray("config", "show")
    assert not site.imported


def test_one_that_the_code_names_is_refused(site: Site) -> None:
    site.install("hostile", "hostile")
    site.configure(ORDINARY + "plugins: {allow: {}}\n")
    done = site._run("-c", "import shop; shop.add.options(serializer='hostile').delay(1, 2)")
    assert "plugins.allow does not list it" in done.stderr
    assert not site.imported


def test_one_that_is_listed_with_its_distribution_is_used(site: Site) -> None:
    site.install("Hostile.Dist", "hostile")
    site.configure("transport: hostile\nbackend: memory\nplugins: {allow: {hostile: hostile-dist}}\n")
    done = site.call()
    assert done.stdout == "hostile True\n3\n", done.stderr


@pytest.mark.parametrize("allow", ["", "plugins: {allow: {twice: first}}\n"])
def test_a_name_that_is_offered_twice_is_refused(site: Site, allow: str) -> None:
    site.install("first", "twice")
    site.install("second", "twice")
    site.configure(f"transport: twice\nbackend: memory\n{allow}")
    done = site.call()
    assert done.returncode != 0
    assert "PluginConflict" in done.stderr
    assert "first (first:Transport)" in done.stderr
    assert "second (second:Transport)" in done.stderr
    assert not site.imported


def test_nobody_can_take_the_name_of_one_of_ours(site: Site) -> None:
    site.install("hostile", "json")
    site.configure(ORDINARY)
    done = site.call()
    assert "PluginConflict" in done.stderr
    assert not site.imported
