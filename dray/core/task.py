"""A task: a function with a name, a queue and limits; and a call of it, bound but not yet sent."""

from __future__ import annotations

import os.path
import sys
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, cast

from dray.core.errors import ConfigError, EncodeError, InvalidArguments, InvalidName
from dray.core.retry import Policy, Retry

if TYPE_CHECKING:
    import inspect
    from datetime import datetime, timedelta

    from dray.core.result import AsyncResult
    from dray.core.validation import Validator

P = ParamSpec("P")
R = TypeVar("R")
NAME_MAX = 200


class Sender(Protocol):
    """What a task needs of the app: something that sends its calls."""

    def send(
        self, task: Task[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], options: CallOptions
    ) -> AsyncResult[Any]: ...

    async def asend(
        self, task: Task[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], options: CallOptions
    ) -> AsyncResult[Any]: ...


# Named tuples and not dataclasses: dataclasses import inspect, a third of the time that importing dray would take.
class _CallFields(NamedTuple):
    """What one call asks for; ``None``: as the task, or the configuration, says.

    Times are seconds, ``timedelta``s, or (``eta``, ``expires``) aware ``datetime``s.
    """

    queue: str | None = None
    priority: int | None = None
    """0 to 9, higher first."""
    countdown: float | timedelta | None = None
    """Not before this many seconds from now."""
    eta: datetime | float | None = None
    """Not before this time (aware ``datetime``, or seconds since the epoch)."""
    expires: float | timedelta | datetime | None = None
    """Not started after this: seconds from now, or an aware ``datetime``."""
    task_id: str | None = None
    retry: Retry | None = None
    soft_time_limit: float | None = None
    time_limit: float | None = None
    ignore_result: bool | None = None
    track_started: bool | None = None
    result_expires: float | timedelta | None = None
    serializer: str | None = None
    compression: str | None = None
    """A compressor's name, or ``"none"``."""
    headers: Mapping[str, str] | None = None


class CallOptions(_CallFields):
    """What one call asks for, checked; the fields are those of its base. Keywords only."""

    __slots__ = ()

    def __new__(cls, **given: Any) -> CallOptions:
        """Raises ``ConfigError``, ``InvalidName``."""
        self = super().__new__(cls, **given)
        self._check()
        return self

    def _check(self) -> None:
        if self.priority is not None and not (type(self.priority) is int and 0 <= self.priority <= 9):
            raise ConfigError(f"priority={self.priority!r}: a whole number from 0 to 9, higher first")
        if self.countdown is not None and self.eta is not None:
            raise ConfigError("countdown and eta are two ways to say the same: give one")
        for name in ("soft_time_limit", "time_limit"):
            limit = getattr(self, name)
            if limit is not None and not (isinstance(limit, (int, float)) and 0 < limit < 1e9):
                raise ConfigError(f"{name}={limit!r}: a number of seconds over 0")
        for name in ("countdown", "expires", "result_expires"):
            time = getattr(self, name)
            if time is None or type(time) in (int, float) or hasattr(time, "total_seconds"):
                continue
            if not (name == "expires" and hasattr(time, "timestamp")):
                raise ConfigError(f"{name}={time!r}: a number of seconds, or a timedelta")
        if self.retry is not None and not isinstance(self.retry, Retry):
            raise ConfigError(f"retry={self.retry!r}: a Retry(...)")
        if self.queue is not None:
            check_name("queue", self.queue)
        if self.task_id is not None:
            check_id(self.task_id)


NO_OPTIONS = CallOptions()


class _TaskFields(NamedTuple):
    """What a task asks for at every call; ``None``: as the configuration says."""

    queue: str | None = None
    priority: int = 0
    expires: float | timedelta | None = None
    retry: Retry | None = None
    soft_time_limit: float | None = None
    time_limit: float | None = None
    ignore_result: bool | None = None
    track_started: bool | None = None
    result_expires: float | timedelta | None = None
    serializer: str | None = None
    compression: str | None = None
    validate: bool = False
    headers: Mapping[str, str] | None = None


class TaskOptions(_TaskFields):
    """What a task asks for at every call, checked; the fields are those of its base. Keywords only."""

    __slots__ = ()

    def __new__(cls, **given: Any) -> TaskOptions:
        """Raises ``ConfigError``, ``InvalidName``."""
        self = super().__new__(cls, **given)
        shared = {name: value for name, value in self._asdict().items() if name in CallOptions._fields}
        CallOptions(**shared)  # what a call may not say, a task may not either
        return self


