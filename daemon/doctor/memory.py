"""Memory: control groups, pressure, swap, and the lines of the boot files that switch them on."""

from __future__ import annotations

from pathlib import Path

from nestd.daemon.doctor.finding import Finding, ok, skipped, warning
from nestd.daemon.doctor.mounts import device_of
from nestd.daemon.elastic.cgroup import Cgroup
from nestd.daemon.elastic.pressure import read_pressure
from nestd.daemon.elastic.sysfs import read_keys, read_text
from nestd.daemon.units import format_bytes

# Where boards keep the kernel's command line, and the first word of its line there.
_BOOT_FILES = (
    ("boot/firmware/cmdline.txt", ""),  # Raspberry Pi OS from Debian 12 on
    ("boot/cmdline.txt", ""),  # Raspberry Pi OS before
    ("boot/extlinux/extlinux.conf", "APPEND"),  # Jetson
    ("etc/default/grub", "GRUB_CMDLINE_LINUX="),
)


def cgroup(root: Path) -> Finding:
    """Whether the kernel counts and limits memory by control group."""
    group = root / "sys/fs/cgroup"
    controllers = read_text(group / "cgroup.controllers")
    if controllers is None and not group.is_dir():
        return skipped("cgroup", "no control groups are mounted here")
    if "memory" not in (controllers or "").split() and not (group / "memory").is_dir():
        command_line = read_text(root / "proc/cmdline") or ""
        why = ": the kernel was started with cgroup_disable=memory"
        return warning(
            "cgroup",
            "no memory controller" + (why if "cgroup_disable=memory" in command_line else ""),
            f"{_boot_option(root, 'cgroup_enable=memory')}; until then systemd's MemoryMax= and "
            "containers' limits are ignored without a word",
        )
    found = Cgroup(root).read()
    if found.limit_bytes is None or found.free_bytes is None:
        return ok("cgroup", "memory controller there, no limit on this process")
    limit, free = format_bytes(found.limit_bytes), format_bytes(found.free_bytes)
    return ok("cgroup", f"limit of {limit}, {free} of it free")


def pressure(root: Path, high_percent: float) -> Finding:
    """Pressure stall information: without it memory that gets tight is noticed late."""
    some, full = read_pressure(root / "proc/pressure/memory")
    if some is None:
        return warning(
            "pressure",
            "the kernel gives no pressure stall information (PSI)",
            f"{_boot_option(root, 'psi=1')}: the plan then shrinks before the board stalls",
        )
    seen = f"tasks waited for memory {some:.0f} % of the last ten seconds"
    if some >= high_percent:
        return warning("pressure", seen, "stop another program, or choose a smaller sub-model")
    return ok("pressure", seen if full is None else f"{seen}, all of them {full:.0f} %")


def swap(root: Path) -> Finding:
    """Swap: compressed memory is welcome, an SD card is not."""
    lines = (read_text(root / "proc/swaps") or "").splitlines()[1:]
    if not lines:
        total = read_keys(root / "proc/meminfo").get("SwapTotal")
        if total is None:
            return skipped("swap", "/proc/swaps and /proc/meminfo cannot be read")
        if total == 0:
            return ok("swap", "none; mapped weights need none")
        return ok("swap", format_bytes(total))
    names = [line.split()[0] for line in lines]
    seen = ", ".join(names)
    cards = [name for name in names if "mmcblk" in _device(root, name)]
    if cards:
        return warning(
            "swap",
            f"{seen}: {cards[0]} is on an SD card or eMMC, which is slow and wears out",
            "use compressed memory instead: sudo apt-get install systemd-zram-generator, and where "
            "there is a dphys-swapfile, sudo systemctl disable --now dphys-swapfile",
        )
    return ok("swap", seen)


def _device(root: Path, name: str) -> str:
    return name if name.startswith("/dev/") else device_of(root, name) or name


def _boot_option(root: Path, option: str) -> str:
    """Return how to add `option` to the kernel's command line: which line of which file."""
    for name, word in _BOOT_FILES:
        text = read_text(root / name)
        for number, line in enumerate((text or "").splitlines(), 1):
            if not line.strip().startswith(word):
                continue
            if word.endswith("="):
                place = f'inside the quotes of {word}"..." in line {number} of /{name}'
                return f"write {option} {place}, run sudo update-grub and restart"
            return f"write a blank and {option} at the end of line {number} of /{name} and restart"
    return f"add {option} to the kernel's command line and restart"
