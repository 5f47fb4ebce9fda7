"""What `nestd doctor` says about machines, disks and files: recorded boards and small changes."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
from support.node import settings_for_tests

from nestd.bundle.manifest import Bundle
from nestd.cli.main import main
from nestd.daemon.doctor import files, machine, memory, model, reach, sensors, storage
from nestd.daemon.doctor.finding import Finding
from nestd.daemon.doctor.mounts import device_of
from nestd.daemon.elastic.memory import Memory
from nestd.daemon.elastic.resources import Sampler, Snapshot
from nestd.daemon.mqtt.packets import TransportOptions

RECORDED = Path(__file__).parent / "recorded"
MOUNTS = """\
22 1 179:2 / / rw,noatime shared:1 - ext4 /dev/mmcblk0p2 rw
30 22 179:1 / /boot/firmware rw - vfat /dev/mmcblk0p1 rw
31 22 259:1 / /mnt/ssd rw - ext4 /dev/nvme0n1p1 rw
"""


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def outcome(finding: Finding) -> str:
    """Every remedy is there exactly where something is amiss."""
    assert (finding.remedy is not None) == (finding.outcome in ("warning", "failed"))
    return finding.outcome


# The kernel


@pytest.mark.parametrize("file", ["boot/firmware/cmdline.txt", "boot/cmdline.txt"])
def test_raspberry_pi_os_without_a_memory_controller_is_told_the_line_to_change(
    tmp_path: Path, file: str
) -> None:
    write(tmp_path, "sys/fs/cgroup/cgroup.controllers", "cpuset cpu io pids\n")
    write(tmp_path, "proc/cmdline", "coherent_pool=1M cgroup_disable=memory root=PARTUUID=1\n")
    write(tmp_path, file, "console=tty1 root=PARTUUID=1 rootwait\n")
    finding = memory.cgroup(tmp_path)
    assert outcome(finding) == "warning"
    assert "cgroup_disable=memory" in finding.seen
    assert f"cgroup_enable=memory at the end of line 1 of /{file}" in str(finding.remedy)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("boot/extlinux/extlinux.conf", "TIMEOUT 30\nLABEL a\n      APPEND ${c} rw\n", "of line 3"),
        (
            "etc/default/grub",
            '# x\nGRUB_CMDLINE_LINUX=""\n',
            'inside the quotes of GRUB_CMDLINE_LINUX="..." in line 2 of /etc/default/grub, run',
        ),
        ("etc/hosts", "", "add psi=1 to the kernel's command line"),
    ],
)
def test_other_boards_are_told_their_own_line(
    tmp_path: Path, file: str, text: str, words: str
) -> None:
    write(tmp_path, file, text)
    finding = memory.pressure(tmp_path, 10)
    assert outcome(finding) == "warning"
    assert words in str(finding.remedy)


def test_a_limit_of_the_control_group_is_told(tmp_path: Path) -> None:
    write(tmp_path, "sys/fs/cgroup/cgroup.controllers", "cpu memory\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.max", f"{2**30}\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.current", f"{2**29}\n")
    write(tmp_path, "proc/self/cgroup", "0::/a\n")
    finding = memory.cgroup(tmp_path)
    assert outcome(finding) == "ok"
    assert "limit of 1.00 GB, 512 MB of it free" in finding.seen
    assert outcome(memory.cgroup(tmp_path / "nowhere")) == "skipped"


@pytest.mark.parametrize(("some", "expected"), [("0.50", "ok"), ("42.00", "warning")])
def test_memory_pressure_is_judged_by_the_profiles_threshold(
    tmp_path: Path, some: str, expected: str
) -> None:
    line = f"avg10={some} avg60=0.00 avg300=0.00 total=1"
    write(tmp_path, "proc/pressure/memory", f"some {line}\nfull {line}\n")
    assert outcome(memory.pressure(tmp_path, 10)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/dev/zram0", "ok"),
        ("/var/swap", "warning"),
        ("/dev/mmcblk0p3", "warning"),
        ("/mnt/ssd/swap", "ok"),
    ],
)
def test_swap_on_an_sd_card_is_warned_of(tmp_path: Path, name: str, expected: str) -> None:
    write(tmp_path, "proc/self/mountinfo", MOUNTS)
    write(tmp_path, "proc/swaps", f"Filename Type Size Used Priority\n{name} file 102396 0 -2\n")
    finding = memory.swap(tmp_path)
    assert outcome(finding) == expected
    assert name in finding.seen


def test_no_swap_is_well_and_no_proc_is_skipped(tmp_path: Path) -> None:
    assert outcome(memory.swap(tmp_path)) == "skipped"
    write(tmp_path, "proc/meminfo", "SwapTotal: 0 kB\n")
    assert outcome(memory.swap(tmp_path)) == "ok"


def test_a_path_lies_on_the_deepest_mount_that_holds_it(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/mountinfo", MOUNTS)
    assert device_of(tmp_path, "/mnt/ssd/bundle") == "/dev/nvme0n1p1"
    assert device_of(tmp_path, "/mnt/ssdx") == "/dev/mmcblk0p2"
    assert device_of(tmp_path / "nowhere", "/") is None


# The processor, the libraries, the clock


@pytest.mark.parametrize(
    ("architecture", "features", "words", "expected"),
    [
        ("aarch64", "Features : fp asimd evtstrm crc32 cpuid", "armv8.0", "warning"),
        ("aarch64", "Features : fp asimd asimddp", "arm-dotprod", "ok"),
        ("aarch64", "Features : fp asimd asimddp i8mm", "arm-i8mm", "ok"),
        ("x86_64", "flags : sse2 ssse3", "x86-baseline", "warning"),
        ("x86_64", "flags : avx2 fma", "x86-avx2", "ok"),
        ("x86_64", "flags : avx2 fma avx512bw avx512vl avx512_vnni", "x86-avx512-vnni", "ok"),
    ],
)
def test_the_class_of_the_cpu_says_what_it_means_for_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    features: str,
    words: str,
    expected: str,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: architecture)
    write(tmp_path, "proc/cpuinfo", f"processor : 0\n{features}\n")
    finding = machine.cpu(tmp_path)
    assert outcome(finding) == expected
    assert words in finding.seen
    assert "8-bit" in finding.seen
    assert outcome(machine.cpu(tmp_path / "nowhere")) == "skipped"


def test_the_interpreter_and_onnx_runtime_are_told() -> None:
    assert outcome(machine.python()) == "ok"
    finding = machine.onnx_runtime(["CPUExecutionProvider"])
    assert outcome(finding) == "ok"
    assert "CPUExecutionProvider" in finding.seen
    finding = machine.onnx_runtime(["NoSuchExecutionProvider", "CPUExecutionProvider"])
    assert outcome(finding) == "failed"
    assert "not NoSuchExecutionProvider" in finding.seen


def test_a_clock_that_timesyncd_has_set_is_well(tmp_path: Path) -> None:
    assert outcome(machine.clock(tmp_path)) == "skipped"
    write(tmp_path, "run/systemd/timesync/synchronized", "")
    assert outcome(machine.clock(tmp_path)) == "ok"
    assert outcome(machine.clock(Path("/"))) in ("ok", "warning")


# Sensors


def test_a_recorded_pi_4_with_a_weak_supply_is_told_to_take_another(tmp_path: Path) -> None:
    root = RECORDED / "raspberry-pi-4"
    finding = sensors.supply(Sampler(root, environ={}).sample(), root)
    assert outcome(finding) == "warning"
    assert "too weak now" in finding.seen
    finding = sensors.supply(Snapshot(0.0), tmp_path)
    assert outcome(finding) == "skipped"


def test_under_voltage_since_the_start_is_remembered_by_the_firmware(tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(RECORDED / "raspberry-pi-5", root)
    now = Sampler(root, environ={}).sample()
    assert outcome(sensors.supply(now, root)) == "ok"
    (flags,) = root.glob("sys/devices/platform/soc*/*firmware/get_throttled")
    flags.write_text("50000\n")
    finding = sensors.supply(Sampler(root, environ={}).sample(), root)
    assert outcome(finding) == "warning"
    assert "since the board started" in finding.seen


def test_a_hot_board_is_told_so(tmp_path: Path) -> None:
    elastic = settings_for_tests().elastic
    write(tmp_path, "sys/class/thermal/thermal_zone0/type", "cpu")
    write(tmp_path, "sys/class/thermal/thermal_zone0/trip_point_0_type", "passive")
    write(tmp_path, "sys/class/thermal/thermal_zone0/trip_point_0_temp", "85000")
    for milli, expected in (("40000", "ok"), ("84000", "warning")):
        write(tmp_path, "sys/class/thermal/thermal_zone0/temp", milli)
        assert outcome(sensors.heat(Sampler(tmp_path, environ={}).sample(), elastic)) == expected
    assert outcome(sensors.heat(Snapshot(0.0), elastic)) == "skipped"


# The bundle and the disk


def test_a_damaged_file_of_the_bundle_is_found(tiny_bundle: Bundle, tmp_path: Path) -> None:
    settings = settings_for_tests()
    assert outcome(model.integrity(settings, tiny_bundle)) == "ok"
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    data = bytearray((copy / "decoder.data").read_bytes())
    data[17] ^= 1
    (copy / "decoder.data").write_bytes(data)
    finding = model.integrity(settings, Bundle.open(copy))
    assert outcome(finding) == "failed"
    assert "decoder.data" in finding.seen


def test_a_board_that_is_too_small_for_the_smallest_size_is_told(tiny_bundle: Bundle) -> None:
    settings = settings_for_tests()

    def fits(free: int | None) -> Finding:
        return model.fit(settings, tiny_bundle, Snapshot(0.0, Memory(available_bytes=free)))

    assert outcome(fits(8 * 2**30)) == "ok"
    assert outcome(fits(settings.elastic.memory.reserve_bytes)) == "failed"
    assert outcome(fits(None)) == "skipped"


def test_a_disk_without_room_for_prepared_weights_is_told(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    def space(**overrides: object) -> Finding:
        settings = settings_for_tests(state_directory=str(tmp_path / "new"), **overrides)
        return storage.space(settings, tiny_bundle)

    assert outcome(space()) == "ok"
    assert outcome(space(media__store_bytes="1000000G")) == "failed"


def test_the_disks_speed_is_read_from_the_bundle(tiny_bundle: Bundle, tmp_path: Path) -> None:
    assert outcome(storage.speed(Path("/"), tiny_bundle)) == "skipped"  # too small to tell
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    name = max(tiny_bundle.manifest.files, key=lambda n: tiny_bundle.manifest.files[n].bytes)
    (copy / name).write_bytes(bytes(2 * storage.PIECE_BYTES))
    finding = storage.speed(Path("/"), Bundle(copy, tiny_bundle.manifest, b""))
    if outcome(finding) == "skipped":
        pytest.skip(finding.seen)  # a filesystem without O_DIRECT
    assert "B/s" in finding.seen


# The configuration


def test_a_password_that_everybody_may_read_is_found(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("hunter2\n")

    def secrets(mode: int) -> Finding:
        password.chmod(mode)
        return files.secrets(settings_for_tests(mqtt__password_file=str(password)).mqtt)

    assert outcome(secrets(0o600)) == "ok"
    assert outcome(secrets(0o640)) == "ok"
    finding = secrets(0o644)
    assert outcome(finding) == "failed"
    assert f"chmod 600 {password}" in str(finding.remedy)
    password.unlink()
    mqtt = settings_for_tests(mqtt__password_file=str(password)).mqtt
    assert outcome(files.secrets(mqtt)) == "failed"
    assert outcome(files.secrets(settings_for_tests().mqtt)) == "skipped"


def test_a_credential_that_only_the_service_sees_is_asked_for_as_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mqtt = settings_for_tests(mqtt__password_file="nestd.mqtt-password").mqtt
    monkeypatch.chdir(tmp_path)
    finding = files.secrets(mqtt)
    assert outcome(finding) == "failed"
    assert "CREDENTIALS_DIRECTORY=/etc/credstore nestd doctor" in str(finding.remedy)
    (tmp_path / "nestd.mqtt-password").write_text("hunter2\n")
    (tmp_path / "nestd.mqtt-password").chmod(0o600)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert outcome(files.secrets(mqtt)) == "ok"


def test_a_filter_that_cannot_be_run_is_found(tmp_path: Path) -> None:
    program = tmp_path / "judge"
    program.write_text("#!/bin/sh\n")
    settings = settings_for_tests(filter__command=[str(program)]).filter
    assert outcome(files.program(settings)) == "failed"
    program.chmod(0o755)
    assert outcome(files.program(settings)) == "ok"
    assert outcome(files.program(settings_for_tests(filter__patterns=["a"]).filter)) == "ok"
    assert outcome(files.program(settings_for_tests().filter)) == "skipped"


def test_a_configuration_that_everybody_may_change_is_found(tmp_path: Path) -> None:
    config = tmp_path / "nestd.yaml"
    assert outcome(files.permissions(config)) == "skipped"
    config.write_text("")
    config.chmod(0o644)
    assert outcome(files.permissions(config)) == "ok"
    config.chmod(0o666)
    assert outcome(files.permissions(config)) == "failed"


def test_a_board_that_no_profile_knows_is_told() -> None:
    assert outcome(files.profile(Path("/nonexistent"), "generic", True)) == "warning"
    assert outcome(files.profile(RECORDED / "raspberry-pi-5", "raspberry-pi-5-8gb", True)) == "ok"


# The command


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Finding]]:
    status = main(["doctor", "--json", *arguments])
    document = json.loads(capsys.readouterr().out)
    assert document["healthy"] == (status == 0)
    return status, {check["name"]: Finding(**check) for check in document["checks"]}


def test_without_a_broker_and_a_bundle_all_else_is_examined(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, found = run(capsys, "--host", "127.0.0.1", "--port", str(closed_port()))
    assert status == 1
    assert {name for name, finding in found.items() if finding.outcome == "failed"} == {"broker"}
    assert found["bundle"].outcome == found["login"].outcome == "skipped"
    assert found["python"].outcome == "ok"


def test_a_bundle_is_examined_and_quick_leaves_its_digests_out(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [
        *("--bundle", str(tiny_bundle.path), "--host", "127.0.0.1", "--port", str(closed_port())),
        *("--set", f"state_directory={tmp_path}"),
    ]
    _, found = run(capsys, *arguments)
    assert found["bundle"].outcome == found["bundle files"].outcome == "ok"
    assert found["disk space"].outcome == "ok"
    _, found = run(capsys, *arguments, "--quick")
    assert found["bundle files"].outcome == "skipped"


def test_a_recorded_board_can_be_examined(capsys: pytest.CaptureFixture[str]) -> None:
    root = RECORDED / "raspberry-pi-4"
    _, found = run(capsys, "--set", f"sysroot={root}", "--port", str(closed_port()))
    assert found["supply"].outcome == "warning"
    assert found["pressure"].outcome == "warning"


def test_a_broken_configuration_is_a_finding_and_the_machine_is_examined_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "nestd.yaml"
    config.write_text("mqtt: {hostt: a}\nlog_level: loud\n")
    status, found = run(capsys, "--config", str(config))
    assert status == 1
    assert "did you mean `host`" in found["configuration"].seen
    assert "loud" in found["configuration"].seen
    assert found["onnxruntime"].outcome == "ok"


def test_people_get_a_line_a_check_with_its_remedy_below(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--host", "127.0.0.1", "--port", str(closed_port())]) == 1
    text = capsys.readouterr().out
    assert "ok       python: 3." in text
    assert "failed   broker: " in text
    assert "\n         -> start the broker" in text
    assert "1 failed" in text.splitlines()[-1]


def test_a_name_that_nobody_knows_is_told_apart_from_a_closed_port() -> None:
    finding = reach.network(TransportOptions("no-such-host.invalid"))
    assert outcome(finding) == "failed"
    assert "is not known" in finding.seen


def test_without_tls_only_a_broker_on_this_machine_passes() -> None:
    for host in ("localhost", "127.0.0.1", "::1"):
        assert outcome(reach.handshake(TransportOptions(host))) == "skipped"
    for host in ("broker.lan", "192.168.1.2"):
        assert outcome(reach.handshake(TransportOptions(host))) == "warning"
