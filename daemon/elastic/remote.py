"""When a request goes to the remote server: pure functions, each answer with its reason in words.

The server is the ladder's last rung. Consent comes first: a request goes there only if it says so
itself (or the configuration does in its place), and a medium only where the owner allows that too.
A request that may go there does so for one of `remote.reasons`:

- `memory`, `battery`: the plan refuses, as no sub-model fits or the battery is all but empty;
- `heat`: the board is at the temperature that slows it down;
- `task`: the request asks for more than this board gives now: high effort, a larger sub-model by
  name than the plan allows, or a prompt beyond the plan's context.
"""

from __future__ import annotations

from dataclasses import dataclass

from nestd.bundle.errors import RemoteUnavailable
from nestd.bundle.manifest import Manifest
from nestd.daemon.elastic.limits import Latches
from nestd.daemon.elastic.plan import Choice, Plan, Refusal
from nestd.daemon.elastic.task import Task
from nestd.daemon.remote.settings import Consent, RemoteReason, RemoteSettings


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why the server is not asked now, and when it may be asked again, where that is known."""

    reason: str
    retry_after_ms: int | None = None


def plan_remote(
    refusal: Refusal | None, latches: Latches, remote: RemoteSettings
) -> Choice[RemoteReason | None]:
    """Return the plan's part: the board's own reason to send every request there that may go."""
    if not remote.enabled:
        return Choice(None, "no remote server is configured")
    found: list[tuple[RemoteReason, str]] = []
    if refusal is not None:
        cause: RemoteReason = "battery" if refusal.code == "power_saver" else "memory"
        found.append((cause, refusal.reason))
    if latches.hot:
        found.append(("heat", "the board is at the temperature that slows it down"))
    for reason, why in found:
        if reason in remote.reasons:
            return Choice(reason, why)
    if found:
        left_out = " and ".join(reason for reason, _ in found)
        return Choice(None, f"remote.reasons does not name {left_out}")
    if "task" in remote.reasons:
        return Choice(None, "only for requests that ask for more than this board gives")
    return Choice(None, "this board answers")


def choose_remote(
    consent: Consent,
    task: Task,
    plan: Plan,
    manifest: Manifest,
    remote: RemoteSettings,
    trouble: Trouble | None = None,
) -> Choice[bool]:
    """Say whether the remote server is to answer, and why or why not.

    Raises:
        RemoteUnavailable: the request requires it, and it may not or cannot answer.
        ModelNotFound: the bundle has no sub-model of the name asked for.
    """
    if consent == "never":
        return Choice(False, "the request does not allow the remote server")
    against = _against(task, remote) or trouble
    if consent == "required":
        if against is not None:
            raise RemoteUnavailable(
                f"{against.reason}: ask another node, or allow this board to answer",
                against.retry_after_ms,
            )
        return Choice(True, "the request requires the remote server")
    if against is not None:
        return Choice(False, against.reason)
    if plan.remote.value is not None:
        return Choice(True, plan.remote.reason)
    why = _beyond(task, plan, manifest) if "task" in remote.reasons else None
    if why is not None:
        return Choice(True, why)
    return Choice(False, f"the remote server is not needed: {plan.remote.reason}")


def _against(task: Task, remote: RemoteSettings) -> Trouble | None:
    if not remote.enabled:
        return Trouble("this node has no remote server")
    if task.video:
        return Trouble("the remote server takes no video")
    if task.media and not remote.allow_media:
        return Trouble("this node's owner lets no media go to the remote server")
    return None


def _beyond(task: Task, plan: Plan, manifest: Manifest) -> str | None:
    """Return how a request asks for more than this board gives now, None if it does not."""
    if plan.largest.value is None:
        return None  # nothing to compare with: the plan refuses, for reasons of its own
    largest = manifest.submodel(plan.largest.value)
    if task.submodel.lower() != "auto":
        wanted = manifest.submodel(task.submodel)
        if wanted.effective_params > largest.effective_params:
            return f"the request asks for {wanted.name}, but {plan.largest.reason}"
    elif task.effort == "high":
        return "the request asks for high effort, and the remote server is the last rung"
    most = plan.context_length.value
    if task.prompt_tokens is not None and task.prompt_tokens > most:
        return f"the prompt is longer than the {most} tokens that this board reads now"
    return None
