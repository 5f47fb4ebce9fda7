"""For tests of the policy: an E4B manifest, settings, made-up snapshots, and a policy over time."""

from dataclasses import replace
from pathlib import Path

from nestd.bundle.manifest import Manifest
from nestd.daemon.config import Settings, load_settings
from nestd.daemon.elastic.memory import Memory
from nestd.daemon.elastic.plan import Plan, RequestMix
from nestd.daemon.elastic.policy import PolicyState, decide
from nestd.daemon.elastic.power import Power
from nestd.daemon.elastic.resources import Snapshot
from nestd.daemon.elastic.thermal import Thermal

MANIFEST = Manifest.model_validate_json(
    (Path(__file__).parents[1] / "recorded/e4b-int4/manifest.json").read_text()
)
GIB = 2**30
NONE = Path("/nonexistent")


def configure(profile: str = "raspberry-pi-5-8gb", **overrides: object) -> Settings:
    # The situations are told for caches of full length: 80 KiB a token.
    keys = {"engine.kv_window": False}
    keys |= {key.replace("__", "."): value for key, value in overrides.items()}
    return load_settings(profile=profile, overrides=keys, environ={}, root=NONE)


PI5 = configure()


def board(
    time: float = 0.0,
    free_gib: float | None = 7.0,
    celsius: float | None = 50.0,
    battery: float | None = None,
    under_voltage: bool | None = False,
    watts: float | None = None,
    some: float | None = 0.0,
    full: float | None = 0.0,
    throttled: bool | None = False,
    oom_kills: int | None = 0,
) -> Snapshot:
    return Snapshot(
        time=time,
        memory=Memory(
            available_bytes=None if free_gib is None else int(free_gib * GIB),
            pressure_some_percent=some,
            pressure_full_percent=full,
            oom_kills=oom_kills,
        ),
        power=Power(
            on_battery=battery is not None,
            battery_percent=battery,
            under_voltage=under_voltage,
            throttled=throttled,
            watts=watts,
        ),
        thermal=Thermal(celsius=celsius),
    )


class Run:
    """A policy over time: `run(seconds, snapshot)` repeats it each second."""

    def __init__(self, config: Settings = PI5, mix: RequestMix | None = None) -> None:
        self.config, self.mix = config, mix or RequestMix()
        self.state, self.time = PolicyState(), 0.0

    def __call__(self, seconds: float, snapshot: Snapshot, step: float = 1.0) -> Plan:
        end = self.time + seconds
        while self.time < end:
            now = replace(snapshot, time=self.time)
            self.state = decide(now, self.config, MANIFEST, self.mix, self.state)
            self.time += step
        assert self.state.plan is not None
        return self.state.plan
