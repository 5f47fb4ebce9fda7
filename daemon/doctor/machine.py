"""Python, ONNX Runtime, the CPU's class, and the clock."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence
from pathlib import Path

from nestd.daemon.doctor.finding import Finding, failed, ok, skipped, warning
from nestd.daemon.engine import cpu_class

# adjtimex(2): the clock is not synchronised.
_TIME_ERROR = 5
# Larger than any `struct timex`.
_TIMEX_BYTES = 512


def python() -> Finding:
    """The interpreter; packaging has made sure of its version."""
    return ok("python", f"{platform.python_version()} on {platform.machine()}")


def onnx_runtime(wanted: Sequence[str]) -> Finding:
    """The library that runs the graphs, and whether it has the execution providers wanted."""
    try:
        from nestd.daemon.engine.sessions import VERSION, providers
    except ImportError as error:
        return failed(
            "onnxruntime",
            f"cannot be imported: {error}",
            "install it again: pip install --force-reinstall onnxruntime",
        )
    found = providers()
    if missing := [name for name in wanted if name not in found]:
        return failed(
            "onnxruntime",
            f"{VERSION} has {', '.join(found)}, not {', '.join(missing)}",
            "install the package of ONNX Runtime that has it (docs/arm.md), or take the name out "
            "of engine.execution_providers",
        )
    return ok("onnxruntime", f"{VERSION}; used of {', '.join(found)}: {', '.join(wanted)}")


def cpu(root: Path) -> Finding:
    """Which integer kernels ONNX Runtime has for this CPU."""
    try:
        found = cpu_class.detect(root)
    except OSError as error:
        return skipped("cpu", f"/proc/cpuinfo cannot be read: {error}")
    if found.blockwise_int8:
        return ok("cpu", f"{found}: 8-bit and 4-bit weights are multiplied as they are")
    return warning(
        "cpu",
        f"{found}: 8-bit weights are prepared with one scale a channel, 4-bit ones are multiplied "
        "in float32",
        "expect few tokens a second; cores with int8 dot products (Cortex-A76 or newer, any x86 "
        "with AVX2) do better",
    )


def clock(root: Path) -> Finding:
    """Whether the clock is set by somebody: certificates and expiries depend on it."""
    if (root / "run/systemd/timesync/synchronized").exists():
        return ok("clock", "synchronised by systemd-timesyncd")
    if root != Path("/"):
        return skipped("clock", "another machine's files do not tell")
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)
    state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    if state < 0:
        return skipped("clock", "the kernel does not tell whether it is synchronised")
    if state != _TIME_ERROR:
        return ok("clock", "synchronised, says the kernel")
    return warning(
        "clock",
        "nothing keeps it right",
        "sudo timedatectl set-ntp true, or install chrony: certificates are judged by this clock, "
        "and a board without a battery starts with a wrong one",
    )
