"""When to try again: (policy, attempt, error) -> delay in seconds, or give up. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dray.core.clock import Random
from dray.core.errors import ConfigError, DecodeError, DrayError, EncodeError
from dray.core.failure import dotted

MAX, DELAY_S, BACKOFF, MAX_DELAY_S = 3, 1.0, 2.0, 3600.0

Wait = Callable[[int, BaseException], float | None]
"""(retries so far, error) -> seconds to wait, or None to give up."""


class Retry(DrayError):
    """How often and when to run a task again; also raised inside a task to ask for it now.

    As a policy: ``@app.task(retry=Retry(on=OSError, max=5, backoff=2.0, max_delay=600))``. Raised:
    ``raise Retry("the service is busy", delay=30)``: what it leaves out comes from the task's policy, and its error
    classes do not matter. Immutable.

    ``on``: the exception class, or classes, that are retried (default: ``Exception``). ``max``: retries at most, not
    counting the first run (default 3; ``0``: never). ``delay``: seconds before the first retry (default 1).
    ``backoff``: the factor by which it grows (default 2; 1: constant). ``max_delay``: seconds at most (default 3600).
    ``jitter``: the share of the delay that is drawn at random, 0 to 1 (default 0.5), so that tasks that failed
    together do not come back together. ``wait``: a function that decides instead, see :data:`Wait`.
    """

    def __init__(
        self,
        reason: str = "",
        *,
        on: type[BaseException] | tuple[type[BaseException], ...] | None = None,
        max: int | None = None,  # noqa: A002  (the word of the trade)
        delay: float | None = None,
        backoff: float | None = None,
        max_delay: float | None = None,
        jitter: float | None = None,
        wait: Wait | None = None,
    ) -> None:
        super().__init__(reason or "retry")
        _check("max", max, 0)
        _check("delay", delay, 0)
        _check("backoff", backoff, 1)
        _check("max_delay", max_delay, 0)
        _check("jitter", jitter, 0)
        if jitter is not None and jitter > 1:
            raise ConfigError(f"Retry(jitter={jitter!r}): a share of the delay, 0 to 1")
        classes = on if isinstance(on, tuple) else (on,)
        if on is not None and not all(isinstance(cls, type) and issubclass(cls, BaseException) for cls in classes):
            raise ConfigError(f"Retry(on={on!r}): an exception class, or a tuple of them")
        self.reason = reason
        self.on = on
        self.max = max
        self.delay = delay
        self.backoff = backoff
        self.max_delay = max_delay
        self.jitter = jitter
        self.wait = wait

    def policy(self) -> Policy:
        """This as a complete policy, defaults filled in."""
        return Policy.of(self, None)

    def __repr__(self) -> str:
        given = {k: getattr(self, k) for k in ("on", *Policy._fields[1:]) if getattr(self, k) is not None}
        return f"Retry({', '.join(f'{k}={v!r}' for k, v in given.items())})"


class Policy(NamedTuple):
    """A complete retry policy."""

    on: tuple[type[BaseException] | str, ...] = (Exception,)
    """Classes, or their dotted names when the policy came with a message: a name in a message is never imported."""
    max: int = MAX
    delay: float = DELAY_S
    backoff: float = BACKOFF
    max_delay: float = MAX_DELAY_S
    jitter: float = 0.5
    wait: Wait | None = None

    @classmethod
    def of(cls, retry: Retry, base: Policy | None) -> Policy:
        """``retry`` with what it leaves out taken from ``base``."""
        given: dict[str, Any] = {k: getattr(retry, k) for k in cls._fields[1:] if getattr(retry, k) is not None}
        if retry.on is not None:
            given["on"] = retry.on if isinstance(retry.on, tuple) else (retry.on,)
        if retry.delay is not None:
            given.setdefault("wait", None)
        return (base or cls())._replace(**given)

    def dumps(self) -> str:
        """As text for a message header."""
        if self.wait is not None:
            raise EncodeError(
                "Retry(wait=...) is a function and cannot travel with a call; give it to @app.task instead"
            )
        import json

        names = [cls if isinstance(cls, str) else dotted(cls) for cls in self.on]
        return json.dumps([names, *self[1:6]])

    @classmethod
    def loads(cls, text: str) -> Policy:
        """The inverse of :meth:`dumps`; raises ``DecodeError``."""
        import json

        try:
            names, *numbers = json.loads(text)
            if len(numbers) != 5 or not all(isinstance(n, str) for n in names):
                raise ValueError(text)
            if any(type(n) not in (int, float) or not 0 <= n < 1e12 for n in numbers):
                raise ValueError(text)
            limit, delay, backoff, max_delay, jitter = numbers
            return cls(tuple(names), int(limit), delay, backoff, max_delay, min(jitter, 1))
        except (ValueError, TypeError, RecursionError) as error:
            raise DecodeError(f"the header 'retry' makes no sense: {text[:80]!r}") from error


def decide(policy: Policy | None, retries: int, error: BaseException, random: Random) -> float | None:
    """Seconds to wait before the next run after ``error``, or None to give up. ``retries``: how many there were."""
    if isinstance(error, Retry):
        policy = Policy.of(error, policy)
        if error.delay is not None:  # asked for in so many seconds: they are meant
            policy = policy._replace(backoff=error.backoff or 1.0, jitter=error.jitter or 0.0)
    elif policy is None or not _matches(policy.on, error):
        return None
    if retries >= policy.max:
        return None
    if policy.wait is not None:
        delay_s = policy.wait(retries, error)
        if delay_s is not None and not delay_s < 1e12:
            raise ConfigError(f"Retry(wait=...) returned {delay_s!r}: seconds, or None to give up")
        return None if delay_s is None else max(0.0, float(delay_s))
    try:
        delay_s = policy.delay * float(policy.backoff) ** retries
    except OverflowError:
        delay_s = policy.max_delay
    delay_s = min(delay_s, policy.max_delay)
    return delay_s * (1 - policy.jitter * random.random())


def _matches(on: tuple[type[BaseException] | str, ...], error: BaseException) -> bool:
    for wanted in on:
        if isinstance(wanted, str):
            if any(dotted(cls) == wanted for cls in type(error).__mro__):
                return True
        elif isinstance(error, wanted):
            return True
    return False


def _check(name: str, value: float | None, least: float) -> None:
    if value is not None and not (isinstance(value, (int, float)) and least <= value < 1e12):
        raise ConfigError(f"Retry({name}={value!r}): a number of at least {least}")
