"""The Markdown of switch.py's report."""

from __future__ import annotations

import statistics
from functools import reduce
from typing import Any


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown: medians of its rounds, and llama.cpp's time over nestd's."""
    machine, versions = report["machine"], report["versions"]
    peers = list(report["runs"])
    loads = ", ".join(f"{load:.1f}" for load in report["load averages"])
    lines = [
        "# Another size in the middle of an answer",
        "",
        "nestd: one loaded int4 engine of E4B's shape is told to go on on the other size.",
        "llama.cpp: free the model, load the other one's Q4_0 file, read the conversation again.",
        f"The same random weights. Medians of {report['rounds']} rounds in turn; files warm in the",
        "page cache. The ratio is that of the faster llama.cpp to nestd.",
        "",
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores,",
        f"commit {machine['commit']}; onnxruntime {versions['onnxruntime']}, llama-cpp-python",
        f"{versions['llama-cpp-python']} (built for this CPU,",
        f"OMP_WAIT_POLICY {report['OMP_WAIT_POLICY']}).",
        f"Load average before and after each round: {loads}; the benchmark itself makes 2.",
        report["note"],
    ]
    for prompt in next(iter(report["runs"].values())):
        lines += [
            "",
            f"## After a prompt of {prompt} tokens and {report['answer tokens']} of the answer",
            "",
            "| | " + " | ".join(peers) + " | ratio |",
            "|---|" + "---|" * (len(peers) + 1),
        ]
        runs = [report["runs"][peer][prompt] for peer in peers]
        for name in ("E2B", "E4B"):
            for part in PARTS:
                lines += row(f"to {name}: {part}, ms", runs, f"to {name}", part)
        for name in ("E4B", "E2B"):
            lines += row(f"{name}, a decode step, ms", runs, f"step {name}")
        lines += row("E4B, load, ms", runs, "load E4B")
        for label, key in RESIDENT.items():
            cells = [resident(peer, key) for peer in runs]
            lines.append(f"| RSS (anonymous + file), MB: {label} | " + " | ".join(cells) + " | |")
        read = [statistics.median(item["read from storage"] for item in peer) for peer in runs]
        cells = [f"{value / 1e6:.1f}" for value in read]
        lines.append("| read from storage in a round, MB | " + " | ".join(cells) + " | |")
    load = statistics.median(report["nestd start, ms"])
    lines += [
        "",
        f"nestd's engine, from the start of its process to ready: {load:.0f} ms.",
        "",
    ]
    return "\n".join(lines)


PARTS = (
    "first token",
    "first token, worst",
    "in effect",
    "in effect, worst",
    "memory back",
    "memory back after effect",
    "free",
    "load",
    "prefill",
)
RESIDENT = {
    "E4B": "memory E4B",
    "given up for E2B": "memory freed for E2B",
    "E2B": "memory after E2B",
    "given up for E4B": "memory freed for E4B",
    "E4B again": "memory after E4B",
}


def figure(rounds: list[dict[str, Any]], *path: str) -> float | None:
    """Return the median over the rounds, or the largest for a name that ends in `, worst`."""
    *parents, leaf = path
    name = leaf.removesuffix(", worst")
    values = []
    for item in rounds:
        found = reduce(lambda part, key: part.get(key, {}), parents, item)
        if name not in found:
            return None
        values.append(found[name])
    return float(statistics.median(values) if leaf == name else max(values))


def row(label: str, runs: list[list[dict[str, Any]]], *path: str) -> list[str]:
    """Return the table's row, none where nobody has the figure."""
    values = [figure(rounds, *path) for rounds in runs]
    if all(value is None for value in values):
        return []
    cells = ["" if value is None else f"{value:.1f}" for value in values]
    ratio = ""
    if all(value is not None for value in values):
        own, *others = (value for value in values if value is not None)
        ratio = (
            f"{min(others) / own:.0f} times"
            if min(others) > 10 * own
            else f"{min(others) / own:.2f}"
        )
    return [f"| {label} | " + " | ".join(cells) + f" | {ratio} |"]


def resident(rounds: list[dict[str, Any]], key: str) -> str:
    if key not in rounds[0]:
        return ""
    parts = ("rss", "anonymous", "file")
    rss, anonymous, file = (
        statistics.median(item[key][part] for item in rounds) / 1e6 for part in parts
    )
    return f"{rss:.0f} ({anonymous:.0f} + {file:.0f})"
