"""Which sub-model a request runs on, and with which sampling.

A request names a sub-model or says `auto`; `auto` follows the owner's choice (settings or control
topic), and without one a function that is handed in: today the largest sub-model that the settings
allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nestd.bundle.errors import BadRequest
from nestd.bundle.manifest import GenerationDefaults, Manifest
from nestd.daemon.engine.messages import Sampling
from nestd.daemon.mqtt.contract import Effort, Request
from nestd.daemon.settings import ElasticSettings

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Choice:
    """A sub-model and why it is the one."""

    submodel: str
    reason: str


ChooseAuto = Callable[[Effort], Choice]


def largest_allowed(manifest: Manifest, settings: ElasticSettings) -> ChooseAuto:
    """Return a function that always chooses the largest sub-model within the settings' caps.

    Raises:
        ModelNotFound: the settings name a sub-model that the bundle does not have.
    """
    caps = [
        cap
        for cap in (
            settings.max_effective_params,
            manifest.submodel(settings.max_submodel).effective_params
            if settings.max_submodel is not None
            else None,
        )
        if cap is not None
    ]
    allowed = [s for s in manifest.submodels if all(s.effective_params <= cap for cap in caps)]
    largest = allowed[-1] if allowed else manifest.submodels[0]
    reason = "the largest of the bundle" if not caps else "the largest that the settings allow"
    choice = Choice(largest.name, reason)

    def choose(_effort: Effort) -> Choice:
        return choice

    return choose


class Selection:
    """Resolves `auto` and the names of sub-models."""

    def __init__(self, manifest: Manifest, owner: str, choose_auto: ChooseAuto) -> None:
        self._manifest = manifest
        self._choose_auto = choose_auto
        self._owner = self.canonical(owner)

    def canonical(self, name: str) -> str:
        """Return `auto` or the bundle's spelling of `name`; ModelNotFound if it has none."""
        return AUTO if name.lower() == AUTO else self._manifest.submodel(name).name

    def set_owner(self, name: str) -> Choice:
        """Let `auto` mean `name` from now on (`auto` itself gives the choice back)."""
        self._owner = self.canonical(name)
        return self.choose(AUTO, "auto")

    def choose(self, name: str, effort: Effort) -> Choice:
        """Return the sub-model for a request that asks for `name`; ModelNotFound if unknown."""
        canonical = self.canonical(name)
        if canonical != AUTO:
            return Choice(canonical, "named by the request")
        if self._owner != AUTO:
            return Choice(self._owner, "set by the owner")
        return self._choose_auto(effort)


def sampling_of(request: Request, defaults: GenerationDefaults, max_tokens: int) -> Sampling:
    """Return the engine's sampling: the request's values over the model's own defaults.

    Raises:
        BadRequest: more tokens are asked for than the node allows.
    """
    if request.max_tokens is not None and request.max_tokens > max_tokens:
        raise BadRequest(f"max_tokens is {request.max_tokens}, this node allows {max_tokens}")
    temperature = defaults.temperature if defaults.do_sample else 0.0
    return Sampling(
        max_tokens=request.max_tokens or min(Sampling().max_tokens, max_tokens),
        temperature=temperature if request.temperature is None else request.temperature,
        top_k=defaults.top_k if request.top_k is None else request.top_k,
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=request.stop,
    )
