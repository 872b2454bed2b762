"""One chart from the runs of ``python -m benchmarks brokers``: drain rates on RabbitMQ and Redis, dray and its peers.

On a card of its own, so that it reads on light and on dark pages. matplotlib is needed here and nowhere else.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.contests import QUORUM_DRAIN, QUORUM_DRAIN_RESULTS, REDIS_DRAIN, REDIS_DRAIN_RESULTS, Contest
from benchmarks.tables import ratios, values

ASSETS = Path(__file__).resolve().parent.parent / "docs" / "assets"
PANELS = (
    ("RabbitMQ, results off", QUORUM_DRAIN),
    ("RabbitMQ, results in Redis", QUORUM_DRAIN_RESULTS),
    ("Redis, results off", REDIS_DRAIN),
    ("Redis, results in Redis", REDIS_DRAIN_RESULTS),
)
NAMES = {
    "dray": "dray", "dramatiq": "Dramatiq", "celery": "Celery, prefork", "celery-solo": "Celery, 2 × solo",
    "taskiq": "taskiq", "huey": "Huey", "saq": "SAQ", "rq": "RQ",
}  # fmt: skip
CARD, INK, FAINT, OURS, THEIRS = "#fbfbf9", "#1f2328", "#6b7280", "#c2410c", "#94a3b8"
Rates = dict[str, dict[int, float]]
"""Tasks a second of each participant in each round."""


def main(report: dict[str, Any]) -> int:
    """Draw; 1 when there is nothing to draw, or nothing to draw with."""
    panels = [(title, _rates(report, contest)) for title, contest in PANELS]
    if not all(rates.get("dray") for _, rates in panels):
        print("a drain of dray is missing in that file: the chart needs a whole run", file=sys.stderr)
        return 1
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("the chart needs matplotlib: `make bench-chart` gets it and draws", file=sys.stderr)
        return 1
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "dray", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure = _draw(panels, report)
    ASSETS.mkdir(exist_ok=True)
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        path = ASSETS / f"drain-rates.{kind}"
        figure.savefig(path, dpi=130, facecolor=CARD, metadata=metadata)
        print(path)
    return 0


def _rates(report: dict[str, Any], contest: Contest) -> Rates:
    found = {who: values(report, who, contest, "per_s") for who in ("dray", *(peer for peer, _ in contest.peers))}
    return {who: rounds for who, rounds in found.items() if rounds}


def _draw(panels: list[tuple[str, Rates]], report: dict[str, Any]) -> Any:
    from matplotlib import pyplot

    heights = [max(len(rates) for _, rates in panels[at : at + 2]) for at in (0, 2)]
    figure, axes = pyplot.subplots(
        2, 2, figsize=(10.5, 0.32 * sum(heights) + 2.2), sharex="row", height_ratios=heights, layout="constrained"
    )
    figure.suptitle("No-op tasks a second, draining a filled queue", color=INK, fontweight="bold")
    for panel, (title, rates) in zip(axes.flat, panels, strict=True):
        _panel(panel, title, rates)
    machine, names = report["machine"], {"rabbitmq": "RabbitMQ", "redis": "Redis"}
    brokers = ", ".join(f"{names[name]} {version}" for name, version in sorted(report["servers"].items()))
    figure.supxlabel(
        f"{machine['cores']} cores, broker and worker on one machine; median of {len(panels[0][1]['dray'])} rounds, "
        "line: least to most. On RabbitMQ dray uses a quorum queue, the others classic ones.\n"
        f"{brokers}, dray {report['versions']['dray']}, Python {report['versions']['python']}, {report['at'][:10]}",
        fontsize=8, color=FAINT,
    )  # fmt: skip
    return figure


def _panel(panel: Any, title: str, rates: Rates) -> None:
    """Bars, the best on top, each with its rate and how many times better dray is."""
    median = {who: statistics.median(rounds.values()) for who, rounds in rates.items()}
    order = sorted(median, key=median.__getitem__)
    panel.set_facecolor(CARD)
    panel.set_title(title, loc="left", fontsize=10, color=INK)
    panel.barh(
        [NAMES[who] for who in order], [median[who] for who in order], height=0.72,
        color=[OURS if who == "dray" else THEIRS for who in order],
    )  # fmt: skip
    for at, who in enumerate(order):
        most = max(rates[who].values())
        panel.plot([min(rates[who].values()), most], [at, at], color=INK, linewidth=1.2, solid_capstyle="butt")
        text = f"{median[who]:,.0f}"
        if who != "dray":
            text += f"  (dray: {statistics.median(ratios(rates['dray'], rates[who], True)):.1f} ×)"
        panel.annotate(
            text, (most, at), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8, color=INK,
            fontweight="bold" if who == "dray" else "normal",
        )  # fmt: skip
    panel.margins(x=0.16)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.tick_params(colors=FAINT, labelsize=8, labelbottom=True)
    panel.tick_params(axis="y", colors=INK, length=0)
    panel.grid(axis="x", color=FAINT, alpha=0.25, linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color(FAINT)
