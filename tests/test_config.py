"""The configuration: sources and their precedence, errors with file and line, ``show``, the JSON Schema."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dray.core import config, plugins, sources
from dray.core.config import CompressionConfig, Config, PluginChoice, QueueConfig, choices, load
from dray.core.contracts import Durability, Secret
from dray.core.errors import ConfigError
from dray.core.masking import MASK
from dray.core.schema import json_schema
from dray.core.show import show

FULL = """
name: shop
imports: [shop.tasks]
transport: amqp://guest:hush@localhost:5672/
backend: {use: redis, url: "${REDIS_URL}", prefix: shop}
serializer: json
accept: [json, msgpack]
compression: {use: zlib, over: 16KiB, level: 9}
queues: {mail: {max_deliveries: 7}}
default_queue: work
routes: {"shop.mail.*": mail}
workers:
  default: {queues: [work, mail], pool: prefork, size: 4}
  io: {pool: {use: gevent, size: 200}}
hooks: [prometheus, {use: tracing, rate: 0.1}]
require_durability: D3
result_expires: 12h
tasks: {time_limit: 1m, track_started: yes}
"""

BOMB = "a: &a [x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi"))

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes ``dray.yaml`` and returns its folder."""

    def write(text: str | bytes, name: str = "dray.yaml") -> Path:
        data = text if isinstance(text, bytes) else textwrap.dedent(text).encode()
        (tmp_path / name).write_bytes(data)
        return tmp_path

    return write


def test_without_a_file_the_embedded_default(tmp_path: Path) -> None:
    found = load(environ={}, cwd=tmp_path)
    assert (found.transport, found.backend, found.serializer) == tuple(map(PluginChoice, ("sqlite", "sqlite", "json")))
    assert (found.accept, found.base, found.path) == (("json",), tmp_path, None)
    assert {name: (worker.queues, worker.pool) for name, worker in found.workers.items()} == {
        "default": (("default",), PluginChoice("prefork"))
    }
    assert found.origin("transport") == "default"


def test_a_whole_file(write: Write) -> None:
    folder = write(FULL)
    found = load(environ={"REDIS_URL": "redis://r/1"}, cwd=folder)
    assert found.transport == PluginChoice("amqp", {"url": "amqp://guest:hush@localhost:5672/"})
    assert found.backend == PluginChoice("redis", {"url": "redis://r/1", "prefix": "shop"})
    assert found.compression == CompressionConfig(PluginChoice("zlib", {"level": 9}), 16384)
    assert found.queues == {"mail": QueueConfig(7)}
    assert found.routes == {"shop.mail.*": "mail"}
    default, io = found.workers["default"], found.workers["io"]
    assert (default.name, default.queues, default.pool) == (
        "default",
        ("work", "mail"),
        PluginChoice("prefork", {"size": 4}),
    )
    assert (io.name, io.queues, io.pool) == ("io", ("work",), PluginChoice("gevent", {"size": 200}))
    assert found.hooks == (PluginChoice("prometheus"), PluginChoice("tracing", {"rate": 0.1}))
    assert (found.require_durability, found.result_expires) == (Durability.D3, 43200.0)
    assert (found.tasks.time_limit, found.tasks.track_started) == (60.0, True)
    assert (found.base, found.path) == (folder, folder / "dray.yaml")
    assert found.origin("workers.io.pool.size") == "dray.yaml:14"
    assert [path for _, path, _ in choices(found)] == [
        "transport", "backend", "serializer", "compression", "workers.default", "workers.io", "hooks.0", "hooks.1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "null", "{}", "\ufeff", "transport:\nworkers: {}\n", "\ufeffname: dray\n"]
)
def test_an_empty_file_is_all_defaults_without_results(write: Write, text: str) -> None:
    found = load(environ={}, cwd=write(text.encode()))
    assert (found.name, found.transport.use, found.backend.use) == ("dray", "sqlite", "null")
    assert list(found.workers) == ["default"]


def test_the_file_is_found_in_a_parent_and_named_from_there(write: Write) -> None:
    folder = write("queues: 5")
    below = folder / "a" / "b"
    below.mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        load(environ={}, cwd=below)
    assert str(caught.value) == f"{folder / 'dray.yaml'}:1: queues: expected a mapping, got 5"


