"""dray: background tasks for Python programs. These are the public names; see ``dray.testing`` for the test kits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dray.core.app import Dray as _Dray
from dray.core.errors import (
    ConfigError,
    DrayError,
    EncodeError,
    InvalidArguments,
    NoResults,
    NotSupported,
    PublishUncertain,
    ResultTimeout,
    SendError,
    SoftTimeLimitExceeded,
    TaskError,
    TaskExpired,
    TaskFailed,
    TaskRevoked,
    TimeLimitExceeded,
    TooLarge,
    Unavailable,
    Uncertain,
    UnknownTask,
    WorkerLost,
)
from dray.core.hooks import hookimpl
from dray.core.message import State
from dray.core.request import Request, current
from dray.core.result import AsyncResult, GroupResult
from dray.core.retry import Retry
from dray.core.task import CallOptions, Signature, Task, TaskOptions

if TYPE_CHECKING:
    from dray.testing.driver import InlineWorker

__version__ = "0.1.0"


class Dray(_Dray):
    __doc__ = _Dray.__doc__

    def testing(self, **settings: object) -> InlineWorker:
        """A worker that a test drives by hand, on a clock that the test moves; see ``dray.testing.InlineWorker``.

        Here and not in the core, which knows nothing of the test kit.
        """
        from dray.testing.driver import InlineWorker

        return InlineWorker(self, **settings)  # type: ignore[arg-type]


__all__ = [
    "AsyncResult",
    "CallOptions",
    "ConfigError",
    "Dray",
    "DrayError",
    "EncodeError",
    "GroupResult",
    "InvalidArguments",
    "NoResults",
    "NotSupported",
    "PublishUncertain",
    "Request",
    "ResultTimeout",
    "Retry",
    "SendError",
    "Signature",
    "SoftTimeLimitExceeded",
    "State",
    "Task",
    "TaskError",
    "TaskExpired",
    "TaskFailed",
    "TaskOptions",
    "TaskRevoked",
    "TimeLimitExceeded",
    "TooLarge",
    "Unavailable",
    "Uncertain",
    "UnknownTask",
    "WorkerLost",
    "current",
    "hookimpl",
]
