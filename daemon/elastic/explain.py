"""Tells in words what the policy sees and decides: the text of `nestd plan`."""

from __future__ import annotations

from collections.abc import Iterator

from nestd.bundle.errors import NestdError
from nestd.bundle.manifest import Manifest
from nestd.daemon.elastic.cost import ModelCost
from nestd.daemon.elastic.limits import budget, margin_c
from nestd.daemon.elastic.plan import Choice, Plan
from nestd.daemon.elastic.remote import choose_remote
from nestd.daemon.elastic.resources import Snapshot
from nestd.daemon.elastic.task import Task, choose
from nestd.daemon.remote.settings import Consent
from nestd.daemon.settings import Settings
from nestd.daemon.units import format_bytes


def explain(
    snapshot: Snapshot,
    settings: Settings,
    manifest: Manifest,
    plan: Plan,
    task: Task,
    consent: Consent,
) -> Iterator[str]:
    """Yield the lines: the board, the stages and what they need, the plan, the request."""
    yield f"profile  {settings.profile}"
    yield f"bundle   {manifest.name}"
    yield f"board    {', '.join(_facts(snapshot, settings)) or 'it tells nothing'}"
    free = budget(snapshot.memory, settings.elastic)
    if free is not None:
        reserve = settings.elastic.memory.reserve_bytes
        yield f"budget   {format_bytes(free)} after {format_bytes(reserve)} for other programs"

    yield ""
    yield "  sub-model       params    MMLU   context     needs"
    cost = ModelCost.of(manifest, settings)
    for stage in reversed(cost.stages):
        item = stage.submodel
        need = cost.bytes_of(stage, plan.modalities.value)
        here = (item.name, stage.context_length) == (
            plan.submodel.value,
            plan.context_length.value,
        )
        fits = "" if free is None else _fits(need, free, settings)
        score = "-" if item.mmlu_percent is None else f"{item.mmlu_percent:.1f} %"
        yield (
            f"{'*' if here else ' '} {item.name:13} {_params(item.effective_params):>8} {score:>7}"
            f" {stage.context_length:>9} {format_bytes(need):>9}{fits}"
        )
    left_out = [item.name for item in cost.submodels if item not in cost.ladder]
    if left_out:
        yield f"  left out, larger and no better than another: {', '.join(left_out)}"

    yield ""
    for name, part in plan.as_dict().items():
        if name == "refusal" or part is None:
            continue
        value = part["value"]
        text = ", ".join(value) or "none" if isinstance(value, list) else value
        yield f"{name.replace('_', ' '):15} {'-' if text is None else text!s:12} {part['reason']}"
    try:
        remote = choose_remote(consent, task, plan, manifest, settings.remote)
        if remote.value:
            chosen = Choice("remote", remote.reason)
        else:
            chosen = choose(task, plan, manifest, settings)
        yield f"{'this request':15} {chosen.value:12} {chosen.reason}"
    except NestdError as error:
        yield f"{'this request':15} {'refused':12} {error}"


def _fits(need: int, free: int, settings: Settings) -> str:
    if need > free:
        return "   does not fit"
    margin = settings.elastic.memory.grow_margin_bytes
    return "   fits, without the margin for growing" if need > free - margin else ""


def _params(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 10**8 else f"{count / 1e6:.2f} M"


def _facts(snapshot: Snapshot, settings: Settings) -> Iterator[str]:
    memory, power, thermal = snapshot.memory, snapshot.power, snapshot.thermal
    if memory.free_bytes is not None:
        yield f"{format_bytes(memory.free_bytes)} free"
    if memory.limit_bytes is not None:
        yield f"cgroup limit {format_bytes(memory.limit_bytes)}"
    if memory.pressure_some_percent is not None:
        yield f"memory pressure {memory.pressure_some_percent:.1f} %"
    if power.battery_percent is not None:
        state = "discharging" if power.on_battery else "on mains"
        yield f"battery {power.battery_percent:.0f} % ({state})"
    elif power.on_battery is not None:
        yield "on battery" if power.on_battery else "on mains"
    if power.under_voltage:
        yield "under-voltage"
    if power.watts is not None:
        yield f"{power.watts:.1f} W ({power.watts_scope})"
    if thermal.celsius is not None:
        margin = margin_c(snapshot, settings.elastic)
        limit = "" if margin is None else f", throttles {margin:.0f} °C above"
        yield f"{thermal.celsius:.0f} °C{limit}"