def test_dray_config_names_another_file(write: Write) -> None:
    folder = write("name: other", "other.yaml")
    assert load(environ={"DRAY_CONFIG": "other.yaml"}, cwd=folder).name == "other"
    assert load(environ={"DRAY_CONFIG": "nonesuch.yaml"}, source=folder / "other.yaml", cwd=folder).name == "other"


def test_code_wins_over_the_environment_and_that_over_the_file(write: Write) -> None:
    folder = write("name: file\nresult_expires: 1h\nresult_store_timeout: 1s\n")
    environ = {"DRAY_RESULT_EXPIRES": "2h", "DRAY_RESULT_STORE_TIMEOUT": "2", "HOME": "x", "DRAY_LOG_LEVEL": "x"}
    found = load({"result_store_timeout": 3}, environ=environ, cwd=folder)
    assert (found.name, found.result_expires, found.result_store_timeout) == ("file", 7200.0, 3.0)
    assert [found.origin(name) for name in ("name", "result_expires", "result_store_timeout", "imports")] == [
        "dray.yaml:1", "environment DRAY_RESULT_EXPIRES", "code", "default",
    ]  # fmt: skip


def test_the_environment_reaches_into_workers_and_plugins(write: Write) -> None:
    folder = write(
        "workers: {io: {pool: threads, size: 2, queues: [a]}}\ntransport: {use: redis, url: redis://a, db: 1}"
    )
    environ = {
        "DRAY_WORKERS__IO__SIZE": "8",
        "DRAY_WORKERS__IO__QUEUES": "b,c",
        "DRAY_TRANSPORT__URL": "redis://b",
        "DRAY_TRANSPORT__PASSWORD": "123",
        "DRAY_QUEUES": "{mail: {max_deliveries: 2}}",
    }
    found = load(environ=environ, cwd=folder)
    assert found.workers["io"].queues == ("b", "c")
    assert found.workers["io"].pool.options["size"].value == 8  # type: ignore[attr-defined]
    assert found.transport == PluginChoice("redis", {"url": "redis://b", "db": 1, "password": "123"})
    assert found.queues == {"mail": QueueConfig(2)}


@pytest.mark.parametrize(
    ("below", "above", "result"),
    [
        ("{use: redis, db: 1}", {"use": "redis"}, PluginChoice("redis", {"db": 1})),
        ("{use: redis, db: 1}", {"db": 2}, PluginChoice("redis", {"db": 2})),
        ("{use: redis, db: 1}", "memory", PluginChoice("memory")),
        ("{use: redis, db: 1}", "amqp://h", PluginChoice("amqp", {"url": "amqp://h"})),
        ("redis://h", {"db": 2}, PluginChoice("redis", {"url": "redis://h", "db": 2})),
        ("redis://h", {"url": "amqp://h"}, PluginChoice("amqp", {"url": "amqp://h"})),
        ("redis://h", {"use": "memory"}, PluginChoice("memory")),
        ("[redis://h, redis://i]", {"db": 2}, PluginChoice("redis", {"url": ["redis://h", "redis://i"], "db": 2})),
        ("[redis://h, redis://i]", {"url": ["amqp://h"]}, PluginChoice("amqp", {"url": ["amqp://h"]})),
        ("{url: [redis://h], db: 1}", ["redis://i"], PluginChoice("redis", {"url": ["redis://i"], "db": 1})),
    ],
)
def test_options_are_merged_unless_another_plugin_is_named(
    write: Write, below: str, above: Any, result: object
) -> None:
    assert load({"transport": above}, environ={}, cwd=write(f"transport: {below}")).transport == result


def test_several_urls_from_the_environment(tmp_path: Path) -> None:
    found = load(environ={"DRAY_TRANSPORT": "[amqp://a, amqp://b]"}, cwd=tmp_path)
    assert found.transport == PluginChoice("amqp", {"url": ["amqp://a", "amqp://b"]})
    with pytest.raises(ConfigError, match=r"environment DRAY_TRANSPORT: transport: expected .* a URL"):
        load(environ={"DRAY_TRANSPORT": "[amqp://a, b]"}, cwd=tmp_path)


