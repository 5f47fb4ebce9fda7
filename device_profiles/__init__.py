"""One YAML file per board, and the detection of the board this machine is.

A profile holds every number that depends on the board, under `settings:` in the form of
nestd.yaml, and under `match:` how to recognise the board:

    device_tree: texts of which one occurs in the device tree's model or compatible
    dmi:         texts of which one occurs in DMI's vendor or product name
    cpuinfo:     texts of which one occurs in /proc/cpuinfo
    memory_gib:  [at least, below], of MemTotal

Every key given must hold; the profile with the most keys wins. A profile may `extends:` another
and then names only what differs. `generic` matches everything.

This module knows YAML and /proc; what the settings mean is in `nestd.daemon.settings`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from nestd.bundle.errors import ConfigError

FALLBACK = "generic"


@dataclass(frozen=True, slots=True)
class Profile:
    """One device profile as its file has it; `settings` are its own, not those it extends."""

    name: str
    title: str
    path: str
    text: str
    extends: str | None = None
    match: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Board:
    """What detection looks at; an empty text or None where the machine cannot tell."""

    device_tree: str
    dmi: str
    cpuinfo: str
    memory_gib: float | None

    @property
    def title(self) -> str:
        """The board in its maker's words, or `unknown board`."""
        return self.device_tree.partition("\n")[0] or self.dmi or "unknown board"


def profiles() -> dict[str, Profile]:
    """Return the shipped profiles by name, in alphabetical order."""
    found = [
        _parse(item)
        for item in files("nestd.device_profiles").iterdir()
        if item.name.endswith(".yaml")
    ]
    return {profile.name: profile for profile in sorted(found, key=lambda profile: profile.name)}


def find(name: str) -> Profile:
    """Return the shipped profile `name`, or the one in a file of your own when it is a path.

    Raises:
        ConfigError: there is none; the message lists the shipped ones.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"the device profile {name} does not exist")
        return _parse(path)
    shipped = profiles()
    if name not in shipped:
        raise ConfigError(
            f"no device profile is called {name!r}; choose one of {', '.join(shipped)}, or give "
            f"the path of your own"
        )
    return shipped[name]


def chain(profile: Profile) -> list[Profile]:
    """Return the profile and those it extends, the most general first.

    Raises:
        ConfigError: an extended profile does not exist, or they extend each other in a circle.
    """
    result = [profile]
    while result[0].extends is not None:
        parent = find(result[0].extends)
        if parent.path in {item.path for item in result}:
            raise ConfigError(f"{profile.path}: the profiles extend each other in a circle")
        result.insert(0, parent)
    return result


def look(root: Path = Path("/")) -> Board:
    """Read what identifies the board below `root`."""
    device_tree = root / "proc/device-tree"
    if not device_tree.is_dir():
        device_tree = root / "sys/firmware/devicetree/base"
    dmi = root / "sys/class/dmi/id"
    total = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    return Board(
        # Strings in a device tree end in NUL, lists of them are joined by it.
        device_tree="\n".join(
            part
            for name in ("model", "compatible")
            for part in _read(device_tree / name).split("\x00")
            if part
        ),
        dmi=" ".join(
            text for name in ("sys_vendor", "product_name") if (text := _read(dmi / name).strip())
        ),
        cpuinfo=_read(root / "proc/cpuinfo"),
        memory_gib=int(total[1]) / 2**20 if total else None,
    )


def detect(root: Path = Path("/")) -> Profile:
    """Return the most specific shipped profile that matches the machine below `root`."""
    board = look(root)
    matching = [profile for profile in profiles().values() if _matches(profile, board)]
    return max(matching, key=lambda profile: len(profile.match))


def _matches(profile: Profile, board: Board) -> bool:
    def any_of(text: str) -> Callable[[list[str]], bool]:
        return lambda wanted: any(item.lower() in text.lower() for item in wanted)

    def memory(bounds: list[float]) -> bool:
        return board.memory_gib is not None and bounds[0] <= board.memory_gib < bounds[1]

    tests: dict[str, Callable[[Any], bool]] = {
        "device_tree": any_of(board.device_tree),
        "dmi": any_of(board.dmi),
        "cpuinfo": any_of(board.cpuinfo),
        "memory_gib": memory,
    }
    return all(tests[key](wanted) for key, wanted in profile.match.items())


def _parse(file: Traversable) -> Profile:
    text = file.read_text(encoding="utf-8")
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("title"), str):
        raise ConfigError(f"{file}: a device profile needs a `title`, and `settings`")
    unknown = set(document) - {"title", "extends", "match", "settings"}
    match = document.get("match") or {}
    unknown_match = set(match) - {"device_tree", "dmi", "cpuinfo", "memory_gib"}
    if unknown or unknown_match:
        raise ConfigError(
            f"{file}: a device profile has no key `{min(unknown or unknown_match)}`; it has title, "
            "extends, settings, and match with device_tree, dmi, cpuinfo, memory_gib"
        )
    return Profile(
        name=file.name.removesuffix(".yaml").removesuffix(".yml"),
        title=document["title"],
        path=str(file),
        text=text,
        extends=document.get("extends"),
        match=match,
    )


def _read(path: Path) -> str:
    """Return the text of `path`, or nothing where this machine has no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
