"""The class of this CPU: what decides which of ONNX Runtime's integer kernels run here.

Read from /proc/cpuinfo, whose feature names are the kernel's. Knows no graphs: `prepare.py` derives
a graph's form from the class.
"""

from __future__ import annotations

import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

# The first whose features are all there is the class; a CPU that has none of them is a "baseline".
_CLASSES: dict[str, tuple[tuple[str, frozenset[str], str], ...]] = {
    "aarch64": (
        ("arm-i8mm", frozenset({"asimddp", "i8mm"}), "int8 matrix products (i8mm)"),
        ("arm-dotprod", frozenset({"asimddp"}), "int8 dot products"),
        ("armv8.0", frozenset(), "no int8 dot product"),
    ),
    "x86_64": (
        ("x86-avx512-vnni", frozenset({"avx512_vnni", "avx512bw"}), "AVX-512 with int8 products"),
        ("x86-avx512", frozenset({"avx512bw", "avx512vl"}), "AVX-512"),
        ("x86-avx-vnni", frozenset({"avx2", "avx_vnni"}), "AVX2 with int8 dot products"),
        ("x86-avx2", frozenset({"avx2", "fma"}), "AVX2"),
        ("x86-baseline", frozenset(), "no AVX2"),
    ),
}
# ONNX Runtime multiplies blockwise int8 weights without dequantising them first on all but these.
_WITHOUT_BLOCKWISE = frozenset({"armv8.0", "x86-baseline"})


@dataclass(frozen=True, slots=True)
class CpuClass:
    """What this CPU can do for integer matrices.

    Attributes:
        machine: the architecture, as `uname -m` has it.
        name: of the class, for example `arm-dotprod`; the architecture's own where it has none.
        description: the same in words.
        features: all that the kernel names, sorted.
    """

    machine: str
    name: str
    description: str
    features: tuple[str, ...]

    @property
    def blockwise_int8(self) -> bool:
        """ONNX Runtime has a kernel here that multiplies blockwise int8 weights as they are."""
        return self.machine in _CLASSES and self.name not in _WITHOUT_BLOCKWISE

    def __str__(self) -> str:
        return f"{self.name} ({self.description})"


def detect(root: Path = Path("/")) -> CpuClass:
    """Return the class of the CPU that this process runs on.

    Where cores differ, only what all of them have counts.

    Args:
        root: what /proc is read below.

    Raises:
        OSError: /proc/cpuinfo cannot be read.
    """
    text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    cores = []
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            cores.append(set(value.split()))
    return classify(platform.machine(), set.intersection(*cores) if cores else ())


def classify(machine: str, features: Collection[str]) -> CpuClass:
    """Return the class of a CPU of the architecture `machine` with the kernel's `features`."""
    for name, needed, description in _CLASSES.get(machine, ()):
        if needed.issubset(features):
            return CpuClass(machine, name, description, tuple(sorted(features)))
    return CpuClass(machine, machine, "unknown to nestd", tuple(sorted(features)))
