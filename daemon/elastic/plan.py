"""The plan: what the engine should be now, each part with its reason in words.

Reasons name thresholds and causes, not readings, so that a plan stays equal to itself while a
temperature flickers: publish it when it changes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Generic, Literal, TypeVar

from nestd.bundle.errors import InsufficientMemory, PowerSaver, RequestError
from nestd.bundle.manifest import Modality
from nestd.daemon.remote.settings import RemoteReason

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """A decided value and why it is that one."""

    value: T
    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why no request can be answered now; `code` is the wire code of the error."""

    code: Literal["power_saver", "insufficient_memory"]
    reason: str

    def error(self, retry_after_ms: int | None = None) -> RequestError:
        """Return the error that a client is answered with."""
        kind = PowerSaver if self.code == "power_saver" else InsufficientMemory
        return kind(f"{self.reason}: ask again later", retry_after_ms)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the engine should be.

    Attributes:
        submodel: what a request runs on that names none and gives no hint: the owner's preference
            within `largest`; None while refusing.
        largest: the largest that any request may run on; a running answer on a larger one steps
            down between two tokens.
        modalities: the encoders that should be loaded. A request that needs another one is
            answered modality_unavailable.
        threads: for the decoder; None leaves it to ONNX Runtime.
        context_length: tokens of a new session.
        concurrency: sessions that may be answered side by side.
        remote: the board's reason to send requests that allow it to the remote server, if any.
        refusal: set while nothing can be answered.
    """

    submodel: Choice[str | None]
    largest: Choice[str | None]
    modalities: Choice[tuple[Modality, ...]]
    threads: Choice[int | None]
    context_length: Choice[int]
    concurrency: Choice[int]
    remote: Choice[RemoteReason | None]
    refusal: Refusal | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for the state topic: name -> {value, reason}."""
        result: dict[str, Any] = {}
        for item in fields(self):
            choice = getattr(self, item.name)
            if isinstance(choice, Choice):
                value = list(choice.value) if isinstance(choice.value, tuple) else choice.value
                result[item.name] = {"value": value, "reason": choice.reason}
        result["refusal"] = (
            {"code": self.refusal.code, "reason": self.refusal.reason} if self.refusal else None
        )
        return result


@dataclass(frozen=True, slots=True)
class RequestMix:
    """What the waiting and running requests ask of the plan.

    Attributes:
        wanted: encoders that one of them needs.
        disabled: encoders that the owner has forbidden (control topic).
        unload: encoders that the owner wants gone now, unless they are needed.
        running: answers that run now.
        preference: the owner's sub-model (control topic or configuration), or `auto`.
    """

    wanted: frozenset[Modality] = frozenset()
    preference: str = "auto"
    disabled: frozenset[Modality] = frozenset()
    unload: frozenset[Modality] = frozenset()
    running: int = 0
