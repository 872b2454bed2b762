"""The producer of the failpoint matrix: sends a mix of tasks, with a ledger. Also a process of its own."""

from __future__ import annotations

from dray import Dray
from dray.testing.ledger import Ledger, read_ledger

COUNT = 60


def kind(n: int) -> str:
    return {4: "retried", 5: "failing"}.get(n % 6, "quick")


def send_all(app: Dray, ledger: Ledger) -> None:
    """Send what the ledger does not call confirmed yet."""
    done = read_ledger(ledger.path) if ledger.path.exists() else {}
    for n in range(COUNT):
        send_one(app, ledger, n, done)


def send_one(app: Dray, ledger: Ledger, n: int, done: dict[str, str]) -> None:
    task_id = f"{kind(n)}-{n}"
    if done.get(task_id) != "confirmed":
        with ledger.sending(task_id):
            app.send_task(f"tasks.{kind(n)}", [n], task_id=task_id)


if __name__ == "__main__":
    with Dray(config="dray.yaml") as application:
        send_all(application, Ledger("ledger.jsonl"))