def test_accept_is_what_the_serializer_makes(tmp_path: Path) -> None:
    assert load({"serializer": "pickle"}, environ={}, cwd=tmp_path).accept == ("pickle",)
    signed = {"use": "signed", "inner": "msgpack"}
    assert load({"serializer": signed}, environ={}, cwd=tmp_path).accept == ("signed", "msgpack")
    assert load({"serializer": signed, "accept": ["json"]}, environ={}, cwd=tmp_path).accept == ("json",)


def test_the_compressors_that_are_accepted(tmp_path: Path) -> None:
    ours = ("zlib", "gzip", "bzip2", "lzma", "zstd")
    for compression, accept in (
        (None, ours),
        ("zlib", ours),
        ("brotli", (*ours, "brotli")),
        ({"use": "zlib", "accept": ["zlib"]}, ("zlib",)),
        ({"accept": []}, ()),
    ):
        assert load({"compression": compression}, environ={}, cwd=tmp_path).compression.accept == accept


def test_a_mapping_as_source_is_a_configuration(tmp_path: Path) -> None:
    found = load({"name": "b"}, source={"name": "a", "default_queue": "q"}, environ={}, cwd=tmp_path)
    assert (found.name, found.default_queue, found.backend.use, found.base) == ("b", "q", "null", tmp_path)
    assert found.workers["default"].queues == ("q",)


def test_a_module_as_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"settings_{tmp_path.name.replace('-', '_')}"
    text = "import os\nfrom textwrap import dedent\nUPPER = _private = 1\nname = 'module'\nqueues = {'mail': {}}\n"
    (tmp_path / f"{name}.py").write_text(text)
    found = load(source=name, environ={}, cwd=tmp_path)
    assert (found.name, found.queues, found.path) == ("module", {"mail": QueueConfig()}, None)
    assert found.origin("queues.mail") == f"{name}:5"


