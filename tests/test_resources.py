"""Snapshots from recorded trees: what each board tells, and that the rest is None."""

import base64
import logging
import os
import shutil
from pathlib import Path

import pytest

from nestd.daemon.elastic.cgroup import Cgroup
from nestd.daemon.elastic.energy import EnergyMeter, Rapl
from nestd.daemon.elastic.pressure import PressureWatch
from nestd.daemon.elastic.resources import Sampler, Snapshot
from nestd.device_profiles import detect

RECORDED = Path(__file__).parent / "recorded"
MIB = 2**20
PID = 4242


def snapshot(board: str) -> Snapshot:
    return Sampler(RECORDED / board, environ={}).sample([PID], now=0.0)


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Where `record(board)` puts a recorded tree that a test may change."""
    return tmp_path / "root"


def record(board: str, copy: Path) -> Path:
    shutil.copytree(RECORDED / board, copy)
    return copy


@pytest.mark.parametrize(
    ("board", "profile"),
    [
        ("raspberry-pi-4", "raspberry-pi-4-4gb"),
        ("raspberry-pi-5", "raspberry-pi-5-8gb"),
        ("jetson-orin-nano", "jetson-orin-nano-8gb"),
        ("laptop", "generic-x86"),
        ("container", "generic-x86"),
    ],
)
def test_the_recorded_boards_are_recognised(board: str, profile: str) -> None:
    assert detect(RECORDED / board).name == profile


def test_a_raspberry_pi_4_tells_under_voltage_and_throttling_but_no_watts() -> None:
    now = snapshot("raspberry-pi-4")
    assert now.memory.available_bytes == 3229352 * 1024
    assert now.memory.limit_bytes is None
    assert now.memory.pressure_some_percent is None
    assert now.memory.private_bytes == (84012 - 21500) * os.sysconf("SC_PAGE_SIZE")
    assert now.power.under_voltage is True
    assert now.power.throttled is True
    assert (now.power.watts, now.power.joules, now.power.on_battery) == (None, None, None)
    assert (now.thermal.celsius, now.thermal.throttle_c) == (62.322, None)
    assert now.thermal.critical_c == 110
    assert now.thermal.clock_cap_percent == 100


def test_a_raspberry_pi_5_tells_volts_and_the_watts_of_its_pmic() -> None:
    now = snapshot("raspberry-pi-5")
    assert now.power.under_voltage is False
    assert now.power.throttled is False
    assert now.power.volts == pytest.approx(5.11478)
    assert now.power.watts == pytest.approx(5.64, abs=0.05)
    assert now.power.watts_scope == "board without USB"
    # The fan's trip points are no limit.
    assert now.thermal.throttle_c is None


def test_a_jetson_tells_the_watts_of_the_module_and_its_over_current_counters(copy: Path) -> None:
    root = record("jetson-orin-nano", copy)
    sampler = Sampler(root, environ={})
    now = sampler.sample(now=0.0)
    assert now.power.watts == pytest.approx(4.984 * 1.856)
    assert now.power.watts_scope == "module"
    assert now.power.over_current is False
    assert now.power.under_voltage is False
    # A zone that is switched off (cv0) is passed over; tj has no passive trip point.
    assert (now.thermal.zone, now.thermal.celsius, now.thermal.throttle_c) == (
        "cpu-thermal",
        54.031,
        99,
    )
    assert now.thermal.clock_cap_percent == pytest.approx(100 * 1510400 / 1728000)
    assert now.memory.pressure_some_percent == 1.25
    assert now.memory.oom_kills == 0

    write(root, "sys/class/hwmon/hwmon3/oc1_event_cnt", "1")
    write(root, "sys/class/hwmon/hwmon3/oc2_event_cnt", "16")
    later = sampler.sample(now=2.0)
    assert later.power.under_voltage is True
    assert later.power.over_current is True
    assert later.power.joules == pytest.approx(2 * 4.984 * 1.856)
    assert sampler.sample(now=3.0).power.over_current is False


def test_an_agx_orin_adds_up_its_three_rails(tmp_path: Path) -> None:
    for number, label in enumerate(("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), 1):
        write(tmp_path, f"sys/class/hwmon/hwmon2/in{number}_label", label)
        write(tmp_path, f"sys/class/hwmon/hwmon2/in{number}_input", "19000")
        write(tmp_path, f"sys/class/hwmon/hwmon2/curr{number}_input", "100")
    write(tmp_path, "sys/class/hwmon/hwmon2/name", "ina3221")
    assert Sampler(tmp_path, {}).sample().power.watts == pytest.approx(5.7)


def test_an_ina238_gives_its_power_directly(tmp_path: Path) -> None:
    write(tmp_path, "sys/class/hwmon/hwmon0/name", "ina238")
    write(tmp_path, "sys/class/hwmon/hwmon0/power1_input", "14250000")
    write(tmp_path, "sys/class/hwmon/hwmon0/in1_input", "19050")
    power = Sampler(tmp_path, {}).sample().power
    assert (power.watts, power.volts) == (14.25, 19.05)


def test_a_laptop_tells_its_battery_and_joules_across_a_counter_wrap(copy: Path) -> None:
    root = record("laptop", copy)
    sampler = Sampler(root, environ={})
    first = sampler.sample(now=10.0)
    assert first.power.on_battery is True
    assert first.power.battery_percent == pytest.approx(100 * 44.72 / 53.87)
    assert (first.power.watts, first.power.joules) == (None, 0.0)
    assert (first.thermal.celsius, first.thermal.throttle_c) == (61, 100)

    wraps_at = 262143328850
    write(root, "sys/class/powercap/intel-rapl:1/energy_uj", str(wraps_at))
    sampler.sample(now=11.0)
    write(root, "sys/class/powercap/intel-rapl:1/energy_uj", "14999999")
    third = sampler.sample(now=12.0)
    assert third.power.watts == pytest.approx(15.0)
    assert third.power.watts_scope == "platform"


def test_without_readable_counters_a_laptop_counts_what_its_battery_gives(copy: Path) -> None:
    root = record("laptop", copy)
    shutil.rmtree(root / "sys/class/powercap")
    sampler = Sampler(root, environ={})
    sampler.sample(now=0.0)
    power = sampler.sample(now=10.0).power
    assert power.watts == pytest.approx(9.184)
    assert power.joules == pytest.approx(91.84)
    assert power.watts_scope == "board"


@pytest.mark.parametrize(
    ("status", "online", "expected"),
    [
        ("Discharging", "1", True),  # a supply too weak for the load
        ("Charging", "1", False),
        ("Not charging", "1", False),
        ("Full", "1", False),
        ("Unknown", "0", True),
        ("Unknown", "1", False),
    ],
)
def test_a_battery_that_drains_is_the_supply(
    copy: Path, status: str, online: str, expected: bool
) -> None:
    root = record("laptop", copy)
    write(root, "sys/class/power_supply/BAT0/status", status)
    write(root, "sys/class/power_supply/AC/online", online)
    assert Sampler(root, {}).sample().power.on_battery is expected


def test_a_container_has_the_memory_of_its_limit_and_not_the_hosts() -> None:
    memory = snapshot("container").memory
    assert memory.limit_bytes == 3584 * MIB
    # 3584 - 1210 in use, of which 970 are page cache.
    assert memory.limit_free_bytes == (3584 - 1210 + 970) * MIB
    assert memory.free_bytes == memory.limit_free_bytes
    assert memory.pressure_full_percent == 2.25


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/pod/app/worker")
    top = "sys/fs/cgroup"
    write(tmp_path, f"{top}/pod/memory.max", str(1000 * MIB))
    write(tmp_path, f"{top}/pod/memory.current", str(900 * MIB))
    write(tmp_path, f"{top}/pod/app/memory.max", "max")
    write(tmp_path, f"{top}/pod/app/memory.high", str(800 * MIB))
    write(tmp_path, f"{top}/pod/app/memory.current", str(100 * MIB))
    write(tmp_path, f"{top}/pod/app/worker/memory.max", "max")
    write(tmp_path, f"{top}/pod/app/worker/memory.current", str(50 * MIB))
    group = Cgroup(tmp_path).read()
    assert (group.limit_bytes, group.free_bytes) == (1000 * MIB, 100 * MIB)
    write(tmp_path, f"{top}/pod/app/memory.current", str(790 * MIB))
    group = Cgroup(tmp_path).read()
    assert (group.limit_bytes, group.free_bytes) == (800 * MIB, 10 * MIB)


def test_cgroup_v1_is_understood_with_and_without_the_hosts_path(tmp_path: Path) -> None:
    lines = "11:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/docker/abc"
    write(tmp_path, "proc/self/cgroup", lines)
    mount = tmp_path / "sys/fs/cgroup/memory"
    write(mount, "memory.limit_in_bytes", str(512 * MIB))
    write(mount, "memory.usage_in_bytes", str(300 * MIB))
    write(mount, "memory.stat", f"cache 1\ntotal_inactive_file {90 * MIB}\ntotal_active_file 0")
    assert Cgroup(tmp_path).read().free_bytes == 302 * MIB
    write(mount, "docker/abc/memory.limit_in_bytes", str(200 * MIB))
    write(mount, "docker/abc/memory.usage_in_bytes", str(150 * MIB))
    assert Cgroup(tmp_path).read().limit_bytes == 200 * MIB
    write(mount, "docker/abc/memory.limit_in_bytes", "9223372036854771712")
    assert Cgroup(tmp_path).read().limit_bytes == 512 * MIB


def test_a_machine_without_any_of_it_gives_a_snapshot_of_nones(tmp_path: Path) -> None:
    now = Sampler(tmp_path, {}).sample()
    assert len(now.unknown()) == sum(
        len(type(part).__dataclass_fields__) for part in (now.memory, now.power, now.thermal)
    )
    assert now.memory.free_bytes is None


def test_what_a_board_cannot_tell_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    sampler = Sampler(RECORDED / "raspberry-pi-4", environ={})
    with caplog.at_level(logging.INFO, "nestd.daemon.elastic.resources"):
        sampler.sample()
        sampler.sample()
    (message,) = caplog.messages
    assert message.startswith("this board cannot tell: memory.pressure_some_percent")
    assert "power.watts" in message
    assert "power.battery_percent" in message
    assert "limit" not in message


def test_an_energy_counter_that_only_root_may_read_is_no_counter(tmp_path: Path) -> None:
    write(tmp_path, "sys/class/powercap/intel-rapl:0/name", "package-0")
    write(tmp_path, "sys/class/powercap/intel-rapl:0/max_energy_range_uj", "262143328850")
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").mkdir()  # unreadable, even for root
    assert Rapl(tmp_path).joules() is None


def test_joules_are_the_integral_of_watts() -> None:
    meter = EnergyMeter()
    assert meter.from_watts(0.0, 4.0) == (4.0, 0.0)
    assert meter.from_watts(2.0, 6.0) == (6.0, 10.0)


def test_systemds_pressure_watch_is_asked_with_its_own_trigger(tmp_path: Path) -> None:
    # A fifo stands for the pressure file; it never reports POLLPRI.
    fifo = tmp_path / "memory.pressure"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    trigger = base64.b64encode(b"some 200000 2000000\0").decode()
    watch = PressureWatch({"MEMORY_PRESSURE_WATCH": str(fifo), "MEMORY_PRESSURE_WRITE": trigger})
    assert os.read(reader, 100) == b"some 200000 2000000\0"
    assert watch.fired() is False
    watch.close()
    assert watch.fired() is None
    os.close(reader)


@pytest.mark.parametrize(
    "environ", [{}, {"MEMORY_PRESSURE_WATCH": "/dev/null"}, {"MEMORY_PRESSURE_WATCH": "/none"}]
)
def test_without_systemd_nobody_watches_for_pressure(environ: dict[str, str]) -> None:
    assert PressureWatch(environ).fired() is None
