"""Every shipped profile is valid, and each board is recognised by what its kernel says."""

from pathlib import Path

import pytest

from nestd.bundle.errors import ConfigError
from nestd.cli.main import main
from nestd.daemon.config import load_settings
from nestd.device_profiles import detect, find, look, profiles

PI5 = ("Raspberry Pi 5 Model B Rev 1.0", ["raspberrypi,5-model-b", "brcm,bcm2712"])
PI4 = ("Raspberry Pi 4 Model B Rev 1.4", ["raspberrypi,4-model-b", "brcm,bcm2711"])
NANO = (
    "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
    ["nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234"],
)
NX = (
    "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
    ["nvidia,p3768-0000+p3767-0000", "nvidia,p3767-0000", "nvidia,tegra234"],
)
NANO_CUSTOM = ("Some carrier board", ["acme,carrier", "nvidia,p3767-0004", "nvidia,tegra234"])
AGX = (
    "NVIDIA Jetson AGX Orin Developer Kit",
    ["nvidia,p3737-0000+p3701-0000", "nvidia,p3701-0000", "nvidia,tegra234"],
)


def board(root: Path, model: str, compatible: list[str], memory_kib: int) -> Path:
    tree = root / "proc/device-tree"
    tree.mkdir(parents=True)
    (tree / "model").write_bytes(model.encode() + b"\0")
    (tree / "compatible").write_bytes(b"".join(item.encode() + b"\0" for item in compatible))
    (root / "proc/meminfo").write_text(f"MemTotal:       {memory_kib} kB\nMemFree: 1 kB\n")
    return root


@pytest.mark.parametrize("name", profiles())
def test_every_shipped_profile_is_a_whole_configuration(name: str, tmp_path: Path) -> None:
    settings = load_settings(profile=name, environ={}, root=tmp_path)
    assert settings.profile == name
    assert settings.elastic.memory.min_context_length <= settings.engine.context_length


@pytest.mark.parametrize("name", profiles())
def test_every_shipped_profile_explains_itself_in_a_header(name: str) -> None:
    assert find(name).text.startswith("# ")


@pytest.mark.parametrize(
    ("device", "memory_kib", "expected"),
    [
        (PI4, 3884376, "raspberry-pi-4-4gb"),
        (PI4, 7998804, "raspberry-pi-4-8gb"),
        (PI4, 1900000, "generic"),
        (PI5, 4148848, "raspberry-pi-5-4gb"),
        (PI5, 8255712, "raspberry-pi-5-8gb"),
        (PI5, 16612432, "raspberry-pi-5-16gb"),
        (NANO, 7801256, "jetson-orin-nano-8gb"),
        (NANO, 3560000, "jetson-orin-nano-4gb"),
        (NANO_CUSTOM, 3560000, "jetson-orin-nano-4gb"),
        (NX, 15656000, "jetson-orin-nx-16gb"),
        (NX, 7606000, "jetson-orin-nx-8gb"),
        (AGX, 31400000, "jetson-agx-orin-32gb"),
        (AGX, 64300000, "jetson-agx-orin-64gb"),
    ],
)
def test_a_board_is_recognised_by_device_tree_and_memory(
    tmp_path: Path, device: tuple[str, list[str]], memory_kib: int, expected: str
) -> None:
    assert detect(board(tmp_path, *device, memory_kib)).name == expected


def test_an_x86_machine_is_recognised_by_its_processor(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nvendor_id\t: GenuineIntel\n")
    dmi = tmp_path / "sys/class/dmi/id"
    dmi.mkdir(parents=True)
    (dmi / "sys_vendor").write_text("LENOVO\n")
    (dmi / "product_name").write_text("20XW0026GE\n")
    assert detect(tmp_path).name == "generic-x86"
    assert look(tmp_path).title == "LENOVO 20XW0026GE"


def test_a_machine_that_says_nothing_gets_the_generic_profile(tmp_path: Path) -> None:
    assert detect(tmp_path).name == "generic"
    assert look(tmp_path).title == "unknown board"
    assert look(tmp_path).memory_gib is None


def test_profiles_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"title: One\nextends: {two}\nsettings: {{}}\n")
    two.write_text(f"title: Two\nextends: {one}\nsettings: {{}}\n")
    with pytest.raises(ConfigError, match="extend each other in a circle"):
        load_settings(profile=str(one), environ={}, root=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("settings: {}\n", "needs a `title`"),
        ("title: A\nsetings: {}\n", "no key `setings`"),
        ("title: A\nmatch: {dt: [x]}\n", "no key `dt`"),
        ("title: [\n", "not valid YAML"),
    ],
)
def test_a_broken_profile_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        find(str(path))


def test_a_mistake_in_a_profile_is_reported_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("title: A\nextends: generic\nsettings:\n  engine: {thread: 2}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:4:12: engine\.thread: unknown key"):
        load_settings(profile=str(path), environ={}, root=tmp_path)


def test_the_profiles_command_marks_the_detected_board(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board(tmp_path, *PI5, 8255712)
    assert main(["profiles", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "* raspberry-pi-5-8gb" in out
    assert "detected on this machine: Raspberry Pi 5 Model B Rev 1.0, 7.9 GiB" in out


def test_the_profiles_command_shows_one_with_those_it_extends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["profiles", "--show", "raspberry-pi-5-8gb"]) == 0
    out = capsys.readouterr().out
    assert out.index("generic.yaml") < out.index("pi-5-4gb.yaml") < out.index("pi-5-8gb.yaml")
    assert main(["profiles", "--show", "toaster"]) == 2
    assert "no device profile is called 'toaster'" in capsys.readouterr().err