def test_a_module_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"wrong_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}_a.py").write_text("nmae = 'x'\n")
    (tmp_path / f"{name}_b.py").write_text("import nonesuch_x\n")
    for source, says in (
        (f"{name}_a", f"{name}_a:1: nmae: unknown key; did you mean 'name'?"),
        (f"{name}_b", "failed: ModuleNotFoundError: No module named 'nonesuch_x'"),
        (f"{name}.nonesuch", "there is neither such a file nor such a module"),
        ("nonesuch.yaml", "nonesuch.yaml: cannot read the configuration: No such file or directory"),
        (Path("nonesuch"), "nonesuch: cannot read the configuration: No such file or directory"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(source=source, environ={}, cwd=tmp_path)
        assert str(caught.value).endswith(says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: x\ntransprot: x", "dray.yaml:2: transprot: unknown key; did you mean 'transport'?"),
        ("queues:\n  mail:\n    max_deliverys: 3", "dray.yaml:3: queues.mail.max_deliverys: unknown key; did you mean"),
        ("queues: {mail: {max_deliveries: 0}}", "queues.mail.max_deliveries: 0 is too small, the least is 1"),
        ("queues: {mail: {max_deliveries: '5'}}", "queues.mail.max_deliveries: expected a whole number, got '5'"),
        ("queues: []", "dray.yaml:1: queues: expected a mapping, got []"),
        ("name: 5", "dray.yaml:1: name: expected text, got 5"),
        ("imports: shop.tasks", "dray.yaml:1: imports: expected a list, got 'shop.tasks'"),
        ("imports:\n- a\n- 5\n", "dray.yaml:3: imports.1: expected text, got 5"),
        ("result_expires: 5 parsecs", 'result_expires: \'5 parsecs\' is no length of time; write 30, "30s"'),
        ("message_max: -1", 'dray.yaml:1: message_max: -1 is no number of bytes; write 4096, "512B"'),
        ("require_durability: D7", "require_durability: expected D0 or D1 or D2 or D3 or D4, got 'D7'"),
        ("default_queue: ''", "dray.yaml:1: default_queue: a name must not be empty"),
        ('queues: {"a\\tb": {}}', "holds characters that cannot be printed"),
        (f"workers: {{{'w' * 201}: {{}}}}", "a name has at most 200 characters, this one has 201"),
        ("routes: {a: 5}", "routes.a: expected text, got 5"),
        ("workers: {a: 5}", "dray.yaml:1: workers.a: expected a mapping, got 5"),
        ("workers: []", "dray.yaml:1: workers: expected a mapping, got []"),
        ("workers: 5", "dray.yaml:1: workers: expected a mapping, got 5"),
        ("workers: {a: {pool: 5}}", "workers.a.pool: expected a plugin's name, a URL or a mapping with 'use', got 5"),
        ("workers: {a: {queues: x}}", "workers.a.queues: expected a list, got 'x'"),
        ("tasks: {soft_time_limit: 2m, time_limit: 1m}", "tasks: soft_time_limit is longer than time_limit"),
        ("transport: {path: x}", "dray.yaml:1: transport: which plugin? add 'use: NAME'"),
        ("hooks: prometheus", "dray.yaml:1: hooks: expected a list, got 'prometheus'"),
        ("compression: {level: 9}", "compression.level: unknown key"),
        ("compression: 5", "dray.yaml:1: compression: expected a mapping, got 5"),
        ("name: a\nqueues: {}\nname: b", "dray.yaml:3: name: given twice, first at dray.yaml:1"),
        ("queues:\n  a: {}\n  a: {}", "dray.yaml:3: queues.a: given twice, first at dray.yaml:2"),
        ("- name", "dray.yaml:1: expected settings as 'key: value', got a list"),
        ("\n\nname", "dray.yaml:3: expected settings as 'key: value', got a single value"),
        ("name: [", "this is not YAML: "),
        ("a: b: c", "dray.yaml:1: this is not YAML: mapping values are not allowed"),
        ("queues:\n\tmail: {}", "dray.yaml:2: this is not YAML: "),
        ("queues:\n\tmail: {}", "indent with spaces, YAML takes no tabs"),
        ("name: a\n---\nname: b", "this is not YAML: "),
        ("name: *nope", "dray.yaml:1: this is not YAML: found undefined alias"),
        ("name: \x01", "dray.yaml: this is not YAML: "),
        ("name: !!python/object/apply:os.system [x]", "dray.yaml:1: name: the tag tag:yaml.org,2002:python/object"),
        ("queues: !mine {}", "dray.yaml:1: queues: the tag !mine is not supported"),
        ("? [a]\n: b", "dray.yaml:1: a key has to be a word"),
        ("? {a: b}\n: b", "a key has to be a word"),
        ("<<: 5", "'<<' takes a mapping, or a list of mappings"),
        ("queues: &a\n  x: *a", "an alias that contains itself"),
        ("imports: " + "[" * 65 + "]" * 65, "dray.yaml:1: nested more than 64 deep"),
        ("name: " + "[" * 100_000, "dray.yaml:1: nested more than 64 deep"),
        (BOMB, "more than 20000 values; do its aliases multiply?"),
        ("name: x\nbackend: redis://${NOPE}", "dray.yaml:2: backend: the environment variable NOPE is not set; set it"),
        ("name: ${EMPTY}", "the environment variable EMPTY is not set"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_told_with_its_line(write: Write, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ={"EMPTY": ""}, cwd=write(text))
    assert str(caught.value).startswith("dray.yaml:")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("name: x".encode("utf-16"), "dray.yaml: the file is UTF-16 or UTF-32; save it as UTF-8"),
        ("name: x".encode("utf-16-le"), "dray.yaml: the file is UTF-16 or UTF-32; save it as UTF-8"),
        ("name: x".encode("utf-32"), "dray.yaml: the file is UTF-16 or UTF-32; save it as UTF-8"),
        (b"queues: {}\nname: caf\xe9", "dray.yaml:2: the file is not UTF-8 (unexpected end of data); save it as UTF-8"),
        (b"#" * (2**20 + 1), "dray.yaml: the configuration is larger than 1048576 bytes"),
        (b"name: \x00x", "dray.yaml: this is not YAML: unacceptable character"),
    ],
)
def test_bytes_that_are_no_text(write: Write, data: bytes, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ={}, cwd=write(data))
    assert str(caught.value).startswith(says)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "conf.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"^conf\.yaml: this is a directory; name the YAML file in it$"):
        load(source="conf.yaml", environ={}, cwd=tmp_path)


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"DRAY_TRANSPROT": "x"}, "environment DRAY_TRANSPROT: transprot: unknown key; did you mean 'transport'?"),
        ({"DRAY_RESULT_EXPIRES": "soon"}, "environment DRAY_RESULT_EXPIRES: result_expires: 'soon' is no length"),
        (
            {"DRAY_QUEUES__MAIL__MAX_DELIVERIES": "many"},
            "queues.mail.max_deliveries: expected a whole number, got 'many'",
        ),
        ({"DRAY_QUEUES": "{"}, "environment DRAY_QUEUES: queues: expected a mapping, got '{'"),
        ({"DRAY_TASKS__TRACK_STARTED": "maybe"}, "tasks.track_started: expected true or false, got 'maybe'"),
        ({"DRAY_": "x"}, "environment DRAY_: this names no setting"),
        ({"DRAY_NAME": "a\x1b[31m"}, "environment DRAY_NAME: name: the name 'a\\x1b[31m' holds characters"),
    ],
)
def test_a_mistake_in_the_environment_is_told_with_its_variable(
    tmp_path: Path, environ: dict[str, str], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ=environ, cwd=tmp_path)
    assert says in str(caught.value)


