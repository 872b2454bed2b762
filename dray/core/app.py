"""The composition root: a configuration becomes objects that know each other."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar, overload

from dray.core.clock import AddressedIds, Clock, Ids, Random, SystemClock, TimeOrderedIds
from dray.core.errors import ConfigError, NotSupported
from dray.core.failure import SafeErrors
from dray.core.faults import Faults
from dray.core.hooks import Hooks
from dray.core.registry import Registry, import_modules
from dray.core.result import AsyncResult, GroupResult, Results
from dray.core.task import AsyncTask, CallOptions, Signature, Task, TaskOptions, call_options, check_id, task_name

if TYPE_CHECKING:
    from pathlib import Path

    from dray.core.client import Client
    from dray.core.codec import Codec
    from dray.core.config import Config, WorkerConfig
    from dray.core.contracts import PluginContext, ResultBackend, Transport
    from dray.core.plugins import PluginChoice
    from dray.core.worker import Worker

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=type[BaseException])


class Connections(NamedTuple):
    """What one process talks through. Never used on both sides of a fork."""

    transport: Transport
    backend: ResultBackend
    client: Client
    results: Results


class Dray:
    """An application: its configuration, its tasks, its connections. Any thread; survives ``fork``.

    ``Dray()`` finds ``dray.yaml`` in the working directory or above it; without one it needs no server: SQLite under
    ``.dray/``. ``config``: a YAML path, a module's dotted name, or a mapping, instead of that search. Keywords are
    settings in code and win over file and environment: ``Dray(transport="memory", result_expires="2h")``. The
    configuration is read at the first use and frozen then; nothing is connected before the first call.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        config: str | Path | Mapping[str, object] | None = None,
        clock: Clock | None = None,
        ids: Ids | None = None,
        random_source: Random | None = None,
        **settings: object,
    ) -> None:
        if name is not None:
            settings["name"] = name
        self.registry = Registry()
        self.safe_errors = SafeErrors()
        self.clock: Clock = clock or SystemClock()
        self.ids: Ids = ids or TimeOrderedIds()
        self.random = random_source or random.Random()
        self.faults = Faults.from_environment(os.environ)
        self._source = config
        self._settings = settings
        self._listeners: list[object] = []
        self._abandoned: list[object] = []
        self._substitute: Connections | None = None
        self._unbound: dict[str, Task[..., Any]] = {}
        self._reset()
        me = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forked(me()))

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._connections: Connections | None = None
        self._opened: Connections | None = None

    def forked(self) -> None:
        """In a new child: the parent's connections are left alone, not even closed; ours are made when needed."""
        if self._connections is not None:
            self._abandoned.append(self._connections)
        self._reset()
        self.random.seed()

    # --- configuration -------------------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """The frozen configuration. Raises ``ConfigError``."""
        config: Config | None = self.__dict__.get("_config")
        if config is None:
            from dray.core.config import load

            with self._lock:
                config = self.__dict__.setdefault("_config", load(self._settings, source=self._source))
        return config

    def configure(self, source: str | Path | Mapping[str, object] | None = None, **settings: object) -> None:
        """Set, before the first use, what the constructor could have set. Raises ``ConfigError`` afterwards."""
        if "_config" in self.__dict__:
            raise ConfigError("the configuration is frozen at its first use; configure() has to come before")
        self._source = source if source is not None else self._source
        self._settings.update(settings)

    # --- tasks ---------------------------------------------------------------------------------------------

    @overload
    def task(self, fn: Callable[P, Awaitable[R]], /) -> AsyncTask[P, R]: ...
    @overload
    def task(self, fn: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(self, /, *, name: str | None = None, **options: Any) -> _Decorator: ...
    def task(self, fn: Callable[..., Any] | None = None, /, *, name: str | None = None, **options: Any) -> Any:
        """Register a function: ``@app.task`` or ``@app.task(queue="mail", retry=Retry(...))``; see ``TaskOptions``."""
        decorator = _Decorator(self, name, options)
        return decorator if fn is None else decorator(fn)

    def safe_error(self, cls: E) -> E:
        """Register an exception class (usable as a decorator) that callers get back as itself: ``cls(*args)``."""
        self.safe_errors.add(cls)
        return cls

    def hook(self, listener: object) -> None:
        """Add an object whose methods are marked with ``dray.hookimpl``. Raises ``ConfigError`` after the first use."""
        if "_hooks" in self.__dict__:
            raise ConfigError("the hooks are frozen at the first use; hook() has to come before")
        self._listeners.append(listener)

    def import_tasks(self) -> None:
        """Import the modules that the configuration lists under ``imports``."""
        import_modules(self.config.imports, self.config.base)

    # --- calls ---------------------------------------------------------------------------------------------

    def send(
        self, task: Task[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], options: CallOptions
    ) -> AsyncResult[Any]:
        """What ``Task.delay`` and its siblings call."""
        connections = self._opened or self.connect()
        return connections.client.send(task, args, kwargs, options)

    async def asend(
        self, task: Task[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], options: CallOptions
    ) -> AsyncResult[Any]:
        """What ``Task.adelay`` calls."""
        return await self.connect().client.asend(task, args, kwargs, options)

    def send_many(self, calls: Iterable[Signature]) -> GroupResult[Any]:
        """Queue many calls: ``app.send_many(add.s(i, i) for i in range(100_000))``; see ``Client.send_many``."""
        return self.connect().client.send_many(calls)

    def send_task(
        self, name: str, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[Any]:
        """Queue a call of a task that this process does not import, by its name."""
        task = self.registry.get(name) or self._unbound.get(name)
        if task is None:
            task = self._unbound[name] = Task(_elsewhere, name, TaskOptions(), self)
        return self.send(task, tuple(args), kwargs or {}, call_options(options))

    def result(self, task_id: str) -> AsyncResult[Any]:
        """The result of an earlier call, by its id."""
        check_id(task_id)
        connections = self.connect()
        return AsyncResult(task_id, connections.results, connections.client)

    def revoke(self, *task_ids: str, terminate: bool = False) -> None:
        """Cancel tasks: see ``Client.revoke``."""
        self.connect().client.revoke(task_ids, terminate=terminate)

    def requeue_dead(self, task_ids: Iterable[str]) -> list[str]:
        """Send dead letters again, as new; their results are forgotten. Returns the ids that were there."""
        return self.connect().client.requeue_dead(list(task_ids))

    # --- connections ---------------------------------------------------------------------------------------

    def connections(self) -> Connections:
        """This process's connections, built but not necessarily open: a worker opens them after it has forked."""
        with self._lock:
            if self._connections is None and self._substitute is not None:
                self._connections = self._substitute
            if self._connections is None:
                transport, backend = self._plugin("transport"), self._plugin("backend")
                if self._abandoned and not transport.features.shared:
                    raise NotSupported(
                        f"the transport {transport.context.name!r} lives in the parent process, a child cannot send "
                        "through it; use another transport, or a pool without processes (threads, solo)"
                    )
                self._connections = self.compose(transport, backend)
            return self._connections

    def connect(self) -> Connections:
        """This process's connections, open. Raises ``ConfigError``, ``Unavailable``."""
        with self._lock:
            connections = self.connections()
            if self._opened is None:
                connections.transport.open()
                connections.backend.open()
                if address := connections.backend.address():
                    connections.client.use_ids(AddressedIds(self.ids, address))
                self._opened = connections
            return connections

    @property
    def transport(self) -> Transport:
        """This process's transport, connected."""
        return self.connect().transport

    @property
    def backend(self) -> ResultBackend:
        """This process's result back end, connected."""
        return self.connect().backend

    def close(self) -> None:
        """Close this process's connections; the next use opens new ones. Idempotent."""
        with self._lock:
            connections, self._connections, self._opened = self._connections, None, None
        if connections is not None:
            connections.transport.close()
            connections.backend.close()

    @contextlib.contextmanager
    def substituted(self, connections: Connections) -> Iterator[None]:
        """Within the block calls go through ``connections``, whatever the configuration says: for tests.

        Connections that are open already are left as they are, and used again afterwards. For one thread.
        """
        with self._lock:
            kept = self._connections, self._opened, self._substitute
            self._connections, self._opened, self._substitute = connections, None, connections
        try:
            yield
        finally:
            self.close()
            with self._lock:
                self._connections, self._opened, self._substitute = kept

    def replica(self, *, clock: Clock, ids: Ids, random_source: Random, **settings: object) -> Dray:
        """Another app with these tasks, hooks and settings, except for those that are given, and its own connections.

        The tasks still send through the app that they were made for.
        """
        frozen: Config | None = self.__dict__.get("_config")
        source = self._source if frozen is None or frozen.path is None else frozen.path
        merged: dict[str, Any] = {**self._settings, **settings}
        twin = Dray(config=source, clock=clock, ids=ids, random_source=random_source, **merged)
        twin.registry, twin.safe_errors, twin._listeners = self.registry, self.safe_errors, self._listeners
        return twin

    def __enter__(self) -> Dray:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- composition ---------------------------------------------------------------------------------------

    def worker(self, settings: WorkerConfig | None = None, on_ready: Callable[[], None] = lambda: None) -> Worker:
        """A worker for one entry of ``workers`` (default: the first), over this app's connections.

        Nothing is connected until it runs; :meth:`close` closes them when it has ended.

        Raises ``ConfigError`` when the tasks ask for what the chosen plugins cannot do.
        """
        from dray.core.assembly import assemble_worker

        return assemble_worker(self, settings or next(iter(self.config.workers.values())), on_ready)

    def plugin_context(self, kind: str, name: str) -> PluginContext:
        """What a plugin of this app is built with."""
        from dray.core.contracts import PluginContext

        logger = logging.getLogger(f"dray.{kind}.{name}")
        return PluginContext(name, logger, self.clock, self.random, self.config.base, self.faults)

    def _plugin(self, setting: str) -> Any:
        return self.make_plugin(f"{setting}s", getattr(self.config, setting))

    def make_plugin(self, kind: str, choice: PluginChoice) -> Any:
        """An instance of a plugin, if the configuration allows it. Raises ``ConfigError``."""
        from dray.core.plugins import make

        return make(kind, choice, lambda name: self.plugin_context(kind, name), self.config.plugins.allow)

    def compose(
        self,
        transport: Transport,
        backend: ResultBackend,
        make_results: Callable[[ResultBackend, Codec, SafeErrors, Clock], Results] = Results,
    ) -> Connections:
        """Connections of this app over a transport and a result back end; nothing is opened."""
        from dray.core.client import Client
        from dray.core.fallback import Fallback

        config, codec = self.config, self.codec
        results = make_results(backend, codec, self.safe_errors, self.clock)
        client = Client(
            transport=transport,
            backend=backend,
            codec=codec,
            results=results,
            fallback=Fallback(transport.features, self.clock, transport.context.name),
            route=self._route,
            hooks=self.hooks,
            clock=self.clock,
            ids=self.ids,
            faults=self.faults,
            result_expires_s=config.result_expires,
        )
        return Connections(transport, backend, client, results)

    def _route(self, task: str) -> str:
        for pattern, queue in self.config.routes.items():
            if fnmatchcase(task, pattern):
                return queue
        return self.config.default_queue

    @property
    def hooks(self) -> Hooks:
        """The hooks that the configuration lists and :meth:`hook` added."""
        hooks: Hooks | None = self.__dict__.get("_hooks")
        if hooks is None:
            listed = [self.make_plugin("hooks", choice) for choice in self.config.hooks]
            hooks = self.__dict__.setdefault("_hooks", Hooks([*listed, *self._listeners]))
        return hooks

    @property
    def codec(self) -> Codec:
        """What encodes and decodes this app's messages."""
        codec: Codec | None = self.__dict__.get("_codec")
        if codec is None:
            from dray.core.assembly import assemble_codec

            codec = self.__dict__.setdefault("_codec", assemble_codec(self))
        return codec


class _Decorator:
    """``@app.task(...)`` with options; generic in what it decorates."""

    def __init__(self, app: Dray, name: str | None, options: Mapping[str, Any]) -> None:
        self._app = app
        self._name = name
        try:
            self._options = TaskOptions(**options)
        except TypeError as error:
            known = ", ".join(TaskOptions._fields)
            raise ConfigError(f"@app.task: {error}; task options are name, {known}") from None

    @overload
    def __call__(self, fn: Callable[P, Awaitable[R]]) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R]) -> Task[P, R]: ...
    def __call__(self, fn: Callable[..., Any]) -> Task[..., Any]:
        import inspect

        kind = AsyncTask if inspect.iscoroutinefunction(fn) else Task
        task: Task[..., Any] = kind(fn, self._name or task_name(fn), self._options, self._app)
        self._app.registry.add(task)
        return task


def _forked(app: Dray | None) -> None:
    if app is not None:
        app.forked()


def _elsewhere(*_args: Any, **_kwargs: Any) -> Any:
    """Stands for the function of a task that only workers import."""
    raise ConfigError("this task is known here by its name only; it runs in a worker")
