"""What one snapshot of the board costs, on each recorded tree and on this machine.

python benchmarks/snapshot_cost.py
"""

import os
import statistics
import time
from pathlib import Path

from nestd.daemon.elastic.resources import Sampler

RECORDED = Path(__file__).parents[1] / "tests/recorded"


def main() -> None:
    print("| root | ms a snapshot (median of 200) |\n|---|---|")
    for root in (*sorted(path for path in RECORDED.iterdir() if path.is_dir()), Path("/")):
        sampler = Sampler(root, environ={})
        times = []
        for _ in range(200):
            start = time.perf_counter()
            sampler.sample([os.getpid()])
            times.append(time.perf_counter() - start)
        print(f"| {root.name or '/'} | {statistics.median(times) * 1e3:.2f} |")


if __name__ == "__main__":
    main()
