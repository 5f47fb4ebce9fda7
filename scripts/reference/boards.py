"""The tables of docs/boards/: which sizes fit a board, computed as `nestd plan` does.

A table stands between two comments of a page that is written by hand, so that the repository shows
it, too. The bundle is docs/boards/manifest.json: that of the benchmarks, E4B's shapes at 4 bits
with encoders at 8 (random weights; the bytes are those of the real ones).
"""

from __future__ import annotations

import re
from pathlib import Path

from nestd.bundle.manifest import Manifest
from nestd.daemon.config import load_settings
from nestd.daemon.elastic.cost import ModelCost
from nestd.daemon.elastic.limits import cap_params
from nestd.daemon.units import format_bytes

BOARDS = Path(__file__).parents[2] / "docs" / "boards"
BLOCK = re.compile(r"(<!-- ladder (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
# GB/s that programs get, as in the profiles' comments; of a Jetson's CPU cores we know none.
BANDWIDTH = {
    "raspberry-pi-4-4gb": 4,
    "raspberry-pi-4-8gb": 4,
    "raspberry-pi-5-4gb": 10,
    "raspberry-pi-5-8gb": 10,
    "raspberry-pi-5-16gb": 10,
}


def filled(page: Path) -> str:
    """Return the text of a board's page with its tables computed anew."""
    text = page.read_text(encoding="utf-8")
    return BLOCK.sub(lambda match: f"{match[1]}\n{table(match[2])}\n\n{match[3]}", text)


def table(profile: str) -> str:
    """Return what each size of the ladder needs on the board of `profile`."""
    manifest = Manifest.model_validate_json((BOARDS / "manifest.json").read_text(encoding="utf-8"))
    settings = load_settings(profile=profile, environ={}, root=Path("/nonexistent"))
    cost = ModelCost.of(manifest, settings)
    allowed = cap_params(settings.elastic, cost)
    reserve = settings.elastic.memory.reserve_bytes
    bandwidth = BANDWIDTH.get(profile)
    head = ["size", "context", "nestd needs", "must be free", "and for pictures", "and for sound"]
    head += ["at most, tokens/s"] * (bandwidth is not None)
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for stage in cost.stages:
        item = stage.submodel
        if item.effective_params > allowed:
            continue
        needs = [cost.bytes_of(stage, kinds) for kinds in ((), ("vision",), ("audio",))]
        free = [format_bytes(need + reserve) for need in needs]
        cells = [item.name, str(stage.context_length), format_bytes(needs[0]), *free]
        if bandwidth is not None:
            cells.append(f"{bandwidth * 1e9 / item.bytes_per_token:.1f}")
        rows.append(f"| {' | '.join(cells)} |")
    beyond = [rung.name for rung in cost.ladder if rung.effective_params > allowed]
    if beyond:
        rows += ["", f"Above the profile's cap: {', '.join(beyond)}."]
    return "\n".join(rows)
