"""All checks in the order in which a person would make them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nestd.bundle.errors import BundleError, ConfigError
from nestd.bundle.manifest import Bundle
from nestd.daemon.config import CONFIG_FILE, Explained, explain_settings
from nestd.daemon.doctor import files, machine, memory, model, reach, rights, sensors, storage
from nestd.daemon.doctor.finding import Finding, failed, ok, skipped
from nestd.daemon.elastic.resources import Sampler
from nestd.daemon.engine.messages import CPU_PROVIDERS
from nestd.daemon.mqtt.connect import node_options
from nestd.daemon.settings import Settings


def examine(
    config: Path | None,
    profile: str | None,
    overrides: Mapping[str, object],
    quick: bool = False,
) -> Iterator[Finding]:
    """Yield one finding a check, as soon as it is there.

    Args:
        config: the configuration file; None takes /etc/nestd/nestd.yaml if there is one.
        profile: the device profile; None leaves it to the configuration.
        overrides: dotted key -> value from the command line.
        quick: leave out what reads the whole bundle.
    """
    try:
        explained = explain_settings(config, profile, overrides)
    except ConfigError as error:
        yield failed("configuration", str(error), "correct these, then ask the doctor again")
        yield from _machine(Path("/"), CPU_PROVIDERS)
        yield skipped("everything else", "the configuration cannot be used")
        return
    settings = explained.settings
    yield from _configuration(config, explained)
    yield from _machine(settings.sysroot, settings.engine.execution_providers)
    yield from _board(settings)
    yield from _bundle(settings, quick)
    yield from _broker(settings)


def _configuration(config: Path | None, explained: Explained) -> Iterator[Finding]:
    settings = explained.settings
    yield ok("configuration", "valid; `nestd check-config` prints it")
    yield files.permissions(config or Path(os.environ.get("NESTD_CONFIG") or f"/{CONFIG_FILE}"))
    yield files.secrets(settings.mqtt)
    yield files.program(settings.filter)
    yield files.profile(settings.sysroot, settings.profile, explained.detected)


def _machine(root: Path, providers: Sequence[str]) -> Iterator[Finding]:
    yield machine.python()
    yield machine.onnx_runtime(providers)
    yield machine.cpu(root)
    yield machine.clock(root)


def _board(settings: Settings) -> Iterator[Finding]:
    root, elastic = settings.sysroot, settings.elastic
    sampler = Sampler(root)
    snapshot = sampler.sample()
    sampler.close()
    yield memory.cgroup(root)
    yield memory.pressure(root, elastic.memory.pressure_percent)
    yield memory.swap(root)
    yield sensors.heat(snapshot, elastic)
    yield sensors.supply(snapshot, root)


def _bundle(settings: Settings, quick: bool) -> Iterator[Finding]:
    if settings.bundle is None:
        yield skipped("bundle", "none is named: use --bundle, or `bundle:` in the configuration")
        return
    try:
        bundle = Bundle.open(settings.bundle)
    except BundleError as error:
        yield failed("bundle", str(error), "make one with `nestd convert`, or copy it again")
        return
    manifest = bundle.manifest
    names = ", ".join(item.name for item in manifest.submodels)
    yield ok("bundle", f"{manifest.name} with {names}")
    if quick:
        yield skipped("bundle files", "--quick leaves their sha256 out")
    else:
        yield model.integrity(settings, bundle)
    sampler = Sampler(settings.sysroot)
    yield model.fit(settings, bundle, sampler.sample())
    sampler.close()
    yield storage.space(settings, bundle)
    yield storage.speed(settings.sysroot, bundle)


def _broker(settings: Settings) -> Iterator[Finding]:
    try:
        options = node_options(settings)
    except ConfigError as error:
        yield failed("broker", str(error), "see what was said about `secrets`")
        return
    for check in (reach.network, reach.handshake):
        finding = check(options)
        yield finding
        if finding.outcome == "failed":
            yield skipped("login", f"not tried: {finding.name} has failed")
            return
    yield from rights.examine(settings)
