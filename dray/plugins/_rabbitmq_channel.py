"""A channel of a connection to RabbitMQ, for any thread. How it is used stands in ``_rabbitmq_link``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pika
from pika import spec

from dray.core.errors import Unavailable
from dray.plugins._rabbitmq_errors import Refused, link_lost

if TYPE_CHECKING:
    from dray.plugins._rabbitmq_link import Link

OnMessage = Callable[[Any, Any, bytes], None]


class Answer:
    """One thing that another thread will say once. ``give`` and ``fail`` may come twice: the first one counts."""

    __slots__ = ("_error", "_given", "_lock", "_value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._given = False
        self._value: Any = None
        self._error: Exception | None = None

    def give(self, value: Any = None) -> None:
        if not self._given:
            self._value, self._given = value, True
            self._lock.release()

    def fail(self, error: Exception) -> None:
        if not self._given:
            self._error, self._given = error, True
            self._lock.release()

    @property
    def given(self) -> bool:
        return self._given

    def wait(self, timeout_s: float) -> bool:
        """True once it is there (whatever it is); False after ``timeout_s`` seconds."""
        if self._lock.acquire(timeout=timeout_s):
            self._lock.release()
        return self._given

    def result(self, timeout_s: float, what: str) -> Any:
        """The value; raises the error, or ``Unavailable`` after ``timeout_s`` seconds."""
        if not self.wait(timeout_s):
            raise Unavailable(f"rabbitmq: no answer to {what} for {timeout_s:g} s")
        if self._error is not None:
            raise self._error
        return self._value


class Channel:
    """A channel of a link. Any thread; what it is asked, it asks in the I/O thread."""

    def __init__(
        self,
        link: Link,
        on_close: Callable[[Exception], None] | None,
        on_cancel: Callable[[str], None] | None,
        on_return: Callable[[Any, Any, bytes], None] | None,
    ) -> None:
        self.link = link
        self.error: Exception | None = None
        """Why it is closed; None while it is open."""
        self.opened = Answer()
        self.pika: Any = None
        """Pika's channel. I/O thread only."""
        self._answers: set[Answer] = set()
        self._on_close = on_close
        self._on_cancel = on_cancel
        self._on_return = on_return
        link.post(self._open)

    @property
    def is_open(self) -> bool:
        return self.error is None

    def call(self, method: str, **arguments: Any) -> Any:
        """Ask pika's channel, and wait for the broker's answer."""
        return self.calls([(method, arguments)])[0]

    def calls(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> list[Any]:
        """Ask one after the other without a pause; the answers in order. Raises the first error."""
        answers = [Answer() for _ in calls]

        def job() -> None:
            for answer, (method, arguments) in zip(answers, calls, strict=True):
                self._ask(answer, getattr(self.pika, method, None), arguments)

        self.link.post(job)
        timeout_s = self.link.options.answer_timeout_s
        for answer, (method, _) in zip(answers, calls, strict=True):
            if not answer.wait(timeout_s):
                self.link.drop(f"no answer to {method} for {timeout_s:g} s")
        return [answer.result(timeout_s, method) for answer, (method, _) in zip(answers, calls, strict=True)]

    def get(self, queue: str, auto_ack: bool = False) -> tuple[Any, Any, bytes] | None:
        """Take one message, or None. One at a time."""
        answer = Answer()

        def ask(callback: Callable[[Any], None]) -> None:
            self.pika.add_callback(lambda _: callback(None), [spec.Basic.GetEmpty], one_shot=True)
            self.pika.basic_get(queue, lambda _, *message: callback(message), auto_ack)

        self.link.post(lambda: self._ask(answer, ask, {}))
        return answer.result(self.link.options.answer_timeout_s, "basic_get")  # type: ignore[no-any-return]

    def consume(
        self, queue: str, on_message: OnMessage, auto_ack: bool = False, arguments: dict[str, Any] | None = None
    ) -> str:
        """Start a consumer; returns its tag. ``on_message`` runs in the I/O thread."""
        frame = self.call(
            "basic_consume",
            queue=queue,
            on_message_callback=lambda _, method, properties, body: on_message(method, properties, body),
            auto_ack=auto_ack,
            arguments=arguments,
        )
        return str(frame.method.consumer_tag)

    def post(self, job: Callable[[Any], object]) -> None:
        """Run ``job(pika's channel)`` in the I/O thread soon, unless the channel is closed by then."""

        def run() -> None:
            if self.error is None and self.pika.is_open:
                job(self.pika)

        self.link.post(run)

    def close(self) -> None:
        """Idempotent; waits for nothing."""
        try:
            self.post(lambda channel: channel.close())
        except Unavailable:
            pass

    # --- I/O thread ----------------------------------------------------------------------------------------

    def lose(self, error: Exception) -> None:
        """It is closed: whoever waits for an answer hears why. Idempotent."""
        if self.error is not None:
            return
        self.error = error
        self.link.discard(self)
        failure = self._failure()
        self.opened.fail(failure)
        answers, self._answers = self._answers, set()
        for answer in answers:
            answer.fail(failure)
        if self._on_close is not None:
            self._on_close(failure)

    def _open(self) -> None:
        if self.link.error is not None:
            self.lose(self.link.error)
            return
        self.link.add(self)
        self.pika = self.link.connection.channel(on_open_callback=lambda _: self.opened.give())
        self.pika.add_on_close_callback(lambda _, error: self.lose(error))
        if self._on_cancel is not None:
            on_cancel = self._on_cancel
            self.pika.add_on_cancel_callback(lambda frame: on_cancel(str(frame.method.consumer_tag)))
        if self._on_return is not None:
            on_return = self._on_return
            self.pika.add_on_return_callback(lambda _, method, properties, body: on_return(method, properties, body))

    def _ask(self, answer: Answer, function: Any, arguments: dict[str, Any]) -> None:
        if self.error is not None:
            answer.fail(self._failure())
            return
        self._answers.add(answer)

        def give(value: Any) -> None:
            self._answers.discard(answer)
            answer.give(value)

        try:
            function(callback=give, **arguments)
        except Exception as error:
            self._answers.discard(answer)
            answer.fail(Unavailable(f"rabbitmq: {self.link.address}: {error!r}"))

    def _failure(self) -> Exception:
        error = self.error
        if isinstance(error, pika.exceptions.ChannelClosedByBroker):
            return Refused(self.link.address, error)
        return link_lost(self.link.address, error)
