"""docs/reference/settings.md and profiles.md: every setting, and what each board's profile sets."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from schema_words import default_words, size_words, words

from nestd.daemon.config import load_settings
from nestd.daemon.section import Section
from nestd.daemon.settings import Settings
from nestd.device_profiles import FALLBACK, Profile, profiles

NOWHERE = Path("/nonexistent")
CONFIGURATION = Path(__file__).parents[2] / "docs" / "configuration.md"
SETTINGS_HEAD = """\
# Settings

Every key of `nestd.yaml` with its type, its limits and its default, made from the models that check
the configuration. [Configuration](../configuration.md) tells how the layers work.

- In the environment, `engine.threads` is `NESTD_ENGINE__THREADS`.
- On the command line of `nestd run`, it is `--set engine.threads=4`.
- A default in *italics* depends on the board: it is the careful one of the profile `generic`, and
  [another profile](profiles.md) may have another.
- Sizes may be written `600M` or `1.5G`.
"""
PROFILES_HEAD = """\
# Profiles

What each device profile sets, made from the files of `device_profiles/`. `nestd profiles` shows
which one this machine gets; `nestd profiles --show NAME` prints it. Numbers come from data sheets
and from simulation unless a comment says otherwise.

`generic` has a value for all of these; every other profile is listed with what differs.
"""


def settings_page() -> str:
    """Return the page of settings."""
    generic = _of_profile(FALLBACK)
    told = meanings()
    lines = [SETTINGS_HEAD]
    for path, model in _sections(Settings, ()):
        lines += [f"## {'.'.join(path) or 'Top level'}", "", _summary(model), ""]
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        own = attributes(model)
        for key, value in model.model_json_schema()["properties"].items():
            if "$ref" in value:
                continue
            full = ".".join((*path, key))
            if key == "profile":
                default = "detected"
            elif model.model_fields[key].is_required():
                default = f"*{size_words(key, generic[full])}*"
            elif key.endswith("_bytes"):
                default = size_words(key, value["default"])
            else:
                default = default_words(value["default"])
            lines.append(
                f"| `{key}` | {words(value)} | {default} | {own.get(key) or told.get(full, '')} |"
            )
        lines.append("")
    return "\n".join(lines)


def profiles_page() -> str:
    """Return the page of profiles."""
    generic = _of_profile(FALLBACK)
    lines = [PROFILES_HEAD]
    for profile in profiles().values():
        lines += [f"## {profile.name}", "", f"{profile.title}. {_match(profile)}", ""]
        own = _of_profile(profile.name)
        different = [key for key in generic if own[key] != generic[key] and key != "profile"]
        if different:
            lines += ["| key | here | `generic` |", "|---|---|---|"]
            lines += [
                f"| `{key}` | {size_words(key, own[key])} | {size_words(key, generic[key])} |"
                for key in different
            ]
            lines.append("")
        lines += ["The file, with its reasons:", "", "```yaml", profile.text.rstrip(), "```", ""]
    return "\n".join(lines)


def meanings() -> dict[str, str]:
    """Return what docs/configuration.md says about each setting, by its dotted key.

    A row may be about several: where a docstring says more of one, that is the better meaning.
    """
    found: dict[str, str] = {}
    section = ""
    for line in CONFIGURATION.read_text(encoding="utf-8").splitlines():
        if line.startswith("### "):
            section = line.removeprefix("### ").removeprefix("Top level")
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            first, *more = re.findall(r"`([\w.]+)`", cells[0])
            group, dot, _ = first.rpartition(".")
            meaning = re.sub(r"\]\((?=[\w-]+\.md)", "](../", cells[-1])
            for key in (first, *(f"{group}{dot}{key}" for key in more)):
                found[f"{section}.{key}".strip(".")] = meaning
    return found


def attributes(model: type[Section]) -> dict[str, str]:
    """Return the meaning of each key from the "Attributes:" of the model's docstring."""
    text = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for item in re.split(r"\n(?=\S)", inspect.cleandoc(text)):
        keys, colon, meaning = item.partition(":")
        if colon:
            for key in keys.split(","):
                found[key.strip()] = " ".join(meaning.split())
    return found


def _sections(
    model: type[Section], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], type[Section]]]:
    yield path, model
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _sections(kind, (*path, name))


def _summary(model: type[Section]) -> str:
    return inspect.cleandoc(model.__doc__ or "").partition("\n")[0]


def _of_profile(name: str) -> dict[str, Any]:
    """Return every setting by its dotted key."""
    settings = load_settings(profile=name, environ={}, root=NOWHERE)
    return dict(_leaves(settings, ""))


def _leaves(section: Section, above: str) -> Iterator[tuple[str, Any]]:
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, Section):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _match(profile: Profile) -> str:
    if not profile.match:
        return "For every machine that no other profile knows."
    names = {"device_tree": "the device tree", "dmi": "DMI", "cpuinfo": "`/proc/cpuinfo`"}
    parts = [
        f"{names[key]} has {' or '.join(f'`{item}`' for item in value)}"
        for key, value in profile.match.items()
        if key != "memory_gib"
    ]
    if "memory_gib" in profile.match:
        least, below = profile.match["memory_gib"]
        parts.append(f"there are {least} to {below} GiB of memory")
    return f"Chosen where {' and '.join(parts)}."
