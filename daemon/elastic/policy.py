"""The policy: a pure function from facts to the next plan.

    decide(snapshot, settings, manifest, mix, state) -> state, with state.plan

The board's part, `plan.largest`, moves along the stages of `ModelCost` (short contexts of the
smallest sub-model, then the rungs of the ladder):

- a hard ceiling is obeyed at once, however far down it is;
- trouble and soft ceilings are obeyed in steps of `max_step_down`, `step_interval_s` apart;
- growing needs calm: nothing in the way for `grow_after_s`, then `max_step_up` at a time. Each
  time a step down shows that growing was wrong the wait doubles up to `grow_after_max_s`;
  `backoff_reset_s` without a step down forgets that.

What the owner prefers, `plan.submodel`, takes effect at once within that.

After a calm time the plan is therefore the largest that the limits, with the margins for growing,
allow. Nothing here reads a clock or a file: time is the snapshot's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nestd.bundle.errors import ConfigError, ModelNotFound
from nestd.bundle.manifest import Manifest, Modality, Submodel
from nestd.daemon.elastic.cost import ENCODERS, ModelCost, Stage
from nestd.daemon.elastic.limits import (
    Latches,
    Limits,
    budget,
    cap_params,
    latch,
    limits,
    memory_trouble,
    near_memory_trouble,
)
from nestd.daemon.elastic.plan import Choice, Plan, Refusal, RequestMix
from nestd.daemon.elastic.remote import plan_remote
from nestd.daemon.elastic.resources import Snapshot
from nestd.daemon.elastic.settings import PaceSettings
from nestd.daemon.settings import Settings


@dataclass(frozen=True, slots=True)
class Pace:
    """Where the plan stands on the stages, and when it last moved.

    Attributes:
        stage: index, or -1 for nothing; None before the first decision.
        stepped_down, grew: time of the last step down, the last step up; None for never.
        calm_since: since when nothing has stood in the way of growing, or None.
        wait_s: calm that the next step up needs.
        why_down: the reason of the last step down.
    """

    stage: int | None = None
    stepped_down: float | None = None
    grew: float | None = None
    calm_since: float | None = None
    wait_s: float | None = None
    why_down: str = ""


@dataclass(frozen=True, slots=True)
class PolicyState:
    """All that the policy remembers between two snapshots; start with `PolicyState()`.

    Attributes:
        last_wanted: when each encoder was last needed.
        bounds: what the last snapshot forbade, to be told beside the plan.
    """

    plan: Plan | None = None
    pace: Pace = field(default_factory=Pace)
    latches: Latches = field(default_factory=Latches)
    last_wanted: dict[Modality, float] = field(default_factory=dict)
    bounds: Limits | None = None


def check_names(settings: Settings, manifest: Manifest) -> None:
    """Raise ConfigError unless the sub-models that the configuration names are in the bundle."""
    elastic = settings.elastic
    for key, name in (("submodel", elastic.submodel), ("max_submodel", elastic.max_submodel)):
        if name not in (None, "auto"):
            try:
                manifest.submodel(name)
            except ModelNotFound as error:
                raise ConfigError(f"elastic.{key}: {error}") from None


def decide(
    snapshot: Snapshot,
    settings: Settings,
    manifest: Manifest,
    mix: RequestMix,
    state: PolicyState,
) -> PolicyState:
    """Return the next state; `state.plan` is the plan to apply.

    Raises:
        ModelNotFound: `mix.preference` names no sub-model of the bundle.
    """
    elastic, now = settings.elastic, snapshot.time
    cost = ModelCost.of(manifest, settings)
    latches = latch(snapshot, elastic, state.latches)

    # 1. Encoders: those needed now where they fit, those used lately where they are in no way.
    last_wanted = {**state.last_wanted, **dict.fromkeys(mix.wanted, now)}
    encoders = _encoders(snapshot, settings, cost, mix, state, last_wanted)

    # 2. The stage that the board allows.
    sessions = max(1, mix.running)
    bounds = limits(snapshot, elastic, cost, latches, encoders.value, sessions)
    pace = _move(state.pace, bounds, elastic.pace, now)

    # 3. What follows from it.
    preferred = None if mix.preference == "auto" else manifest.submodel(mix.preference)
    plan = _plan(
        snapshot, settings, cost, bounds, pace, latches, encoders, preferred, sessions, state.plan
    )
    return PolicyState(plan, pace, latches, last_wanted, bounds)


def _move(before: Pace, bounds: Limits, pace: PaceSettings, now: float) -> Pace:
    """Return where the plan stands now."""
    wait_s = pace.grow_after_s if before.wait_s is None else before.wait_s
    if before.stepped_down is not None and now - before.stepped_down >= pace.backoff_reset_s:
        wait_s = pace.grow_after_s
    target = min(bounds.grow.stage, bounds.hard.stage, bounds.soft.stage)
    if before.stage is None:
        start = target if bounds.trouble is None else min(target, bounds.floor)
        return Pace(stage=start, wait_s=wait_s, why_down=bounds.trouble or bounds.grow.reason)

    def down(stage: int, why: str, limited: bool = True) -> Pace:
        # Shrinking soon after growing means that growing was wrong.
        wrong = limited and before.grew is not None and now - before.grew < pace.backoff_reset_s
        return replace(
            before,
            stage=stage,
            stepped_down=now,
            grew=None if wrong else before.grew,
            calm_since=None,
            wait_s=min(pace.grow_after_max_s, wait_s * 2) if wrong else wait_s,
            why_down=why,
        )

    # Hard ceilings first: no pace counts.
    if before.stage > bounds.hard.stage:
        return down(bounds.hard.stage, bounds.hard.reason)
    # Trouble and soft ceilings: bounded steps.
    may_step = before.stepped_down is None or now - before.stepped_down >= pace.step_interval_s
    if bounds.trouble is not None and before.stage > bounds.floor:
        if may_step:
            return down(max(bounds.floor, before.stage - pace.max_step_down), bounds.trouble)
        return replace(before, calm_since=None, wait_s=wait_s)
    if before.stage > bounds.soft.stage:
        if may_step:
            stage = max(bounds.soft.stage, before.stage - pace.max_step_down)
            return down(stage, bounds.soft.reason, limited=False)
        return replace(before, calm_since=None, wait_s=wait_s)
    # Growing: only after calm.
    if bounds.trouble or bounds.hold or target <= before.stage:
        return replace(before, calm_since=None, wait_s=wait_s)
    calm_since = now if before.calm_since is None else before.calm_since
    if now - calm_since < wait_s:
        return replace(before, calm_since=calm_since, wait_s=wait_s)
    # Short contexts exist for want of memory only: out of them in one step.
    return replace(
        before,
        stage=min(target, max(bounds.floor, before.stage + pace.max_step_up)),
        grew=now,
        calm_since=now,
        wait_s=wait_s,
    )


def _encoders(
    snapshot: Snapshot,
    settings: Settings,
    cost: ModelCost,
    mix: RequestMix,
    state: PolicyState,
    last_wanted: dict[Modality, float],
) -> Choice[tuple[Modality, ...]]:
    elastic = settings.elastic
    free = budget(snapshot.memory, elastic)
    loaded = state.plan.modalities.value if state.plan else ()
    keep: list[Modality] = []
    reasons: list[str] = []
    for modality in ENCODERS:
        if modality not in cost.encoder_bytes:
            if modality in mix.wanted:
                reasons.append(f"the bundle has no {modality}")
            continue
        if modality in mix.disabled:
            reasons.append(f"the owner has switched {modality} off")
            continue
        with_it = [*keep, modality]
        sessions = max(1, mix.running)
        fits = free is None or cost.bytes_of(cost.stages[0], with_it, sessions) <= free
        if modality in mix.wanted:
            if fits:
                keep.append(modality)
                reasons.append(f"{modality} is needed now")
            else:
                reasons.append(f"{modality} is needed but does not fit in memory")
        elif modality in mix.unload:
            reasons.append(f"the owner has unloaded {modality}")
        elif modality in loaded:
            age = snapshot.time - last_wanted.get(modality, snapshot.time)
            # It may stay only while the decoder does not shrink for it.
            in_the_way = free is None or cost.largest_stage(free, with_it) < min(
                cost.largest_stage(free, keep), state.pace.stage or 0
            )
            if age < elastic.memory.encoder_unload_s and not in_the_way:
                keep.append(modality)
                reasons.append(f"{modality} was used lately")
            else:
                why = "makes room" if in_the_way else "has not been used for a while"
                reasons.append(f"{modality} {why}")
    return Choice(tuple(keep), "; ".join(reasons) or "no request needs one")


def _plan(
    snapshot: Snapshot,
    settings: Settings,
    cost: ModelCost,
    bounds: Limits,
    pace: Pace,
    latches: Latches,
    encoders: Choice[tuple[Modality, ...]],
    preferred: Submodel | None,
    sessions: int,
    before: Plan | None,
) -> Plan:
    assert pace.stage is not None
    why = _why(bounds, pace)
    threads = _threads(settings, latches)
    full = settings.engine.context_length
    if pace.stage < 0:
        code = bounds.hard.code
        if bounds.hard.stage >= 0 and before is not None and before.refusal is not None:
            code = before.refusal.code  # what it was for is over, but not yet for long enough
        refusal = Refusal(code, why)
        return Plan(
            submodel=Choice(None, why),
            largest=Choice(None, why),
            modalities=Choice((), why),
            threads=threads,
            context_length=Choice(cost.stages[0].context_length, why),
            concurrency=Choice(0, why),
            remote=plan_remote(refusal, latches, settings.remote),
            refusal=refusal,
        )
    stage = cost.stages[pace.stage]
    short = stage.context_length < full
    largest = _largest(snapshot, settings, cost, pace.stage, encoders.value, sessions, why, before)
    biggest = Stage(largest.value, stage.context_length)
    return Plan(
        submodel=_default(settings, cost, stage.submodel, largest, preferred, why),
        largest=Choice(largest.value.name, largest.reason),
        modalities=encoders,
        threads=threads,
        context_length=Choice(stage.context_length, why if short else "as configured"),
        concurrency=_concurrency(snapshot, settings, cost, biggest, encoders.value, before),
        remote=plan_remote(None, latches, settings.remote),
    )


def _why(bounds: Limits, pace: Pace) -> str:
    """Return the reason for standing where the plan stands, whichever binds first."""
    assert pace.stage is not None
    if pace.stage == bounds.hard.stage <= bounds.soft.stage:
        return bounds.hard.reason
    if bounds.trouble is not None:
        return bounds.trouble
    if pace.stage == bounds.soft.stage:
        return bounds.soft.reason
    if pace.stage > bounds.soft.stage:
        return f"stepping down: {bounds.soft.reason}"
    if pace.stage == bounds.grow.stage:
        return bounds.grow.reason
    if bounds.hold is not None:
        return f"{bounds.hold}; before that: {pace.why_down}"
    return f"grows after a calm time; it shrank because {pace.why_down}"


def _default(
    settings: Settings,
    cost: ModelCost,
    rung: Submodel,
    largest: Choice[Submodel],
    preferred: Submodel | None,
    why: str,
) -> Choice[str | None]:
    """Return what a request without a wish of its own runs on."""
    if preferred is not None:
        if preferred.effective_params <= largest.value.effective_params:
            return Choice(preferred.name, f"{preferred.name} is preferred")
        return Choice(rung.name, f"{preferred.name} is preferred, but {why}")
    power = settings.elastic.power
    if power.objective == "joules_per_token":
        frugal = cost.rung_of_share(power.joules_ladder_percent, rung.effective_params)
        if frugal is not rung:
            return Choice(frugal.name, "the profile prefers joules per token to quality")
    return Choice(rung.name, why)


def _threads(settings: Settings, latches: Latches) -> Choice[int | None]:
    few = settings.elastic.power.constrained_threads
    configured = settings.engine.threads
    if latches.weak_until is None and not latches.hot:
        return Choice(configured, "as configured")
    why = "less peak current" if latches.weak_until is not None else "less heat"
    return Choice(few if configured is None else min(few, configured), why)


def _largest(
    snapshot: Snapshot,
    settings: Settings,
    cost: ModelCost,
    stage: int,
    encoders: tuple[Modality, ...],
    sessions: int,
    why: str,
    before: Plan | None,
) -> Choice[Submodel]:
    """Return the largest sub-model that a request may name.

    On the top rung that may be one beyond it: E4B is no rung of its own ladder, but somebody may
    want it all the same.
    """
    rung = cost.stages[stage].submodel
    free = budget(snapshot.memory, settings.elastic)
    cap = cap_params(settings.elastic, cost)
    if stage < len(cost.stages) - 1 or free is None:
        return Choice(rung, why)
    for item in reversed(cost.submodels):
        if item.effective_params <= rung.effective_params:
            break
        need = cost.bytes_of(Stage(item, settings.engine.context_length), encoders, sessions)
        stays = before is not None and before.largest.value == item.name
        margin = 0 if stays else settings.elastic.memory.grow_margin_bytes
        if item.effective_params <= cap and need <= free - margin:
            return Choice(item, "the largest that fits in the memory that is free")
    return Choice(rung, why)


def _concurrency(
    snapshot: Snapshot,
    settings: Settings,
    cost: ModelCost,
    stage: Stage,
    encoders: tuple[Modality, ...],
    before: Plan | None,
) -> Choice[int]:
    elastic, configured = settings.elastic, settings.engine.parallel_requests
    free = budget(snapshot.memory, elastic)
    if configured == 1 or free is None:
        return Choice(1, "as configured" if free is not None else "free memory is unknown")
    trouble = memory_trouble(snapshot, elastic)
    if trouble is not None:
        return Choice(1, trouble)

    def fitting(available: int) -> int:
        return max(
            (
                count
                for count in range(1, configured + 1)
                if cost.bytes_of(stage, encoders, count) <= available
            ),
            default=1,
        )

    most, with_margin = fitting(free), fitting(free - elastic.memory.grow_margin_bytes)
    now = before.concurrency.value if before else 0
    hold = near_memory_trouble(snapshot, elastic) if now else None
    count = max(1, min(most, now if hold else max(now, with_margin)))
    if count == configured:
        return Choice(count, "as configured")
    return Choice(count, hold if hold and count < with_margin else "no more KV cache fits")
