"""`nestd install` and `nestd uninstall` below a directory; scripts/test-appliance has them live.

MemTotal and the board come from recorded trees, systemd's part is in test_systemd_units.py.
"""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest

from nestd.cli.main import main
from nestd.daemon.config import load_settings

RECORDED = Path(__file__).parent / "recorded"
UNIT = "etc/systemd/system/nestd.service"
DROP_INS = "etc/systemd/system/nestd.service.d"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root of a Raspberry Pi 5."""
    path = tmp_path / "root"
    shutil.copytree(RECORDED / "raspberry-pi-5", path)
    return path


def install(root: Path, *options: str) -> int:
    return main(["install", "--root", str(root), "--command", "/opt/nestd/bin/nestd", *options])


def uninstall(root: Path, *options: str) -> int:
    return main(["uninstall", "--root", str(root), *options])


def written(root: Path) -> set[str]:
    """Return the files in /etc."""
    return {str(path.relative_to(root)) for path in (root / "etc").rglob("*") if path.is_file()}


def test_an_install_writes_unit_user_directories_limits_and_configuration(root: Path) -> None:
    assert install(root, "--broker", "broker.lan:8883", "--node", "kitchen") == 0
    assert written(root) == {
        UNIT,
        f"{DROP_INS}/memory.conf",
        f"{DROP_INS}/raspberry-pi.conf",
        "etc/sysusers.d/nestd.conf",
        "etc/tmpfiles.d/nestd.conf",
        "etc/nestd/nestd.yaml",
        "etc/nestd/installed.json",
    }
    assert "ExecStart=/opt/nestd/bin/nestd run\n" in (root / UNIT).read_text()
    settings = load_settings(environ={}, root=root)
    assert (settings.mqtt.host, settings.mqtt.port) == ("broker.lan", 8883)
    assert settings.node == "kitchen"
    assert settings.profile == "raspberry-pi-5-8gb"


def test_memory_high_is_what_the_profile_does_not_reserve(root: Path) -> None:
    install(root)
    reserve = load_settings(environ={}, root=root).elastic.memory.reserve_bytes
    total_kb = int((root / "proc/meminfo").read_text().split()[1])
    line = (root / DROP_INS / "memory.conf").read_text().splitlines()[-1]
    assert line == f"MemoryHigh={total_kb // 1024 - reserve // 2**20}M"


def test_a_board_of_four_gigabytes_gets_the_drop_in_for_little_memory(root: Path) -> None:
    meminfo = root / "proc/meminfo"
    meminfo.write_text("MemTotal:  4050000 kB\nMemAvailable:  3000000 kB\n")
    install(root, "--drop-in", "jetson-gpu")
    names = {path.name for path in (root / DROP_INS).iterdir()}
    assert names == {"memory.conf", "low-memory.conf", "raspberry-pi.conf", "jetson-gpu.conf"}


def test_doing_it_again_changes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(root, "--broker", "broker.lan")
    before = {name: (root / name).read_bytes() for name in written(root)}
    capsys.readouterr()
    assert install(root, "--broker", "broker.lan") == 0
    assert {name: (root / name).read_bytes() for name in written(root)} == before
    said = capsys.readouterr().out
    assert "unchanged" in said
    assert "write" not in said
    assert "update" not in said


def test_what_nobody_has_changed_is_brought_up_to_date(root: Path) -> None:
    install(root, "--broker", "old.lan")
    install(root, "--broker", "new.lan")
    assert load_settings(environ={}, root=root).mqtt.host == "new.lan"
    assert not (root / "etc/nestd/nestd.yaml.new").exists()


def test_another_option_later_leaves_the_other_settings_as_they_are(root: Path) -> None:
    install(root, "--broker", "broker.lan", "--node", "kitchen")
    install(root, "--set", "mqtt.port=8883")
    settings = load_settings(environ={}, root=root)
    assert (settings.mqtt.host, settings.mqtt.port) == ("broker.lan", 8883)
    assert settings.node == "kitchen"


@pytest.mark.parametrize("changed", ["etc/nestd/nestd.yaml", UNIT])
def test_what_was_changed_is_kept_and_the_new_one_lies_beside_it(
    root: Path, changed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    install(root, "--broker", "old.lan")
    (root / changed).write_text((root / changed).read_text() + "# mine\n")
    main(["install", "--root", str(root), "--command", "/elsewhere/nestd", "--broker", "new.lan"])
    assert (root / changed).read_text().endswith("# mine\n")
    assert f"see {Path(changed).name}.new beside it" in capsys.readouterr().out
    new = (root / f"{changed}.new").read_text()
    assert "new.lan" in new or "/elsewhere/nestd" in new


def test_an_upgrade_without_options_leaves_the_configuration_alone(root: Path) -> None:
    install(root, "--broker", "broker.lan")
    config = root / "etc/nestd/nestd.yaml"
    config.write_text("mqtt: {host: elsewhere}\n")
    assert install(root) == 0
    assert config.read_text() == "mqtt: {host: elsewhere}\n"
    assert not config.with_name("nestd.yaml.new").exists()


def test_a_dry_run_writes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install(root, "--dry-run", "--enable") == 0
    assert not (root / "etc").exists()
    said = capsys.readouterr().out
    assert f"write      {root / UNIT}" in said
    assert f"run        systemctl --root={root} enable nestd" in said


def test_the_password_is_for_root_only_and_the_configuration_names_the_credential(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "password"
    secret.write_text("hunter2\nanother line\n")
    install(root, "--username", "kitchen", "--password-file", str(secret))
    kept = root / "etc/credstore/nestd.mqtt-password"
    assert kept.read_text() == "hunter2\n"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    config = (root / "etc/nestd/nestd.yaml").read_text()
    assert "password_file: nestd.mqtt-password" in config
    assert "LoadCredential=nestd.mqtt-password" in (root / UNIT).read_text()
    assert "hunter2" not in config + capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--profile", "raspberry-pi-9"], "no device profile is called 'raspberry-pi-9'"),
        (["--broker", "mqtt://broker"], "write HOST or HOST:PORT"),
        (["--broker", "broker.lan:99999"], "mqtt.port"),
        (["--set", "mqtt.hots=x"], "did you mean `host`?"),
        (["--bundle", "/home/pi/gemma"], "move it to /var/lib/nestd"),
        (["--bundle", "/tmp/gemma"], "cannot see it"),
        (["--drop-in", "turbo"], "no drop-in is called turbo"),
        (["--password-file", "/nowhere/password"], "cannot read /nowhere/password"),
        (["--set", "elastic.memory.reserve_bytes=64G"], "nothing is left"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(
    root: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install(root, *options) == 2
    assert words in capsys.readouterr().err
    assert not (root / "etc").exists()


@pytest.mark.parametrize(
    ("broker", "host", "port"),
    [("broker.lan", "broker.lan", 1883), ("[fd00::1]:8883", "fd00::1", 8883)],
)
def test_a_broker_is_a_name_or_an_address_with_or_without_port(
    root: Path, broker: str, host: str, port: int
) -> None:
    install(root, "--broker", broker)
    settings = load_settings(environ={}, root=root)
    assert (settings.mqtt.host, settings.mqtt.port) == (host, port)


def test_an_uninstall_keeps_configuration_and_bundles(root: Path) -> None:
    install(root, "--broker", "broker.lan")
    bundle = root / "var/lib/nestd/gemma"
    bundle.mkdir(parents=True)
    assert uninstall(root) == 0
    assert written(root) == {"etc/nestd/nestd.yaml", "etc/nestd/installed.json"}
    assert not (root / DROP_INS).exists()
    assert bundle.is_dir()


def test_an_uninstall_keeps_what_was_changed_and_foreign_drop_ins(root: Path) -> None:
    install(root)
    mine = root / DROP_INS / "override.conf"
    mine.write_text("[Service]\nNice=5\n")
    changed = root / DROP_INS / "memory.conf"
    changed.write_text("[Service]\nMemoryHigh=1G\n")
    uninstall(root)
    assert mine.exists()
    assert changed.exists()


def test_a_purge_leaves_nothing(root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("hunter2\n")
    install(root, "--password-file", str(secret))
    (root / "etc/nestd/nestd.yaml").write_text("node: mine\n")
    (root / "var/lib/nestd/prepared").mkdir(parents=True)
    assert uninstall(root, "--purge") == 0
    assert written(root) == set()
    assert not (root / "var/lib/nestd").exists()


def test_in_a_debian_package_unit_user_and_directories_are_dpkgs(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = root / "usr/lib/systemd/system/nestd.service"
    packaged.parent.mkdir(parents=True)
    packaged.write_text("")
    install(root)
    names = {"etc/nestd/nestd.yaml", "etc/nestd/installed.json"}
    assert written(root) == names | {
        f"{DROP_INS}/memory.conf",
        f"{DROP_INS}/raspberry-pi.conf",
    }
    assert uninstall(root) == 2
    assert "apt remove nestd" in capsys.readouterr().err
    monkeypatch.setenv("DPKG_MAINTSCRIPT_PACKAGE", "nestd")
    assert uninstall(root) == 0
    assert written(root) == names


def test_a_broken_record_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = root / "etc/nestd/installed.json"
    record.parent.mkdir(parents=True)
    record.write_text("{")
    assert install(root) == 2
    assert f"cannot read {record}" in capsys.readouterr().err


def test_the_record_holds_what_was_written_and_nothing_else(root: Path) -> None:
    install(root)
    record = json.loads((root / "etc/nestd/installed.json").read_text())
    assert set(record) == written(root) - {"etc/nestd/installed.json"}
