"""The Markdown and the picture of run.py's rows. The picture needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from artefacts import FEWER_BYTES

Row = dict[str, Any]
COLOURS = {
    "nestd": "#2a6f97",
    FEWER_BYTES: "#61a5c2",
    "llama.cpp": "#c77d3c",
    "llama.cpp, not repacked": "#e3b587",
    "mistral.rs": "#6b8f47",
    "transformers": "#8a8a8a",
}


def table(rows: list[Row], name: str) -> str:
    """Return the rows as Markdown: medians (least - most). `name`.svg lies beside it."""
    lengths = sorted({rate["prompt_tokens"] for row in rows for rate in row["runs"][0]["rates"]})
    heads = ["size", "", "weights"]
    heads += [f"prefill {count}" for count in lengths]
    heads += [f"decode after {count}" for count in lengths]
    heads += ["weights read, GB/s", "of what the machine reads"]
    heads += ["load, s", "load and first token, s", "peak RSS, MB", "steady RSS, MB", "disk, MB"]
    heads += ["measured with"]
    lines = [
        "# nestd beside other runtimes",
        "",
        "`python benchmarks/peers/run.py`; [the benchmarks' page](../benchmarks.md) says",
        "what each figure means. Random weights: speed, memory and bytes only. Tokens per second;",
        "medians (least - most). RSS is anonymous + file-backed, at its peak the most of each.",
        "nestd's two sizes are one bundle; its bytes on disk, prepared weights included, stand in",
        "both rows.",
        "",
        f"![Prefill, decode and memory of each]({name}.svg)",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for row in rows:
        cells = [row["size"], row["peer"], row["weights"]]
        cells += [spread(rates(row, count, "prefill"), 0) for count in lengths]
        cells += [spread(rates(row, count, "decode"), 1) for count in lengths]
        cells += reading(row, lengths[0])
        cells += [spread((run[key] for run in row["runs"]), 2) for key in LOADING]
        cells += [memory(row["peaks"]), memory([run["steady"] for run in row["runs"]])]
        cells += [f"{row['disk_bytes'] / 1e6:.0f}", about(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


LOADING = ("load_seconds", "first_token_seconds")


def rates(row: Row, prompt: int, part: str) -> list[float]:
    """Return `part` of every run after a prompt of this length, nothing if there was none."""
    every = (rate for run in row["runs"] for rate in run["rates"])
    return [rate[part] for rate in every if rate["prompt_tokens"] == prompt]


def reading(row: Row, prompt: int) -> list[str]:
    """Return the bytes of weights that decoding reads, and their share of the read bandwidth."""
    if not row["token_bytes"]:
        return ["", ""]
    read = [rate * row["token_bytes"] for rate in rates(row, prompt, "decode")]
    shares = [part / all_ for part, all_ in zip(read, row["read_bytes_per_second"], strict=True)]
    return [
        spread((part / 1e9 for part in read), 1),
        f"{spread((100 * share for share in shares), 0)} %",
    ]


def spread(values: Iterable[float], digits: int) -> str:
    found = sorted(values)
    if not found:
        return ""
    least, most = f"{found[0]:.{digits}f}", f"{found[-1]:.{digits}f}"
    return f"{statistics.median(found):.{digits}f} ({least} - {most})"


def memory(items: list[dict[str, int]]) -> str:
    rss, anonymous, file = (
        statistics.median(item[part] for item in items) / 1e6
        for part in ("rss", "anonymous", "file")
    )
    return f"{rss:.0f} ({anonymous:.0f} + {file:.0f})"


def about(row: Row) -> str:
    machine = row["machine"]
    loads = row["load averages"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']}, {row['version']}, "
        f"commit {machine['commit']}, {len(row['runs'])} runs, answers of {row['decode_tokens']}, "
        f"load average {min(loads):.1f} - {max(loads):.1f}, "
        f"reads {spread((rate / 1e9 for rate in row['read_bytes_per_second']), 0)} GB/s"
    )


def plot(rows: list[Row], path: Path) -> None:
    """Draw prefill, decode and memory of every size and width, peers side by side."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "nestd", "font.size": 9})
    import matplotlib.pyplot as plt

    lengths = sorted({rate["prompt_tokens"] for row in rows for rate in row["runs"][0]["rates"]})
    middle = lengths[len(lengths) // 2]
    panels: dict[str, Callable[[Row], float]] = {
        f"prefill of {middle}, tokens/s": lambda row: _median(rates(row, middle, "prefill")),
        f"decode after {middle}, tokens/s": lambda row: _median(rates(row, middle, "decode")),
        "resident while it runs, GB\n(solid: anonymous)": lambda row: _gigabytes(row, "rss"),
    }
    groups = sorted({(row["size"], row["bits"]) for row in rows})
    peers = [peer for peer in COLOURS if any(row["peer"] == peer for row in rows)]
    width = 0.8 / len(peers)
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 2.8), layout="constrained")
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for row in rows:
            place = groups.index((row["size"], row["bits"])) + width * peers.index(row["peer"])
            stacked = title.startswith("resident")
            colour = COLOURS[row["peer"]]
            axis.bar(place, value(row), width, color=colour, alpha=0.4 if stacked else 1.0)
            if stacked:
                axis.bar(place, _gigabytes(row, "anonymous"), width, color=colour)
        axis.set_title(title, fontsize=9)
        places = [number + width * (len(peers) - 1) / 2 for number in range(len(groups))]
        axis.set_xticks(places, [f"{size}\n{bits} bits" for size, bits in groups])
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[peer]) for peer in peers]
    figure.legend(handles, peers, loc="outside lower center", ncols=len(peers), frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


def _gigabytes(row: Row, part: str) -> float:
    return statistics.median(run["steady"][part] for run in row["runs"]) / 1e9
