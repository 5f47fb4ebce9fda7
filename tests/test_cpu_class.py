"""Classes of CPUs, from what the kernel names of them."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from nestd.daemon.engine.cpu_class import classify, detect

# As /proc/cpuinfo of these has them, cut to what matters.
A53 = "fp asimd evtstrm crc32 cpuid"
A76 = "fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
N2 = f"{A76} sve sve2 svei8mm i8mm bf16"
SILVERMONT = "fpu sse2 ssse3 sse4_1 sse4_2 popcnt"
HASWELL = f"{SILVERMONT} avx avx2 fma"
ALDER_LAKE_N = f"{HASWELL} avx_vnni"
SKYLAKE_X = f"{HASWELL} avx512f avx512bw avx512vl"
ZEN_5 = f"{SKYLAKE_X} avx_vnni avx512_vnni"


@pytest.mark.parametrize(
    ("machine", "features", "name", "blockwise_int8"),
    [
        ("aarch64", A53, "armv8.0", False),
        ("aarch64", A76, "arm-dotprod", True),
        ("aarch64", N2, "arm-i8mm", True),
        ("x86_64", SILVERMONT, "x86-baseline", False),
        ("x86_64", HASWELL, "x86-avx2", True),
        ("x86_64", ALDER_LAKE_N, "x86-avx-vnni", True),
        ("x86_64", SKYLAKE_X, "x86-avx512", True),
        ("x86_64", ZEN_5, "x86-avx512-vnni", True),
        ("riscv64", "", "riscv64", False),
    ],
)
def test_the_class_follows_from_the_features(
    machine: str, features: str, name: str, blockwise_int8: bool
) -> None:
    found = classify(machine, features.split())
    assert (found.name, found.blockwise_int8) == (name, blockwise_int8)


def test_where_cores_differ_only_what_all_have_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"Features\t: {A53}\n\nFeatures\t: {A76}\n")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert detect(tmp_path).name == "armv8.0"


def test_this_cpu_has_a_class_in_words() -> None:
    found = detect()
    assert found.machine == platform.machine()
    assert str(found) == f"{found.name} ({found.description})"
