"""Raspberry Pi: under-voltage, throttling, and the Pi 5's PMIC.

Sources: the kernel's `rpi_volt` hwmon (`in0_lcrit_alarm`), the firmware driver's `get_throttled`,
and the firmware command `pmic_read_adc`, which is asked as `vcgencmd` does it: by a mailbox message
through /dev/vcio_gencmd or /dev/vcio (group `video`). Below another root than "/" its answer is
read from the file `dev/vcio.pmic_read_adc`, so that a board can be recorded.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from nestd.daemon.elastic.sysfs import children, hwmons, read_int, read_text

_UNDER_VOLTAGE, _CLOCK_CAPPED, _THROTTLED, _SOFT_LIMIT = (1 << bit for bit in range(4))
_WAS_UNDER_VOLTAGE = _UNDER_VOLTAGE << 16

# _IOWR(100, 0, char *) of the firmware driver, and vcgencmd's message layout.
_IOCTL_MBOX_PROPERTY = 0xC0086400
_TAG_GENCMD = 0x00030080
_TEXT = 4096

_ADC = re.compile(r"^\s*(\S+)_([AV])\s+(?:current|volt)\(\d+\)=([0-9.]+)[AV]", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Raspberry:
    """What only a Raspberry Pi tells; None: this board cannot.

    Attributes:
        under_voltage: the supply is below 4.63 V now.
        was_under_voltage: it was, since the board started.
        throttled: the firmware holds the clock down now (heat or under-voltage).
        volts: at the 5 V input (Pi 5).
        watts: of the rails behind the PMIC (Pi 5): USB devices and HATs on 5 V are not in it.
    """

    under_voltage: bool | None = None
    was_under_voltage: bool | None = None
    throttled: bool | None = None
    volts: float | None = None
    watts: float | None = None


class RaspberrySource:
    """Finds the sensors once, and reads them at each `read()`."""

    def __init__(self, root: Path) -> None:
        self._alarms = [path / "in0_lcrit_alarm" for path in hwmons(root, "rpi_volt")]
        self._flags = children(root / "sys/devices/platform", "soc*/*firmware/get_throttled")
        nodes = ("dev/vcio_gencmd", "dev/vcio") if root == Path("/") else ()
        self._mailbox = next((root / node for node in nodes if (root / node).exists()), None)
        self._recorded = None if root == Path("/") else root / "dev/vcio.pmic_read_adc"

    def read(self) -> Raspberry:
        """Return what the firmware says now."""
        alarm = read_int(self._alarms[0]) if self._alarms else None
        flags = read_int(self._flags[0], base=16) if self._flags else None
        volts, watts = parse_pmic(self._pmic() or "")
        under_voltage = None if alarm is None else alarm != 0
        if flags is not None:
            under_voltage = bool(under_voltage) or bool(flags & _UNDER_VOLTAGE)
        held = _CLOCK_CAPPED | _THROTTLED | _SOFT_LIMIT
        return Raspberry(
            under_voltage=under_voltage,
            was_under_voltage=None if flags is None else bool(flags & _WAS_UNDER_VOLTAGE),
            throttled=None if flags is None else bool(flags & held),
            volts=volts,
            watts=watts,
        )

    def _pmic(self) -> str | None:
        if self._recorded is not None:
            return read_text(self._recorded)
        if self._mailbox is None:
            return None
        answer = _gencmd(self._mailbox, "pmic_read_adc")
        if answer is None or "=" not in answer:
            # A Pi 4 has the mailbox but no such command, or we may not open it: ask no more.
            self._mailbox = None
        return answer


def parse_pmic(text: str) -> tuple[float | None, float | None]:
    """Return the input voltage and the sum of volts times amperes of `pmic_read_adc`'s answer."""
    amperes: dict[str, float] = {}
    volts: dict[str, float] = {}
    for rail, unit, value in _ADC.findall(text):
        (amperes if unit == "A" else volts)[rail] = float(value)
    watts = [amperes[rail] * volts[rail] for rail in amperes if rail in volts]
    return volts.get("EXT5V"), sum(watts) if watts else None


def _gencmd(mailbox: Path, command: str) -> str | None:
    """Ask the firmware as vcgencmd does, or return None where it refuses."""
    import fcntl

    head = struct.calcsize("=6I")
    message = bytearray(head + _TEXT + 4)
    struct.pack_into("=6I", message, 0, len(message), 0, _TAG_GENCMD, _TEXT, 0, 0)
    message[head : head + len(command)] = command.encode()
    try:
        with mailbox.open("rb", buffering=0) as file:
            fcntl.ioctl(file, _IOCTL_MBOX_PROPERTY, message)
    except OSError:
        return None
    return message[head : head + _TEXT].split(b"\0", 1)[0].decode("utf-8", errors="replace")
