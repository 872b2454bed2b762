"""Plugins by name: look-up, the errors, options, instances. The plugins here are real distributions on a path."""

from __future__ import annotations

import itertools
import logging
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dray.core import plugins
from dray.core.clock import SystemClock
from dray.core.contracts import PluginContext
from dray.core.errors import (
    ConfigError,
    PluginConflict,
    PluginDriverMissing,
    PluginError,
    PluginImportFailed,
    PluginIncompatible,
    PluginNotFound,
)
from dray.core.options import Loose, Where
from dray.core.plugins import PluginChoice

GOOD = """
from dataclasses import dataclass
from dray.core.contracts import Compressor, NoOptions
from dray.core.errors import ConfigError

class Good(Compressor):
    api = 1
    name = "good"

    @dataclass(frozen=True, slots=True)
    class Options:
        level: int = 6

    def __init__(self, options, context):
        super().__init__(options, context)
        if options.level > 9:
            raise ConfigError("level goes up to 9")

    def compress(self, data):
        return data

    def decompress(self, data, max_bytes):
        return data

class Newer(Good):
    api = 2

class Older(Good):
    api = 0

class Unversioned(Compressor):
    name = "x"

class Partial(Compressor):
    api = 1
    name = "x"

    def compress(self, data):
        return data

class Foreign:
    api = 1

function = len
"""

TWO_EXTRAS = """Provides-Extra: all
Provides-Extra: fast
Requires-Dist: nodriver-x>=3; extra == 'all'
Requires-Dist: other; extra == 'all'
Requires-Dist: nodriver-x>=3; extra == 'fast'
"""

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution with one module and its entry points; returns the module's name."""
    import stevedore._cache
    from stevedore.extension import ExtensionManager

    cache = stevedore._cache.Cache(str(tmp_path / "cache"))
    monkeypatch.setattr(stevedore._cache, "get_group_all", cache.get_group_all)
    numbers = itertools.count()

    def install(
        source: str,
        *entries: str,
        kind: str = "compressors",
        name: str = "dray-example",
        metadata: str = "",
    ) -> str:
        number = next(numbers)
        module = f"example_{tmp_path.name.replace('-', '_')}_{number}"
        site = tmp_path / f"site{number}"
        info = site / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n{metadata}")
        lines = [entry.replace("MODULE", module) for entry in entries]
        (info / "entry_points.txt").write_text("\n".join([f"[dray.{kind}]", *lines, ""]))
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setattr(ExtensionManager, "ENTRY_POINT_CACHE", {})
        return module

    return install


def context(name: str) -> PluginContext:
    return PluginContext(name, logging.getLogger("test"), SystemClock(), random.Random(1), Path())


def test_the_named_plugin_is_loaded_and_no_other(install: Install) -> None:
    other = install("raise SystemExit('imported')", "other = MODULE:Other")
    module = install(GOOD, "good = MODULE:Good")
    assert plugins.load("compressors", "good").__module__ == module
    assert other not in sys.modules


