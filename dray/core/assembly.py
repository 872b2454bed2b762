"""A codec and a worker put together from the configuration, after checking that the plugins can do what is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dray.core import plugins
from dray.core.codec import Codec
from dray.core.contracts import Pool, Serializer, Signer, Transport
from dray.core.errors import ConfigError
from dray.core.executor import Settings, TaskExecutor
from dray.core.fallback import Fallback
from dray.core.parts import WorkerParts
from dray.core.settler import Settler
from dray.core.worker import Worker

if TYPE_CHECKING:
    from dray.core.app import Dray
    from dray.core.config import Config, WorkerConfig
    from dray.core.task import Task


def assemble_worker(app: Dray, settings: WorkerConfig, on_ready: Callable[[], None]) -> Worker:
    """See ``Dray.worker``."""
    pool = app.make_plugin("pools", settings.pool)
    return Worker(assemble_parts(app, settings.name, settings.queues, pool, on_ready))


def assemble_parts(
    app: Dray, name: str, queues: Sequence[str], pool: Pool, on_ready: Callable[[], None] = lambda: None
) -> WorkerParts:
    """What a worker of this app is made of, around a pool. Raises ``ConfigError``."""
    config, codec, hooks = app.config, app.codec, app.hooks
    transport, backend, *_ = app.connections()
    _check(config, list(app.registry), transport, pool)
    fallback = Fallback(transport.features, app.clock, transport.context.name)
    limits = config.tasks
    executor_settings = Settings(
        keeps_results=backend.features.keeps,
        result_max_bytes=backend.features.max_body_bytes,
        result_expires_s=config.result_expires,
        unknown_task_wait_s=config.unknown_task_wait if transport.features.max_delay_s > 0 else 0.0,
        can_kill=pool.features.kill,
        soft_time_limit=limits.soft_time_limit,
        time_limit=limits.time_limit,
        track_started=limits.track_started,
        ignore_result=limits.ignore_result,
    )
    executor = TaskExecutor(app.registry, codec, executor_settings, hooks, app.clock, app.random, app.faults)
    settler = Settler(
        transport,
        backend,
        fallback,
        app.clock,
        app.random,
        app.faults,
        undeliverable=executor.undeliverable,
        store_timeout_s=config.result_store_timeout,
        remember_ended_s=codec.signer.max_age_s if codec.signer is not None else None,
        verify=codec.check,
    )
    return WorkerParts(
        name=name,
        queues=queues,
        transport=transport,
        backend=backend,
        pool=pool,
        executor=executor,
        settler=settler,
        fallback=fallback,
        hooks=hooks,
        clock=app.clock,
        random=app.random,
        faults=app.faults,
        shutdown_timeout_s=config.shutdown_timeout,
        max_deliveries={queue: settings.max_deliveries for queue, settings in config.queues.items()},
        require_durability=config.require_durability,
        on_ready=on_ready,
    )


def _check(config: Config, tasks: list[Task[..., Any]], transport: Transport, pool: Pool) -> None:
    """Refuses, before the first message, what could not be kept later; names the task, the setting and the way out."""
    for task, option, what in _demands(config, tasks):
        if what == "kill" and not pool.features.kill:
            able = _able("pools", "kill")
            raise ConfigError(
                f"{task} has {option}, which the pool {pool.context.name!r} cannot enforce: it ends no running task. "
                f"Pools that can: {able}; or use soft_time_limit"
            )
        if what == "interrupt" and not pool.features.interrupt:
            raise ConfigError(
                f"{task} has {option}, which the pool {pool.context.name!r} cannot raise; pools that can: "
                f"{_able('pools', 'interrupt')}"
            )
        if what == "delay" and transport.features.max_delay_s <= 0:
            raise ConfigError(
                f"{task} has {option}, and the transport {transport.context.name!r} cannot delay messages; those "
                f"that can: {_able('transports', 'max_delay_s')}"
            )


def _demands(config: Config, tasks: list[Task[..., Any]]) -> Iterator[tuple[str, str, str]]:
    if config.tasks.time_limit is not None:
        yield "the configuration", "tasks.time_limit", "kill"
    if config.tasks.soft_time_limit is not None:
        yield "the configuration", "tasks.soft_time_limit", "interrupt"
    for task in tasks:
        options = task.task_options
        if options.time_limit is not None:
            yield f"task {task.name!r}", "time_limit", "kill"
        if options.soft_time_limit is not None:
            yield f"task {task.name!r}", "soft_time_limit", "interrupt"
        if options.retry is not None:
            yield f"task {task.name!r}", "retry", "delay"


def _able(kind: str, feature: str) -> str:
    found = [info.name for info in plugins.our_own(kind) if getattr(info.features, feature, None)]
    return ", ".join(found) or "none of dray's own"


def assemble_codec(app: Dray) -> Codec:
    """What encodes and decodes an app's messages. Raises ``ConfigError``."""
    config, build = app.config, app.make_plugin
    chosen = build("serializers", config.serializer)
    signer: Signer | None = chosen if isinstance(chosen, Signer) else None
    serializer: Serializer = build("serializers", plugins.PluginChoice(signer.inner)) if signer is not None else chosen
    accepted = serializer.name in config.accept or config.origin("accept") == "default"
    accept = {serializer.name: serializer} if accepted else {}
    for name in config.accept:
        if name not in (config.serializer.use if signer is not None else "", serializer.name):
            accept[name] = build("serializers", plugins.PluginChoice(name))
    unsafe = [name for name, plugin in accept.items() if not plugin.safe]
    if unsafe and config.origin("accept") == "default":
        raise ConfigError(
            f"serializer {unsafe[0]!r} can run code that a message brings; if every sender is trusted, list it by "
            f"name: accept: [{unsafe[0]}]"
        )
    compression = config.compression
    return Codec(
        serializer=serializer,
        signer=signer,
        accept=accept,
        compressor=build("compressors", compression.use) if compression.use is not None else None,
        compress_over=compression.over,
        load_serializer=lambda name: build("serializers", plugins.PluginChoice(name)),
        load_compressor=lambda name: build("compressors", plugins.PluginChoice(name)),
        encodings=compression.accept,
        max_bytes=config.message_max,
        clock=app.clock,
    )
