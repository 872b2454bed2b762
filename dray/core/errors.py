"""Every exception that dray raises, as one tree. An error says what happened, where, and the next step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dray.core.message import Outgoing


class DrayError(Exception):
    """The root of all of dray's errors."""


# --- configuration and plugins -----------------------------------------------------------------------------


class ConfigError(DrayError):
    """The configuration, or what the tasks ask of it, cannot be met."""


class PluginError(ConfigError):
    """A plugin that the configuration names cannot be used."""


class PluginNotFound(PluginError):
    """No installed distribution offers this name."""


class PluginDriverMissing(PluginError):
    """The plugin is there, the client library it needs is not."""


class PluginIncompatible(PluginError):
    """The plugin speaks another version of dray's plugin interface."""


class PluginImportFailed(PluginError):
    """Importing the plugin raised; the cause is chained."""


class PluginConflict(PluginError):
    """Two distributions offer the same name."""


class PluginRefused(PluginError):
    """``plugins.allow`` does not list the plugin, or names another distribution for it."""


class NotSupported(DrayError):
    """The chosen plugin cannot do what was asked."""


# --- transports and result back ends -----------------------------------------------------------------------


class TransportError(DrayError):
    """A transport or a result back end failed."""


class Unavailable(TransportError):
    """The request certainly did not take effect; trying again is safe."""


class Uncertain(TransportError):
    """The request may have taken effect: the answer was lost. Repeat it under the same id."""


class SendError(Unavailable):
    """Some messages of a batch were certainly not stored; the others were.

    ``unsent`` holds those that were not, in the order they were given.
    """

    def __init__(self, message: str, unsent: Sequence[Outgoing] = ()) -> None:
        super().__init__(message)
        self.unsent = tuple(unsent)


class PublishUncertain(Uncertain):
    """The transport did not confirm in time. Call again with ``task_id`` set to this ``task_id``: it is safe."""

    def __init__(self, message: str, task_id: str) -> None:
        super().__init__(message)
        self.task_id = task_id


class TooLarge(DrayError):
    """A body is over the limit of the transport or the result back end."""


class InvalidName(DrayError):
    """A task, queue or id name is empty, too long, or holds characters that no store can be trusted with."""


# --- encoding ----------------------------------------------------------------------------------------------


class CodecError(DrayError):
    """Bytes and values could not be turned into each other."""


class EncodeError(CodecError):
    """A value cannot be sent; the message says what to pass instead."""


class DecodeError(CodecError):
    """Bytes that were received make no sense."""


class ContentRefused(DecodeError):
    """The content type or the encoding of a message is not in ``accept``."""


class SignatureError(DecodeError):
    """A signature is missing, wrong, expired, or made with a key that is not trusted."""


# --- tasks and results -------------------------------------------------------------------------------------


class TaskError(DrayError):
    """A task did not end in success."""


class TaskFailed(TaskError):
    """The task raised an exception whose class is not registered with the app as safe to rebuild.

    ``error_type`` is the remote class's dotted name, ``message`` its text, ``remote_traceback`` the worker's
    formatted traceback (may be empty).
    """

    def __init__(self, error_type: str, message: str, remote_traceback: str = "") -> None:
        super().__init__(error_type, message, remote_traceback)
        self.error_type = error_type
        self.message = message
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        return f"{self.error_type}: {self.message}" if self.message else self.error_type


class TaskRevoked(TaskError):
    """The task was cancelled before it ended."""


class TaskExpired(TaskError):
    """The task was not started before its ``expires``."""


class SoftTimeLimitExceeded(TaskError):
    """Raised inside a task when its ``soft_time_limit`` is over: clean up and return, or let it end the task."""


class TimeLimitExceeded(TaskError):
    """The task was killed because its ``time_limit`` was over."""


class WorkerLost(TaskError):
    """The process that ran the task died under it (signal, ``os._exit``, out of memory)."""


class UnknownTask(TaskError):
    """No task of this name is registered with the app."""


class InvalidArguments(TaskError, TypeError):
    """The arguments do not fit the task's signature."""


class ResultTimeout(DrayError, TimeoutError):
    """The result was not there in time; the task may still run."""


class NoResults(DrayError):
    """No result back end is configured, or the task ignores its result."""
