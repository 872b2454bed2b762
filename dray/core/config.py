"""The configuration: a YAML file or a module, then the environment, then code, as one frozen :class:`Config`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from dray.core import options, plugins, sources
from dray.core.contracts import Durability, Seconds, Size
from dray.core.masking import shown
from dray.core.options import Count, Name, Where
from dray.core.plugins import PluginChoice
from dray.core.sources import Node

__all__ = [
    "CompressionConfig",
    "Config",
    "PluginChoice",
    "PluginPolicy",
    "QueueConfig",
    "TaskDefaults",
    "WorkerConfig",
    "choices",
    "load",
    "settings",
]

FILE_NAMES = ("dray.yaml", "dray.yml")

TransportChoice = Annotated[PluginChoice, "transports"]
BackendChoice = Annotated[PluginChoice, "backends"]
SerializerChoice = Annotated[PluginChoice, "serializers"]
CompressorChoice = Annotated[PluginChoice, "compressors"]
PoolChoice = Annotated[PluginChoice, "pools"]
HookChoice = Annotated[PluginChoice, "hooks"]

_COMPRESSORS = ("zlib", "gzip", "bzip2", "lzma", "zstd")
_DEFAULT_POOL = PluginChoice("prefork")


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """One entry under ``queues``."""

    max_deliveries: Count = 5
    """How often a message is handed out without being settled before it is put among the dead letters."""


@dataclass(frozen=True, slots=True)
class TaskDefaults:
    """What holds for every task that does not say otherwise."""

    soft_time_limit: Seconds | None = None
    """After this time ``SoftTimeLimitExceeded`` is raised in the task."""
    time_limit: Seconds | None = None
    """After this time the process that runs the task is killed."""
    track_started: bool = False
    """Store the state STARTED: a write for each task."""
    ignore_result: bool = False
    """Store no results."""

    def __post_init__(self) -> None:
        if self.soft_time_limit is not None and self.time_limit is not None and self.soft_time_limit > self.time_limit:
            raise ValueError("soft_time_limit is longer than time_limit")


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One entry under ``workers``: one worker process."""

    KEYS: ClassVar = ("queues", "pool")
    name: Name
    queues: tuple[Name, ...] = ("default",)
    """The queues that it takes from, the preferred one first."""
    pool: PoolChoice = _DEFAULT_POOL
    """What runs the tasks. Every other key of the entry is an option of this plugin."""

    @classmethod
    def from_raw(cls, raw: object, where: Where) -> WorkerConfig:
        own, rest = _split(raw, where, cls.KEYS)
        pool = _with_options(own.pop("pool", _DEFAULT_POOL), rest, where, "pool")
        name = where.path.partition(".")[2]
        return options.build(cls, {**own, "pool": pool}, where, name=options.convert(Name, name, where))


@dataclass(frozen=True, slots=True)
class CompressionConfig:
    """How bodies are compressed."""

    KEYS: ClassVar = ("use", "over", "accept")
    use: CompressorChoice | None = None
    """The compressor; every other key is an option of it. None: nothing is compressed."""
    over: Size = 8 * 1024
    """Bodies up to this size are left as they are."""
    accept: tuple[str, ...] = _COMPRESSORS
    """The compressors that are taken from others; by default also the one in ``use``."""

    @classmethod
    def from_raw(cls, raw: object, where: Where) -> CompressionConfig:
        if raw is None:
            return cls()
        own, rest = _split({"use": raw} if isinstance(raw, str) else raw, where, cls.KEYS)
        use = own.pop("use", None)
        if use is not None:
            own["use"] = choice = _with_options(use, rest, where, "use")
            own.setdefault("accept", list(dict.fromkeys([*_COMPRESSORS, choice.use])))
        elif rest:
            raise where.child(next(iter(rest))).error(f"unknown key{options.suggest(next(iter(rest)), cls.KEYS)}")
        return options.build(cls, own, where)


@dataclass(frozen=True, slots=True)
class PluginPolicy:
    """Which plugins may be used."""

    allow: Mapping[str, str] | None = None
    """Plugin names and the distribution each has to come from. Once this is set, a plugin that is neither listed nor
    part of dray is refused. Unset: any installed plugin may be chosen."""


