"""The section `elastic` of the configuration: what the policy decides with.

Most values depend on the board, so they have no default here but in `device_profiles/`; keys end in
their unit, as in `nestd.daemon.settings`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nestd.daemon.section import Count, Percent, Seconds, Section, in_order
from nestd.daemon.units import ByteSize


class MemorySettings(Section):
    """How much memory the model may plan with.

    Attributes:
        reserve_bytes: left to the other programs of the board, whatever happens.
        grow_margin_bytes: what must be free on top before the plan grows (hysteresis).
        overhead_bytes: private memory of both processes besides weights and KV cache.
        encoder_overhead_bytes: working memory of an encoder while it runs, besides its weights.
        min_context_length: tokens below which shrinking the context makes no sense.
        pressure_percent: PSI `some avg10` from which the plan shrinks step by step.
        pressure_full_percent: PSI `full avg10` from which it shrinks to the smallest at once.
        encoder_unload_s: an encoder unused for so long is unloaded.
    """

    reserve_bytes: ByteSize
    grow_margin_bytes: ByteSize
    overhead_bytes: ByteSize
    encoder_overhead_bytes: ByteSize
    min_context_length: Annotated[int, Field(ge=16, le=131072)]
    pressure_percent: Percent
    pressure_full_percent: Percent
    encoder_unload_s: Seconds


class BatterySettings(Section):
    """What a discharging battery does; on mains none of it counts.

    Attributes:
        supply: `auto` believes the sensors; `battery` is for a battery without a gauge (the plan
            then stays at the saver size), `mains` for a gauge that is not the board's supply.
        saver_percent: below it the plan keeps to `saver_ladder_percent` of the ladder.
        low_percent: below it the smallest sub-model runs.
        critical_percent: below it requests are answered 503 power_saver.
        hysteresis_percent: how far above a threshold the charge must rise before it is left.
    """

    supply: Literal["auto", "mains", "battery"]
    saver_percent: Percent
    low_percent: Percent
    critical_percent: Percent
    hysteresis_percent: Percent
    saver_ladder_percent: Percent

    @model_validator(mode="after")
    def _check(self) -> Self:
        in_order(self, "critical_percent", "low_percent", "saver_percent")
        return self


class ThermalSettings(Section):
    """Heat, measured against the temperature at which the board slows itself down.

    Attributes:
        throttle_c: that temperature; None takes the lowest passive trip point of the hottest zone.
        soft_margin_c: so far below it the plan shrinks step by step.
        hard_margin_c: so far below it the smallest sub-model runs at once, on fewer threads.
        hysteresis_c: how far below the soft margin it must cool before the plan grows.
    """

    throttle_c: Annotated[float, Field(ge=30, le=150)] | None
    soft_margin_c: Annotated[float, Field(ge=0, le=50)]
    hard_margin_c: Annotated[float, Field(ge=0, le=50)]
    hysteresis_c: Annotated[float, Field(ge=0, le=50)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        in_order(self, "hard_margin_c", "soft_margin_c")
        return self


class PowerSettings(Section):
    """Watts and volts.

    Attributes:
        watt_cap: average draw above which the plan shrinks step by step, or None.
        watt_hysteresis_percent: how far below the cap it must fall before the plan grows.
        under_voltage_hold_s: after an under-voltage or over-current event the smallest sub-model
            runs for so long.
        constrained_threads: threads while the supply or the heat is critical (less peak current).
        objective: `quality` answers on the largest plan; `joules_per_token` keeps to
            `joules_ladder_percent` of the ladder unless a request asks for high effort.
    """

    watt_cap: Annotated[float, Field(gt=0)] | None
    watt_hysteresis_percent: Percent
    under_voltage_hold_s: Seconds
    constrained_threads: Annotated[int, Field(ge=1, le=256)]
    objective: Literal["quality", "joules_per_token"]
    joules_ladder_percent: Percent


class PaceSettings(Section):
    """How fast the plan may move where no hard limit forces it.

    Attributes:
        step_interval_s: least time between two steps down.
        max_step_down: rungs of one step down.
        max_step_up: rungs of one step up.
        grow_after_s: calm time before a step up.
        grow_after_max_s: that time doubles, up to this, each time growing proved wrong.
        backoff_reset_s: after so much calm the doubling is forgotten.
    """

    step_interval_s: Seconds
    max_step_down: Count
    max_step_up: Count
    grow_after_s: Seconds
    grow_after_max_s: Seconds
    backoff_reset_s: Seconds

    @model_validator(mode="after")
    def _check(self) -> Self:
        in_order(self, "grow_after_s", "grow_after_max_s")
        return self


class TaskSettings(Section):
    """Which part of the ladder a request gets when it names no sub-model.

    Attributes:
        low_ladder_percent: for `effort: low`.
        routine_ladder_percent: for `effort: auto` and a routine request: text only, a JSON answer,
            and a prompt of at most `routine_prompt_tokens`.
    """

    low_ladder_percent: Percent
    routine_ladder_percent: Percent
    routine_prompt_tokens: Annotated[int, Field(ge=0)]


class ElasticSettings(Section):
    """What the policy decides with.

    Attributes:
        submodel: `auto`, or the name of the sub-model that the owner wants (limits still count).
        max_submodel: never a larger one than this, by name.
        max_effective_params: never a larger one than this, by size; the board's own cap.
    """

    submodel: Annotated[str, Field(min_length=1, max_length=64)] = "auto"
    max_submodel: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    max_effective_params: Annotated[int, Field(ge=1)] | None
    memory: MemorySettings
    battery: BatterySettings
    thermal: ThermalSettings
    power: PowerSettings
    pace: PaceSettings
    task: TaskSettings
