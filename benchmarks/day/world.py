"""A simulated day for a Raspberry Pi 5 with 8 GB on a UPS board, written into a recorded tree.

The tree is `tests/recorded/raspberry-pi-5` plus a `power_supply` battery. Each tick writes what the
kernel would show; the sampler reads it as on a real board. The loop is closed: what the plan runs
decides watts, and watts decide heat and how fast the battery drains. The constants are plausible,
not measured: the day shows how the policy behaves, not how fast a Pi is.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

HOUR = 3600.0

MAINS_LOST, MAINS_BACK = 5.0, 17.5  # hours of the day
BROWSER = (8.5, 10.5)  # another program holds 3.4 GB
IMAGES = ((7.5, 7.7), (14.0, 14.1), (20.0, 20.3))  # requests with pictures
WEAK_CHARGER = ((17.6, 17.62), (18.2, 18.23))  # the adapter sags while it charges
HEAT = (11.0, 15.5)  # the sun on the box
BUSY = ((6.0, 9.0), (10.0, 16.0), (17.5, 22.0))

BATTERY_WH = 74.0
IDLE_W, CHARGE_W = 3.4, 16.0
CELSIUS_PER_W = 5.2
WARM_UP_S = 150.0


@dataclass
class World:
    """The board's physics; `tick` moves it on and writes the tree."""

    root: Path
    battery: float = 100.0
    celsius: float = 45.0
    watts: float = IDLE_W
    _written: dict[str, str] = field(default_factory=dict)

    def prepare(self) -> None:
        """Add the battery to the recorded tree."""
        self._pmic = (self.root / "dev/vcio.pmic_read_adc").read_text()
        for name, text in {"type": "Battery", "scope": "System", "present": "1"}.items():
            self._write(f"sys/class/power_supply/ups/{name}", text)

    def tick(self, hour: float, seconds: float, load: float) -> None:
        """Let `seconds` pass; `load` is the size of what runs, 0 (nothing) to 1 (all of E4B)."""
        busy = any(start <= hour < end for start, end in BUSY)
        self.watts = IDLE_W + (1.4 + 4.4 * load if busy and load else 0.0)
        ambient = 24.0
        if HEAT[0] <= hour < HEAT[1]:
            middle = (HEAT[0] + HEAT[1]) / 2
            ambient += 15.0 * (1 - abs(hour - middle) / (HEAT[1] - middle))
        settled = ambient + CELSIUS_PER_W * self.watts
        self.celsius += (settled - self.celsius) * min(1.0, seconds / WARM_UP_S)

        mains = not MAINS_LOST <= hour < MAINS_BACK
        flow = CHARGE_W if mains else -self.watts
        self.battery += flow * seconds / HOUR / BATTERY_WH * 100
        self.battery = min(100.0, max(2.0, self.battery))
        weak = any(start <= hour < end for start, end in WEAK_CHARGER)
        taken = 3.4 if BROWSER[0] <= hour < BROWSER[1] else 0.0

        full = self.battery >= 100
        self._write("sys/class/power_supply/ups/capacity", f"{self.battery:.0f}")
        self._write(
            "sys/class/power_supply/ups/status",
            ("Full" if full else "Charging") if mains else "Discharging",
        )
        self._write("sys/class/thermal/thermal_zone0/temp", f"{self.celsius * 1000:.0f}")
        self._write("sys/class/hwmon/hwmon2/in0_lcrit_alarm", "1" if weak else "0")
        self._write("proc/meminfo", self._meminfo(6.9 - taken))
        self._write("dev/vcio.pmic_read_adc", self._adc())

    def images(self, hour: float) -> bool:
        """Return whether a request with a picture is waiting."""
        return any(start <= hour < end for start, end in IMAGES)

    def _adc(self) -> str:
        rest = 1.22  # watts of the rails besides the core in the recorded answer
        amperes = max(0.0, self.watts - rest) / 0.89369880
        return re.sub(r"(VDD_CORE_A current\(7\)=)[0-9.]+", rf"\g<1>{amperes:.8f}", self._pmic)

    def _meminfo(self, available_gib: float) -> str:
        kib = int(available_gib * 2**20)
        return f"MemTotal: 8255712 kB\nMemAvailable: {kib} kB\nSwapTotal: 0 kB\nSwapFree: 0 kB"

    def _write(self, path: str, text: str) -> None:
        if self._written.get(path) == text:
            return
        self._written[path] = text
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
