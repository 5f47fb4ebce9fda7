"""Break things around a node, count what its clients get, write the figures down.

    python benchmarks/faults/run.py [SCENARIO ...] [--scale 1] [--out benchmarks/results]

Needs Mosquitto. A scale of 1 is the full run (about 25 minutes); tests/test_faults.py runs a small
one. Exit status 1 if a promise did not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import scenarios
from scenarios import SCENARIOS

INTRODUCTION = """# Faults

`python benchmarks/faults/run.py --out benchmarks/results`: a node with pocket on real Mosquitto,
broken on purpose. `lost`: no final event ever came. `contradictory`: a client got two different
final events under one id. The soak ran on random tiny encoders (tests/support/multimodal.py).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", nargs="*", choices=[*SCENARIOS, []], help="default: all")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="directory for faults.json and faults.md")
    parser.add_argument("--bundle", type=Path, help="a bundle with encoders, for soak")
    args = parser.parse_args()
    scenarios.BUNDLE_WITH_ENCODERS = args.bundle
    results: dict[str, dict[str, Any]] = {}
    for name in args.scenario or SCENARIOS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            figures = SCENARIOS[name](Path(work), args.scale)
        results[name] = figures | {"seconds": round(time.monotonic() - began)}
        print(json.dumps({name: results[name]}), flush=True)
    if args.out is not None:
        write(args.out, results)
    sys.exit(0 if all(figures["ok"] for figures in results.values()) else 1)


def write(out: Path, results: dict[str, dict[str, Any]]) -> None:
    """Merge into faults.json, and write the table anew."""
    path = out / "faults.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known |= results
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    lines = [INTRODUCTION]
    for name, figures in known.items():
        first, *_ = (SCENARIOS[name].__doc__ or "").splitlines()
        lines += [f"## {name.replace('_', ' ')}", "", first, ""]
        lines += [f"- {key.replace('_', ' ')}: {words(value)}" for key, value in figures.items()]
        lines.append("")
    (out / "faults.md").write_text("\n".join(lines), encoding="utf-8")


def words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return {"True": "yes", "False": "no"}.get(str(value), str(value))


if __name__ == "__main__":
    main()
