"""What the runs of ``python -m benchmarks brokers`` say: goals, and ratios against the peers."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.contests import CONTESTS, DEEP, DEEP_GOAL, ORDINARY, REACHES, SHALLOW, Contest, Reach

Report = dict[str, Any]
PEER_FIGURES = {"drain": "per_s", "latency": "p50_ms", "memory": "idle_mb"}
TITLES = {"drain": "drain, tasks a second", "latency": "round trip, median, ms", "memory": "idle worker, MB"}


QUEUES = {"quorum": "RabbitMQ, dray on a quorum queue", "classic": "RabbitMQ, classic queues", "redis": "Redis"}
GOAL_COLUMNS = ("measure", "goal", "median", "least", "most", "")
PEER_COLUMNS = ("who", "median", "least", "most", "dray is better by")


def show(report: Report) -> None:
    """Print the goals, then each contest against the peers."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150, highlight=False)
    for title, columns, rows in sections(report):
        drawn = Table(*columns, title=title, title_justify="left")
        for row in rows:
            drawn.add_row(*row)
        console.print(drawn)
    for run in report["runs"]:
        if "error" in run:
            console.print(f"failed: {run['who']} {run['contest']}: {run['error'].strip().splitlines()[-1][:200]}")
        if run.get("left") and run["measure"] != "send":
            console.print(f"not settled: {run['left']} tasks of {run['who']} {run['contest']}, round {run['round']}")


def markdown(report: Report) -> str:
    """The same as it stands in docs/performance.md."""
    parts = []
    for title, columns, rows in sections(report):
        lines = [columns, ["---"] * len(columns), *rows]
        parts.append("\n".join([f"**{title}**\n", *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join(parts)


def sections(report: Report) -> Iterator[tuple[str, Sequence[str], list[tuple[str, ...]]]]:
    """Title, columns and rows of each table that has rows."""
    goals = list(goal_rows(report))
    if goals:
        yield "dray against its goals", GOAL_COLUMNS, goals
    for contest in CONTESTS:
        rows = list(peer_rows(report, contest))
        if rows:
            results = ", results in Redis" if contest.results else ""
            name = f"{QUEUES[contest.queue]}: {TITLES[contest.measure]}{results}"
            yield name, PEER_COLUMNS, rows


def values(report: Report, who: str, contest: Contest, figure: str) -> dict[int, float]:
    """A figure of each round."""
    runs = [run for run in report["runs"] if run["who"] == who and run["contest"] == contest.key]
    return {run["round"]: run[figure] for run in runs if run.get(figure) is not None}


def goal_rows(report: Report) -> Iterator[tuple[str, ...]]:
    for reach in REACHES:
        found = list(values(report, "dray", reach.contest, reach.figure).values())
        if found:
            yield _goal_row(reach, found)
    for queue, deep in DEEP.items():
        many = list(values(report, "dray", deep, "per_s").values())
        few = [list(values(report, "dray", contest[queue], "per_s").values()) for contest in (SHALLOW, ORDINARY)]
        if many and any(few):
            yield _depth_row(queue, statistics.median(many), max(statistics.median(found) for found in few if found))


def _depth_row(queue: str, deep: float, shallow: float) -> tuple[str, ...]:
    """``shallow``: the better of ten thousand queued and of the ordinary drain, for a short one is half start."""
    ratio = deep / shallow
    met = "met" if ratio >= DEEP_GOAL else "missed"
    title = f"{QUEUES[queue]}, drain with 1,000,000 queued against 10,000"
    return title, f">= {DEEP_GOAL}", f"{ratio:.2f}", "", "", met


def _goal_row(reach: Reach, found: list[float]) -> tuple[str, ...]:
    median = statistics.median(found)
    met = median >= reach.goal if reach.at_least else median <= reach.goal
    goal = f"{'>=' if reach.at_least else '<='} {number(reach.goal)}"
    return reach.title, goal, number(median), number(min(found)), number(max(found)), "met" if met else "missed"


def peer_rows(report: Report, contest: Contest) -> Iterator[tuple[str, ...]]:
    """dray and the peers, the best first, with the ratios of the rounds: least, median, most."""
    if contest.measure not in PEER_FIGURES:
        return
    figure, rates = PEER_FIGURES[contest.measure], contest.measure == "drain"
    found = {who: values(report, who, contest, figure) for who in ("dray", *(peer for peer, _ in contest.peers))}
    found = {who: rounds for who, rounds in found.items() if rounds}
    if len(found) < 2 or "dray" not in found:
        return
    order = sorted(found, key=lambda who: statistics.median(found[who].values()), reverse=rates)
    for who in order:
        rounds = found[who]
        spread = [number(pick(rounds.values())) for pick in (statistics.median, min, max)]
        yield who, *spread, "" if who == "dray" else _ratio_text(ratios(found["dray"], rounds, rates))


def ratios(dray: dict[int, float], peer: dict[int, float], rates: bool) -> list[float]:
    """How many times better dray was in each round that both took part in."""
    shared = dray.keys() & peer.keys()
    return [dray[at] / peer[at] if rates else peer[at] / dray[at] for at in sorted(shared)]


def _ratio_text(found: list[float]) -> str:
    if not found:
        return ""
    least, median, most = min(found), statistics.median(found), max(found)
    return f"{median:.1f} x ({least:.1f} to {most:.1f})"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