def test_one_of_our_own_loads_without_the_others() -> None:
    code = (
        "import sys; from dray.core import plugins; plugins.load('serializers', 'json');"
        "print([m for m in sys.modules if m.startswith('dray.plugins.') and m.count('.') == 3])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['dray.plugins.serializers.json']"


@pytest.mark.parametrize("module", ["config", "hooks", "plugins", "options", "sources"])
def test_importing_the_core_loads_no_heavy_library(module: str) -> None:
    code = (
        f"import sys, dray.core.{module};"
        "print([m for m in ('yaml', 'stevedore', 'pluggy', 'importlib.metadata') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_suggests_the_nearest(install: Install) -> None:
    install(GOOD, "good = MODULE:Good")
    with pytest.raises(PluginNotFound, match=r"no plugin 'goood' in dray\.compressors; did you mean 'good'\?"):
        plugins.load("compressors", "goood")


def test_an_unknown_name_that_is_an_extra_names_the_pip_line() -> None:
    with pytest.raises(PluginNotFound, match=r'try: pip install "dray\[signed\]"'):
        plugins.load("transports", "signed")
    with pytest.raises(PluginNotFound) as caught:
        plugins.load("transports", "nonesuch")
    assert "pip install" not in str(caught.value)


def test_an_unknown_kind() -> None:
    with pytest.raises(PluginNotFound, match="did you mean 'transports'"):
        plugins.load("transport", "memory")


@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        ("", "pip install nodriver_x"),
        (
            TWO_EXTRAS,
            'pip install "dray-example[fast]"',
        ),
        ("Provides-Extra: mine\n", 'pip install "dray-example[mine]"'),
    ],
)
def test_a_missing_driver_names_the_pip_line(install: Install, metadata: str, line: str) -> None:
    install("import nodriver_x.client", "mine = MODULE:Mine", metadata=metadata)
    with pytest.raises(PluginDriverMissing) as caught:
        plugins.load("compressors", "mine")
    assert "the plugin 'mine' needs 'nodriver_x', which is not installed" in str(caught.value)
    assert str(caught.value).endswith(f"run: {line}")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def", "SyntaxError"),
        ("import dray.core.nonesuch", "No module named 'dray.core.nonesuch'"),
        ("from json import nonesuch", "cannot import name 'nonesuch'"),
        ("", "AttributeError"),
    ],
)
def test_a_failing_import_chains_its_cause(install: Install, source: str, says: str) -> None:
    install(source, "mine = MODULE:Mine")
    with pytest.raises(PluginImportFailed, match=r"importing the plugin 'mine' \(example_.*:Mine\) failed") as caught:
        plugins.load("compressors", "mine")
    assert says in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("Newer", "speaks plugin interface 2, this dray speaks 1; upgrade dray"),
        ("Older", "speaks plugin interface 0, this dray speaks 1; upgrade the plugin"),
        ("Unversioned", "states no version of the plugin interface (`api`), this dray speaks 1; upgrade the plugin"),
    ],
)
def test_another_version_of_the_interface_says_which_side_to_upgrade(install: Install, target: str, says: str) -> None:
    install(GOOD, f"mine = MODULE:{target}")
    with pytest.raises(PluginIncompatible) as caught:
        plugins.load("compressors", "mine")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "target", "says"),
    [
        ("compressors", "Partial", "does not implement decompress of Compressor"),
        ("compressors", "Foreign", "does not derive from dray.core.contracts.Compressor"),
        ("serializers", "Good", "does not derive from dray.core.contracts.Serializer or Signer"),
        ("compressors", "function", "is no class"),
    ],
)
def test_a_class_that_is_no_such_plugin(install: Install, kind: str, target: str, says: str) -> None:
    install(GOOD, f"mine = MODULE:{target}", kind=kind)
    with pytest.raises(PluginError) as caught:
        plugins.load(kind, "mine")
    assert says in str(caught.value)


def test_two_distributions_with_one_name_are_a_conflict(install: Install) -> None:
    first = install("raise SystemExit('imported')", "good = MODULE:Good", name="first-dist")
    second = install("raise SystemExit('imported')", "good = MODULE:Good", name="second-dist")
    with pytest.raises(PluginConflict) as caught:
        plugins.load("compressors", "good")
    for part in (f"first-dist ({first}:Good)", f"second-dist ({second}:Good)", "uninstall all but one"):
        assert part in str(caught.value)
    problems = {info.distribution: info.error for info in plugins.available("compressors") if info.name == "good"}
    assert set(problems) == {"first-dist", "second-dist"}
    assert all("is offered by" in str(problem) for problem in problems.values())


