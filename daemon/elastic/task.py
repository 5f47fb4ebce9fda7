"""Which sub-model one request runs on, given the plan: task complexity and the client's wish.

A switch costs nothing, so each request gets its own: a request that names a sub-model gets that,
one with `effort: low` the low end of the ladder, one with `effort: high` the best that the plan
allows. Without a hint, a routine request (text only, a short prompt, a JSON answer: "switch on the
light") gets by with the middle, everything else runs on the plan's own.

The plan's `largest` bounds all of it; a request for more is answered on less, with the reason, and
not refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nestd.bundle.manifest import Manifest, Submodel
from nestd.daemon.elastic.cost import ModelCost
from nestd.daemon.elastic.plan import Choice, Plan
from nestd.daemon.settings import Settings

Effort = Literal["low", "auto", "high"]


@dataclass(frozen=True, slots=True)
class Task:
    """What a request says about itself.

    Attributes:
        submodel: `auto`, or the name that the client asks for.
        prompt_tokens: length of the prompt, None before it is tokenised.
        media: it has an image, a clip or a video.
        video: it has a video.
        json: it asks for a JSON answer.
    """

    submodel: str = "auto"
    effort: Effort = "auto"
    prompt_tokens: int | None = None
    media: bool = False
    video: bool = False
    json: bool = False


def choose(task: Task, plan: Plan, manifest: Manifest, settings: Settings) -> Choice[str]:
    """Return the sub-model for `task` and why.

    Raises:
        PowerSaver, InsufficientMemory: the plan refuses every request now.
        ModelNotFound: the bundle has no sub-model of the name asked for.
    """
    if plan.refusal is not None:
        raise plan.refusal.error()
    assert plan.largest.value is not None
    assert plan.submodel.value is not None
    largest = manifest.submodel(plan.largest.value)
    default = manifest.submodel(plan.submodel.value)
    if task.submodel.lower() != "auto":
        return _named(manifest.submodel(task.submodel), largest, plan)

    cost = ModelCost.of(manifest, settings)
    limits = settings.elastic.task
    if task.effort == "low":
        rung = cost.rung_of_share(limits.low_ladder_percent, largest.effective_params)
        return Choice(rung.name, "the request asks for low effort")
    if task.effort == "high":
        rung = cost.stages[cost.stage_of_params(largest.effective_params)].submodel
        return Choice(rung.name, f"the request asks for high effort; {plan.largest.reason}")
    if _routine(task, limits.routine_prompt_tokens):
        rung = cost.rung_of_share(limits.routine_ladder_percent, default.effective_params)
        if rung.effective_params < default.effective_params:
            return Choice(rung.name, "a short text request for a JSON answer is routine")
    return Choice(default.name, plan.submodel.reason)


def _named(wanted: Submodel, largest: Submodel, plan: Plan) -> Choice[str]:
    if wanted.effective_params <= largest.effective_params:
        return Choice(wanted.name, "the request asks for it")
    return Choice(largest.name, f"the request asks for {wanted.name}, but {plan.largest.reason}")


def _routine(task: Task, most_tokens: int) -> bool:
    return (
        task.json
        and not task.media
        and task.prompt_tokens is not None
        and task.prompt_tokens <= most_tokens
    )
