"""Replays a simulated day through a recorded tree, the sampler and the policy.

    python benchmarks/day/replay.py        (needs matplotlib)

Writes docs/elastic-day.md (the timeline as a table) and docs/images/elastic-day.png.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from world import BROWSER, HEAT, IMAGES, MAINS_BACK, MAINS_LOST, World

from nestd.bundle.manifest import Manifest
from nestd.daemon.config import load_settings
from nestd.daemon.elastic.cost import ModelCost
from nestd.daemon.elastic.plan import Plan, RequestMix
from nestd.daemon.elastic.policy import PolicyState, decide
from nestd.daemon.elastic.resources import Sampler, Snapshot

REPOSITORY = Path(__file__).parents[2]
RECORDED = REPOSITORY / "tests/recorded"
PROFILE = "raspberry-pi-5-8gb"
STEP_S = 5.0

INK, GRID, ACCENT, WARM, SHADE = "#1f2933", "#d5dbe1", "#2667b5", "#c2410c", "#f3d9c9"


@dataclass(frozen=True)
class Moment:
    """One tick: the hour of the day, what was seen, what was decided."""

    hour: float
    snapshot: Snapshot
    plan: Plan


def replay() -> tuple[list[Moment], ModelCost]:
    settings = load_settings(profile=PROFILE, environ={}, root=Path("/nonexistent"))
    manifest = Manifest.model_validate_json((RECORDED / "e4b-int4/manifest.json").read_text())
    cost = ModelCost.of(manifest, settings)
    state, moments, load = PolicyState(), [], 1.0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "board"
        shutil.copytree(RECORDED / "raspberry-pi-5", root)
        world = World(root)
        world.prepare()
        sampler = Sampler(root, environ={})
        for tick in range(int(24 * 3600 / STEP_S)):
            seconds = tick * STEP_S
            hour = seconds / 3600
            world.tick(hour, STEP_S, load)
            wanted = frozenset({"vision"}) if world.images(hour) else frozenset()
            snapshot = sampler.sample(now=seconds)
            state = decide(snapshot, settings, manifest, RequestMix(wanted), state)
            plan = state.plan
            moments.append(Moment(hour, snapshot, plan))
            name = plan.submodel.value
            load = manifest.submodel(name).effective_params / 3.98e9 if name else 0.0
            if plan.threads.value == settings.elastic.power.constrained_threads:
                load *= 0.6
    return moments, cost


def clock(hour: float) -> str:
    seconds = round(hour * 3600)
    return f"{seconds // 3600:02d}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


def changes(moments: list[Moment]) -> list[tuple[str, ...]]:
    """Return a row for each tick at which what runs changed."""
    rows, before = [], None
    for moment in moments:
        plan, seen = moment.plan, moment.snapshot
        key = (plan.submodel.value, plan.threads.value, plan.modalities.value)
        if key != before:
            before = key
            why = plan.submodel.reason
            if plan.modalities.value or "vision" in plan.modalities.reason:
                why += f"; {plan.modalities.reason}"
            rows.append(
                (
                    clock(moment.hour),
                    plan.submodel.value or f"none ({plan.refusal.code})",
                    str(plan.threads.value),
                    ", ".join(plan.modalities.value) or "-",
                    f"{seen.power.battery_percent:.0f} %",
                    f"{seen.thermal.celsius:.0f} °C",
                    f"{seen.memory.available_bytes / 2**30:.1f} GB",
                    why,
                )
            )
    return rows


def climbs(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Join the rungs of one climb into one row, from the first to the last of them."""
    joined: list[tuple[str, ...]] = []
    climbing = False
    for row in rows:
        grows = row[-1].startswith("grows after")
        if grows and climbing:
            first = joined[-1][1].partition(" ... ")[0]
            joined[-1] = (joined[-1][0], f"{first} ... {row[1]}", *joined[-1][2:])
        else:
            joined.append(row)
        climbing = grows
    return joined


