"""``python -m benchmarks [--smoke] [--scale X] [MEASURE ...]``: one JSON line a measure, peers in the same run."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

from benchmarks.measures import MEASURES

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import run as peers

PEER_MEASURES = (("enqueue", False), ("drain", False), ("drain", True), ("roundtrip", True))


def main() -> int:
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
        for peer in peers.PEERS:
            for what, results in PEER_MEASURES:
                count = 500 if what == "roundtrip" else 5000
                try:
                    print(json.dumps(peers.measure(peer, what, int(count * min(scale, 1)), results)), flush=True)
                except peers.PeerError as error:
                    print(json.dumps({"peer": peer, "measure": what, "error": str(error)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