def _split(raw: object, where: Where, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, object]]:
    """The keys of a mapping that are our own, and those that belong to the plugin."""
    if raw is None:
        return {}, {}
    if not isinstance(raw, Mapping):
        raise where.error(f"expected a mapping, got {shown(raw)}")
    return {key: raw[key] for key in names if key in raw}, {key: raw[key] for key in raw if key not in names}


def _with_options(raw: object, rest: Mapping[str, object], where: Where, key: str) -> PluginChoice:
    """A chosen plugin, and the options of it that stand beside the choice."""
    choice = PluginChoice.from_raw(raw, where.child(key))
    place = choice.where if isinstance(raw, Mapping) else where
    return PluginChoice(choice.use, {**choice.options, **rest}, place)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Config:
    """The settings of one application, frozen, and where each came from."""

    name: Name = "dray"
    """The name of the application."""
    imports: tuple[str, ...] = ()
    """The modules that define tasks."""
    transport: TransportChoice
    """What moves the messages: a plugin's name, a URL, or a mapping with ``use`` and its options."""
    backend: BackendChoice
    """What keeps the results."""
    serializer: SerializerChoice
    """What turns arguments and results into bytes."""
    accept: tuple[str, ...]
    """The serializers that are taken from others; unsafe ones only if they are named here."""
    compression: CompressionConfig = CompressionConfig()
    """How large bodies are made smaller."""
    queues: Mapping[Name, QueueConfig] = field(default_factory=dict)
    """Settings of single queues."""
    default_queue: Name = "default"
    """The queue of a task that names none."""
    routes: Mapping[str, Name] = field(default_factory=dict)
    """Patterns of task names (``shop.mail.*``) and the queue for each; the first that fits wins."""
    workers: Mapping[Name, WorkerConfig]
    """The worker processes that ``dray worker`` runs."""
    hooks: tuple[HookChoice, ...] = ()
    """The hook plugins that are loaded, and no others."""
    plugins: PluginPolicy = PluginPolicy()
    """Which plugins may be used, wherever they are chosen."""
    tasks: TaskDefaults = TaskDefaults()
    """What holds for every task that does not say otherwise."""
    require_durability: Durability | None = None
    """Refuse to start on a transport that promises less."""
    result_expires: Seconds = 86_400.0
    """How long results are kept."""
    result_store_timeout: Seconds = 60.0
    """How long a failing result back end is tried before the messages are given back."""
    unknown_task_wait: Seconds = 600.0
    """How long a message of an unknown task waits for a worker that knows it."""
    message_max: Size = 64 * 1024 * 1024
    """The largest body that is decompressed or decoded."""
    shutdown_timeout: Seconds = 30.0
    """How long a warm stop waits for what runs; then it is given back."""

    base: Path
    """The folder that relative paths are meant from."""
    path: Path | None = None
    """The YAML file."""
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def origin(self, dotted_path: str) -> str:
        """Where a setting was given: ``dray.yaml:12``, ``environment DRAY_X``, ``code`` or ``default``."""
        return self.origins.get(dotted_path, "default")