def write_table(moments: list[Moment], path: Path) -> None:
    rows = changes(moments)
    joules = moments[-1].snapshot.power.joules
    pictures = ", ".join(clock(start)[:5] for start, _ in IMAGES)
    text = [
        "# A day of the policy",
        "",
        "A simulated day of a Raspberry Pi 5 with 8 GB on a UPS board (74 Wh), replayed through",
        "the recorded tree `tests/recorded/raspberry-pi-5`, the sampler and the policy, with the",
        f"profile `{PROFILE}`, {STEP_S:.0f} s a step, and the published sub-models of",
        "E4B at 4 bits. What the plan runs decides the simulated watts, heat and battery drain;",
        "those constants are plausible, not measured. Made by `python benchmarks/day/replay.py`.",
        "",
        "![The day as a plot](images/elastic-day.png)",
        "",
        f"- mains fails at {clock(MAINS_LOST)[:5]} and is back at {clock(MAINS_BACK)[:5]}, through",
        "  an adapter that sags twice;",
        f"- another program holds 3.4 GB from {clock(BROWSER[0])[:5]} to {clock(BROWSER[1])[:5]};",
        f"- the sun is on the box from {clock(HEAT[0])[:5]} to {clock(HEAT[1])[:5]};",
        f"- pictures come at {pictures};",
        f"- {joules / 3600:.0f} Wh in all, as the simulated PMIC told it.",
        "",
        "Rungs climbed one after the other are one row.",
        "",
        "| time | runs on | threads | encoders | battery | heat | free | why |",
        "|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in climbs(rows)),
    ]
    path.write_text("\n".join(text) + "\n")


def plot(moments: list[Moment], cost: ModelCost, path: Path) -> None:
    names = ["refused", *(item.name for item in cost.ladder)]
    hours = [moment.hour for moment in moments]
    plt.rcParams.update({"font.size": 9, "axes.edgecolor": GRID, "text.color": INK})
    figure, axes = plt.subplots(
        4, 1, figsize=(11, 9), sharex=True, height_ratios=[3, 1.2, 1.2, 1.2], layout="constrained"
    )
    ladder, battery, heat, memory = axes
    rungs = [names.index(moment.plan.submodel.value or "refused") for moment in moments]
    ladder.step(hours, rungs, where="post", color=ACCENT, linewidth=1.6)
    ladder.fill_between(hours, rungs, step="post", color=ACCENT, alpha=0.12)
    ladder.set_yticks(range(len(names)), names)
    ladder.set_title("What runs: sub-model of the ladder", loc="left")
    vision = ["vision" in moment.plan.modalities.value for moment in moments]
    ladder.fill_between(hours, -0.45, -0.15, where=vision, step="post", color=WARM, linewidth=0)
    ladder.text(0.1, -0.42, "orange: vision encoder loaded", fontsize=7.5, va="bottom")
    ladder.set_ylim(-0.5, len(names) - 0.5)

    battery.plot(hours, [m.snapshot.power.battery_percent for m in moments], color=INK)
    for threshold in (5, 20, 50):
        battery.axhline(threshold, color=WARM, linewidth=0.7, linestyle=":")
    battery.set_title("Battery, % (dotted: critical, low, saver)", loc="left")
    battery.set_ylim(0, 105)

    heat.plot(hours, [m.snapshot.thermal.celsius for m in moments], color=INK)
    heat.axhline(82, color=WARM, linewidth=0.9)
    heat.axhline(74, color=WARM, linewidth=0.7, linestyle=":")
    weak = [m.hour for m in moments if m.snapshot.power.under_voltage]
    heat.plot(weak, [35] * len(weak), "|", color=WARM, markersize=9)
    heat.set_title(
        "Processor, °C (line: throttling, dotted: soft margin; ticks: under-voltage)", loc="left"
    )
    heat.set_ylim(30, 90)

    free = [m.snapshot.memory.available_bytes / 2**30 for m in moments]
    stages = {(s.submodel.name, s.context_length): s for s in cost.stages}
    needs = []
    for moment in moments:
        plan = moment.plan
        stage = stages.get((plan.submodel.value, plan.context_length.value))
        needs.append(cost.bytes_of(stage, plan.modalities.value) / 2**30 if stage else 0.0)
    memory.step(hours, free, where="post", color=INK, label="free")
    memory.step(hours, needs, where="post", color=ACCENT, label="planned with")
    memory.set_title("Memory, GB (black: free, blue: planned with)", loc="left")
    memory.set_ylim(0, 8)

    for axis in axes:
        axis.grid(axis="both", color=GRID, linewidth=0.5)
        axis.set_axisbelow(True)
        axis.axvspan(MAINS_LOST, MAINS_BACK, color=SHADE, alpha=0.35, linewidth=0)
        axis.spines[["top", "right"]].set_visible(False)
    memory.set_xticks(range(0, 25, 2), [f"{hour:02d}:00" for hour in range(0, 25, 2)])
    memory.set_xlim(0, 24)
    figure.suptitle(
        "A simulated day: Raspberry Pi 5, 8 GB, on a UPS board (shaded: on battery)",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    moments, cost = replay()
    docs = REPOSITORY / "docs"
    write_table(moments, docs / "elastic-day.md")
    (docs / "images").mkdir(exist_ok=True)
    plot(moments, cost, docs / "images/elastic-day.png")
    print(f"{len(changes(moments))} changes; wrote docs/elastic-day.md and its picture")


if __name__ == "__main__":
    main()