@pytest.mark.parametrize("settings", [{"nmae": "x"}, {"name": 5}, {"queues": {"a": {"max_deliveries": -1}}}, {5: 5}])
def test_a_mistake_in_code_says_so(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"^code: "):
        load(settings, environ={}, cwd=tmp_path)


def test_references_to_the_environment(write: Write) -> None:
    folder = write("""
        name: "a-${NAME}-${OTHER:-b}"
        message_max: ${MAX:-8KiB}
        result_store_timeout: ${WAIT}
        tasks: {track_started: "${YES}"}
        imports: ${IMPORTS}
    """)
    environ = {"NAME": "5", "WAIT": "7", "IMPORTS": "[a, b]", "YES": "yes"}
    with pytest.raises(ConfigError, match="track_started: expected true or false, got 'yes'"):
        load(environ=environ, cwd=folder)
    found = load({"tasks": {"track_started": True}}, environ=environ, cwd=folder)
    assert (found.name, found.message_max, found.result_store_timeout) == ("a-5-b", 8192, 7.0)
    assert found.imports == ("a", "b")


def test_anchors_aliases_and_merge_keys(write: Write) -> None:
    folder = write("""
        workers:
          a: &base {queues: [x], pool: threads, size: 4}
          b: {<<: *base, size: 8}
          c: {<<: [{size: 1}, *base], pool: solo}
    """)
    workers = load(environ={}, cwd=folder).workers
    assert [(worker.queues, worker.pool.use, worker.pool.options["size"]) for worker in workers.values()] == [
        (("x",), "threads", 4), (("x",), "threads", 8), (("x",), "solo", 1),
    ]  # fmt: skip


@given(st.text(max_size=60) | st.text(alphabet="{}[]:,-&*a \n\t'\"|>#!%@0.$~?<", max_size=60))
def test_any_text_is_settings_or_our_error(text: str) -> None:
    try:
        plain, origins = sources.flatten(sources.from_yaml(text, "f.yaml", {}))
    except ConfigError as error:
        assert str(error).startswith("f.yaml")
    else:
        assert isinstance(plain, dict)
        assert all(origin.startswith("f.yaml") for origin in origins.values())


WORDS = st.text(st.characters(categories=["L", "N", "P", "S"], include_characters=" \n\t\\")).filter(
    lambda text: "${" not in text
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.decimals(-9, 9, places=3).map(float) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS.filter(bool), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(WORDS.filter(bool), JSON, max_size=5))
def test_json_is_read_as_it_is(value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False)
    assert sources.flatten(sources.from_yaml(text, "f.yaml", {}))[0] == value


# --- show --------------------------------------------------------------------------------------------------


def rows(found: Config) -> dict[str, tuple[object, str]]:
    return {row.path: (row.value, row.origin) for row in show(found)}