def load(
    settings: Mapping[str, object] | None = None,
    *,
    source: str | Path | Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Config:
    """``source`` (or the ``dray.yaml`` that is found), over it the environment, over that ``settings`` from code."""
    environ = os.environ if environ is None else environ
    cwd = Path.cwd() if cwd is None else Path(cwd)
    tree, path = _from_source(source if source is not None else environ.get("DRAY_CONFIG") or None, environ, cwd)
    given = tree is not None
    tree = _canonical(tree) if tree is not None else Node({}, "default")
    for layer in (*sources.from_environment(environ), sources.from_code(settings or {}, "code")):
        tree = _merge(tree, _canonical(layer))
    raw, origins = sources.flatten(tree)
    _fill_in(raw, "null" if given else "sqlite")
    base = path.parent if path else _home(cwd) if source is None else cwd
    return options.build(Config, raw, Where("", origins), base=base, path=path, origins=origins)


def _home(cwd: Path) -> Path:
    """Without a file: the nearest folder that has a ``.dray`` already, so that callers below it meet their worker."""
    return next((folder for folder in (cwd, *cwd.parents) if (folder / ".dray").is_dir()), cwd)


def _from_source(
    source: str | Path | Mapping[str, object] | None, environ: Mapping[str, str], cwd: Path
) -> tuple[Node | None, Path | None]:
    """What the file, module or mapping says, and the path of the file."""
    if isinstance(source, Mapping):
        return sources.from_code(source, "code"), None
    if source is None:
        folders = (cwd, *cwd.parents)
        path = next((file for folder in folders for name in FILE_NAMES if (file := folder / name).is_file()), None)
        if path is None:
            return None, None
    else:
        path = cwd / source
        if isinstance(source, str) and _is_module(source) and not path.exists():
            return sources.from_module(source), None
    path = path.absolute()
    name = str(path.relative_to(cwd.absolute()) if path.is_relative_to(cwd.absolute()) else path)
    return sources.from_file(path, name, environ), path


def _is_module(source: str) -> bool:
    return all(part.isidentifier() for part in source.split(".")) and not source.endswith((".yaml", ".yml"))


def _canonical(tree: Node) -> Node:
    """The same settings with each plugin in its long form, so that options can be merged into it."""
    if not isinstance(tree.value, dict):
        return tree
    value = dict(tree.value)
    for key in ("transport", "backend", "serializer", "compression"):
        if key in value:
            value[key] = _long_form(value[key])
    if "hooks" in value and isinstance(value["hooks"].value, list):
        value["hooks"] = Node([_long_form(node) for node in value["hooks"].value], value["hooks"].origin)
    return Node(value, tree.origin)


def _long_form(node: Node) -> Node:
    if isinstance(node.value, list):
        fields = plugins.plugin_fields(sources.flatten(node)[0])
        return node if fields is None else Node({"url": node}, node.origin)
    if not isinstance(node.value, str):
        return node
    fields = plugins.plugin_fields(str(node.value)) or {}
    return Node({key: Node(value, node.origin) for key, value in fields.items()}, node.origin)


def _merge(base: Node, over: Node) -> Node:
    """``over`` on top of ``base``: mappings are merged key by key, unless the upper one names another plugin."""
    if not isinstance(base.value, dict) or not isinstance(over.value, dict) or _names_another(base.value, over.value):
        return over
    merged = dict(base.value)
    for key, node in over.value.items():
        merged[key] = _merge(merged[key], node) if key in merged else node
    return Node(merged, base.origin)


def _names_another(base: Mapping[str, Node], over: Mapping[str, Node]) -> bool:
    below, above = (
        plugins.plugin_name({key: sources.flatten(item[key])[0] for key in ("use", "url") if key in item})
        for item in (base, over)
    )
    return above is not None and below is not None and above != below


def _fill_in(raw: dict[str, Any], backend: str) -> None:
    """The defaults that depend on other settings."""
    for key, name in (("transport", "sqlite"), ("backend", backend), ("serializer", "json")):
        if raw.get(key) is None:
            raw[key] = {"use": name}
    if raw.get("accept") is None:
        serializer = raw["serializer"]
        names = [plugins.plugin_name(serializer), serializer.get("inner")] if isinstance(serializer, Mapping) else []
        raw["accept"] = [name for name in names if isinstance(name, str)]
    if raw.get("workers") in (None, {}):
        raw["workers"] = {"default": {}}
    if isinstance(raw["workers"], dict):
        missing = {"queues": [raw.get("default_queue", "default")]}
        for name, worker in raw["workers"].items():
            if worker is None or (isinstance(worker, Mapping) and worker.get("queues") is None):
                raw["workers"][name] = {**(worker or {}), **missing}


def settings() -> dict[str, Any]:
    """Everything that can be set, with its type."""
    return {name: kind for name, kind in options.hints(Config).items() if name not in ("base", "path", "origins")}


def choices(config: Config) -> Iterator[tuple[str, str, PluginChoice]]:
    """Every plugin that the configuration names, as (kind, dotted path, choice)."""
    yield "transports", "transport", config.transport
    yield "backends", "backend", config.backend
    yield "serializers", "serializer", config.serializer
    if config.compression.use is not None:
        yield "compressors", "compression", config.compression.use
    for name, worker in config.workers.items():
        yield "pools", f"workers.{name}", worker.pool
    for at, hook in enumerate(config.hooks):
        yield "hooks", f"hooks.{at}", hook