def test_a_stale_cache_of_stevedore_does_not_matter(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from stevedore.extension import ExtensionManager

    module = install(GOOD, "good = MODULE:Good")
    stale = EntryPoint("good", "example_gone:Good", "dray.compressors")
    monkeypatch.setattr(ExtensionManager, "ENTRY_POINT_CACHE", {"dray.compressors": [stale]})
    assert plugins.load("compressors", "good").__module__ == module
    monkeypatch.setattr(ExtensionManager, "ENTRY_POINT_CACHE", {"dray.compressors": []})
    assert plugins.load("compressors", "good").__module__ == module


def test_make_builds_options_and_context(install: Install) -> None:
    install(GOOD, "good = MODULE:Good")
    made = plugins.make("compressors", PluginChoice("good", {"level": 3}), context)
    assert (made.options.level, made.context.name, made.compress(b"x")) == (3, "good", b"x")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lvel": 3}, "dray.yaml:7: compression.lvel: unknown key; did you mean 'level'?"),
        ({"level": "3"}, "dray.yaml:7: compression.level: expected a whole number, got '3'"),
        ({"level": 10}, "dray.yaml:7: compression: level goes up to 9"),
    ],
)
def test_make_says_where_the_mistake_is(install: Install, options: dict[str, object], says: str) -> None:
    install(GOOD, "good = MODULE:Good")
    where = Where("compression", {"compression": "dray.yaml:7"})
    with pytest.raises(ConfigError) as caught:
        plugins.make("compressors", PluginChoice("good", options, where), context)
    assert str(caught.value) == says


def test_a_plugin_that_is_not_there_is_told_with_its_place() -> None:
    where = Where("transport", {"transport": "dray.yaml:2"})
    with pytest.raises(PluginNotFound, match=r"^dray\.yaml:2: transport: no plugin 'memry' .*did you mean 'memory'"):
        plugins.make("transports", PluginChoice("memry", {}, where), context)


def test_available_lists_origin_features_and_errors(install: Install) -> None:
    module = install(GOOD + "\nGood.features = 'all'\n", "good = MODULE:Good", "newer = MODULE:Newer")
    infos = {info.name: info for info in plugins.available("compressors")}
    good, newer = infos["good"], infos["newer"]
    assert (good.kind, good.distribution, good.version) == ("compressors", "dray-example", "1.2")
    assert (good.target, good.error, good.features) == (f"{module}:Good", None, "all")
    assert newer.error is not None
    assert "upgrade dray" in newer.error
    assert newer.features is None
    assert infos["zlib"].distribution == "dray"
    assert list(infos) == sorted(infos)


@pytest.mark.parametrize(
    ("raw", "use", "options"),
    [
        ("sqlite", "sqlite", {}),
        ("sqlite:///x.db", "sqlite", {"url": "sqlite:///x.db"}),
        ("AMQP+TLS://h", "amqp+tls", {"url": "AMQP+TLS://h"}),
        ({"use": "redis", "db": 1}, "redis", {"db": 1}),
        ({"url": "redis://h"}, "redis", {"url": "redis://h"}),
        ({"use": "mine", "url": "redis://h"}, "mine", {"url": "redis://h"}),
        (Loose("redis://h", "redis://h"), "redis", {"url": "redis://h"}),
        (Loose("{use: redis}", {"use": "redis"}), "redis", {}),
    ],
)
def test_forms_of_a_choice(raw: object, use: str, options: dict[str, object]) -> None:
    assert PluginChoice.from_raw(raw, Where("transport")) == PluginChoice(use, options)


@pytest.mark.parametrize("raw", [5, None, [], True, {}, {"url": 5}, {"url": "no-scheme"}, {"use": 5}, {"use": " "}, ""])
def test_no_choice(raw: object) -> None:
    with pytest.raises(ConfigError, match=r"^transport"):
        PluginChoice.from_raw(raw, Where("transport"))


def test_a_choice_does_not_show_its_options() -> None:
    assert "hush" not in repr(PluginChoice.from_raw("amqp://guest:hush@host/", Where("transport")))