def test_show_tells_every_value_and_its_origin(write: Write) -> None:
    folder = write(
        "transport: memory\ncompression: {use: zlib, level: 3}\nqueues: {mail: {}}\nworkers: {a: {pool: solo}}\n"
    )
    shown = rows(load({"require_durability": "D1"}, environ={"DRAY_RESULT_EXPIRES": "1h"}, cwd=folder))
    assert shown["transport.use"] == ("memory", "dray.yaml:1")
    assert shown["compression.use"] == ("zlib", "dray.yaml:2")
    assert shown["compression.level"] == (3, "dray.yaml:2")
    assert shown["compression.over"] == (8192, "default")
    assert shown["queues.mail.max_deliveries"] == (5, "default")
    assert shown["routes"] == ({}, "default")
    assert shown["result_expires"] == (3600.0, "environment DRAY_RESULT_EXPIRES")
    assert shown["require_durability"] == ("D1", "code")
    assert shown["workers.a.pool"] == ("solo", "dray.yaml:4")
    assert shown["workers.a.queues"] == (["default"], "default")
    json.dumps(shown)


def test_show_hides_secrets_even_of_plugins_that_cannot_be_used(write: Write) -> None:
    folder = write("""
        transport: nonesuch://user:canary@host/?token=canary
        backend: {use: nonesuch, password: canary, nested: {any: [canary], n: 5}}
    """)
    settings = show(load(environ={"DRAY_TRANSPORT__API_KEY": "canary"}, cwd=folder))
    assert "canary" not in repr(settings)
    shown = {row.path: row for row in settings}
    assert shown["transport.url"].value == f"nonesuch://user:{MASK}@host/?token={MASK}"
    assert shown["transport.use"].origin == "dray.yaml:2"
    assert shown["transport.use"].problem is not None
    assert "no plugin 'nonesuch'" in shown["transport.use"].problem
    assert shown["backend.nested"].value == {"any": [MASK], "n": MASK}


@dataclass(frozen=True, slots=True)
class Peppered:
    pepper: Secret = ""
    ring: Mapping[str, Secret] = field(default_factory=dict)
    other: Secret | None = None


def test_show_hides_options_that_are_typed_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = type("Peppered", (), {"Options": Peppered})
    monkeypatch.setattr(plugins, "load", lambda kind, name, allow: plugin)
    transport = {"use": "peppered", "pepper": "canary", "ring": {"a": "canary"}}
    settings = show(load({"transport": transport}, environ={}, cwd=tmp_path))
    assert "canary" not in repr(settings)
    shown = {row.path: row.value for row in settings}
    assert shown["transport.pepper"] == MASK
    assert shown["transport.ring"] == {"a": MASK}
    assert shown["transport.other"] is None


# --- JSON Schema -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validator() -> Any:
    document = json_schema()
    jsonschema.Draft202012Validator.check_schema(document)
    return jsonschema.Draft202012Validator(json.loads(json.dumps(document)))


def test_the_schema_takes_what_is_right(validator: Any) -> None:
    for text in (FULL, "{}", "compression: zlib", "compression: {over: 1MB}", "workers: {a: }",
                 "message_max: ${MAX}", "result_expires: 90", "transport: {use: nonesuch, x: 1}"):  # fmt: skip
        validator.validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text",
    [
        "nmae: x",
        "name: 5",
        "name: ''",
        "imports: a",
        "result_expires: soon",
        "result_expires: -1",
        "message_max: 5 parsecs",
        "queues: {mail: {max_deliveries: 0}}",
        "queues: {mail: {max: 1}}",
        "require_durability: D9",
        "transport: 5",
        "transport: {use: memory, nonesuch: 1}",
        "transport: {path: x}",
        "compression: {use: zlib, levle: 1}",
        "compression: {use: zlib, level: high}",
        "workers: {a: {pool: threads, sise: 4}}",
        "workers: {a: {queues: x}}",
        "tasks: {track_started: 5}",
        "hooks: x",
    ],
)
def test_the_schema_refuses_what_is_wrong(validator: Any, text: str) -> None:
    assert not validator.is_valid(yaml.safe_load(text))


def test_the_schema_explains_each_setting(validator: Any) -> None:
    properties = validator.schema["properties"]
    assert set(properties) == set(config.settings())
    assert all(shape["description"] for shape in properties.values())
    assert properties["result_store_timeout"]["default"] == 60.0


def test_without_a_file_a_caller_below_finds_the_folder_of_its_worker(tmp_path: Path) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert load(environ={}, cwd=below).base == below
    (tmp_path / ".dray").mkdir()
    assert load(environ={}, cwd=below).base == tmp_path
