"""``python -m benchmarks [--smoke] [--scale X] [MEASURE ...]``: one JSON line a measure, peers in the same run.

``python -m benchmarks brokers|table|chart ...``: RabbitMQ and Redis, with the peers; see ``brokers --help``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

from benchmarks.hidden_costs import hidden_costs
from benchmarks.measures import MEASURES, measure

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import run as peers

measure(hidden_costs)
PEER_MEASURES = (("enqueue", False), ("drain", False), ("drain", True), ("roundtrip", True))


def main() -> int:
    if sys.argv[1:2] in (["brokers"], ["table"], ["chart"]):
        return _command(sys.argv[1], sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measures", nargs="*", help=f"of {', '.join(MEASURES)}; all by default")
    parser.add_argument("--smoke", action="store_true", help="small numbers and no peers: that they run at all")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size")
    parser.add_argument("--no-peers", action="store_true")
    given = parser.parse_args()
    unknown = [name for name in given.measures if name not in MEASURES]
    if unknown:
        parser.error(f"no measure {unknown[0]!r}")
    scale = 0.02 if given.smoke else given.scale
    print(json.dumps({"machine": platform.machine(), "python": platform.python_version(), "scale": scale}), flush=True)
    for name in given.measures or MEASURES:
        began = time.monotonic()
        figures = MEASURES[name](scale)
        took = round(time.monotonic() - began, 1)
        print(json.dumps({"measure": name, **figures, "took_s": took}), flush=True)
    if not (given.smoke or given.no_peers or given.measures):
        for peer in peers.EMBEDDED:
            for what, results in PEER_MEASURES:
                count = 500 if what == "roundtrip" else 5000
                try:
                    print(json.dumps(peers.measure(peer, what, int(count * min(scale, 1)), results)), flush=True)
                except peers.PeerError as error:
                    print(json.dumps({"peer": peer, "measure": what, "error": str(error)}), flush=True)
    return 0


def _command(name: str, words: list[str]) -> int:
    if name == "brokers":
        from benchmarks import brokers

        return brokers.main(words)
    parser = argparse.ArgumentParser(f"python -m benchmarks {name}")
    parser.add_argument("file", type=Path, help="what `brokers --json` wrote")
    if name == "table":
        parser.add_argument("--markdown", action="store_true", help="as it stands in docs/performance.md")
    given = parser.parse_args(words)
    report = json.loads(given.file.read_text())
    if name == "chart":
        from benchmarks import chart

        return chart.main(report)
    from benchmarks import tables

    if given.markdown:
        print(tables.markdown(report))
    else:
        tables.show(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