class Signature(NamedTuple):
    """A call of a task that is bound and not yet sent: ``add.s(2, 3)``."""

    task: Task[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    options: CallOptions = NO_OPTIONS

    def delay(self) -> AsyncResult[Any]:
        """Send it."""
        return self.task.sender.send(self.task, self.args, self.kwargs, self.options)

    def __repr__(self) -> str:  # without the arguments: they may be nobody's business
        return f"<call of {self.task.name}>"


class Task(Generic[P, R]):
    """A registered function. Calling it runs it here and now; ``delay`` and its siblings queue it.

    ``R`` is the type of the value, also for ``async def`` functions. Immutable after construction; any thread.
    """

    def __init__(self, fn: Callable[P, Any], name: str, options: TaskOptions, sender: Sender) -> None:
        check_name("task", name)
        self.fn = fn
        self.name = name
        self.sender = sender
        self.task_options = options
        import inspect

        self.is_async = inspect.iscoroutinefunction(fn)
        self.policy: Policy | None = options.retry.policy() if options.retry is not None else None
        self.signature = inspect.signature(fn)
        self.user_headers = check_user_headers(options.headers or {})
        self._least, self._most = _positional_bounds(self.signature)
        self.validator: Validator | None = None
        if options.validate:
            from dray.core.validation import Validator

            self.validator = Validator(name, fn, self.signature)
        self.__name__ = getattr(fn, "__name__", name)
        self.__doc__ = fn.__doc__
        self.__module__ = fn.__module__
        self.__wrapped__ = fn

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here, in this process, without a queue."""
        return cast(R, self.fn(*args, **kwargs))

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Queue a call; when this returns, the transport has confirmed it (promise G1).

        Raises ``InvalidArguments``, ``EncodeError``, ``Unavailable`` (not queued), ``PublishUncertain``, ``TooLarge``.
        """
        return self.sender.send(self, args, kwargs, NO_OPTIONS)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """:meth:`delay` for coroutines: never blocks the event loop."""
        return await self.sender.asend(self, args, kwargs, NO_OPTIONS)

    def apply_async(
        self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[R]:
        """Queue a call with options: see :class:`CallOptions` for their names."""
        if not isinstance(args, (tuple, list)):
            raise InvalidArguments(f"apply_async({args!r}): the arguments as a tuple: apply_async(({args!r},))")
        return self.sender.send(self, tuple(args), kwargs or {}, call_options(options))

    def options(self, **options: Any) -> BoundTask[P, R]:
        """This task with call options: ``add.options(countdown=60).delay(2, 3)``; see :class:`CallOptions`."""
        return BoundTask(self, call_options(options))

    def s(self, *args: P.args, **kwargs: P.kwargs) -> Signature:
        """A call, bound but not sent: for ``app.send_many``."""
        return Signature(self, args, kwargs)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raises ``InvalidArguments`` unless the function can be called so."""
        if not kwargs and self._least <= len(args) <= self._most:
            return
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidArguments(f"{self.name}{self.signature}: {error}") from None

    def __repr__(self) -> str:
        return f"<task {self.name}>"


class AsyncTask(Task[P, R]):
    """A task whose function is ``async def``: calling it gives the coroutine."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:  # type: ignore[override]
        """The function's coroutine, to be awaited here."""
        return cast(Coroutine[Any, Any, R], self.fn(*args, **kwargs))


class BoundTask(Generic[P, R]):
    """A task together with call options."""

    __slots__ = ("call_options", "task")

    def __init__(self, task: Task[P, R], options: CallOptions) -> None:
        self.task = task
        self.call_options = options

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """As ``Task.delay``."""
        return self.task.sender.send(self.task, args, kwargs, self.call_options)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """As ``Task.adelay``."""
        return await self.task.sender.asend(self.task, args, kwargs, self.call_options)

    def options(self, **options: Any) -> BoundTask[P, R]:
        """With more options."""
        call_options(options)  # for its errors
        return BoundTask(self.task, CallOptions(**{**self.call_options._asdict(), **options}))

    def s(self, *args: P.args, **kwargs: P.kwargs) -> Signature:
        """A call, bound but not sent."""
        return Signature(self.task, args, kwargs, self.call_options)


_OPTION_NAMES = CallOptions._fields


def call_options(options: Mapping[str, Any]) -> CallOptions:
    """Raises ``ConfigError`` with the nearest right name for an unknown option."""
    if not options:
        return NO_OPTIONS
    for name in options:
        if name not in _OPTION_NAMES:
            import difflib

            near = difflib.get_close_matches(name, _OPTION_NAMES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(_OPTION_NAMES)}"
            raise ConfigError(f"unknown call option {name!r}{hint}")
    return CallOptions(**options)


def check_name(what: str, name: object) -> None:
    """Raises ``InvalidName`` unless ``name`` is 1 to 200 printable characters."""
    if not (isinstance(name, str) and 0 < len(name) <= NAME_MAX and name.isprintable()):
        shown = repr(name)[:80]
        raise InvalidName(f"{what} name {shown}: 1 to {NAME_MAX} printable characters, no control characters")


def check_id(task_id: object) -> None:
    """Raises ``InvalidName`` unless ``task_id`` is 1 to 255 printable ASCII characters."""
    if not (isinstance(task_id, str) and 0 < len(task_id) <= 255 and task_id.isascii() and task_id.isprintable()):
        raise InvalidName(f"task_id {repr(task_id)[:80]}: 1 to 255 printable ASCII characters")


def check_user_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The user's headers as they travel. Raises ``EncodeError``."""
    for key, value in headers.items():
        if not (isinstance(key, str) and isinstance(value, str) and key.isascii() and key.isprintable()):
            raise EncodeError(f"headers: {key!r}: {value!r}: text to text, keys printable ASCII")
        if "\0" in value or (not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value)):
            raise EncodeError(f"headers: {key!r}: {value!r}: no store can keep NULs and lone surrogates")
    return {f"x-{key}": value for key, value in headers.items()}


def task_name(fn: Callable[..., Any]) -> str:
    """``module.qualname``; for a function in a script that runs as ``__main__``, the script's module name.

    So that a program that queues its own tasks and the worker that imports it agree on the name.
    """
    module = fn.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        file = getattr(main, "__file__", None)
        module = (
            spec.name.removesuffix(".__main__")
            if spec is not None
            else os.path.splitext(os.path.basename(file))[0]
            if file
            else module
        )
    if "<lambda>" in fn.__qualname__:
        raise ConfigError("a lambda has no name to be found by; define a function, or pass name='...'")
    return f"{module}.{fn.__qualname__}".replace(".<locals>", "")


def _positional_bounds(signature: inspect.Signature) -> tuple[int, int]:
    """Least and most positional arguments of a call without keywords; (1, 0), never true, if keywords are needed."""
    least = most = 0
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            most += 1
            least += parameter.default is parameter.empty
        elif parameter.kind is parameter.VAR_POSITIONAL:
            most = 1 << 30
        elif parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            return 1, 0
    return least, most
