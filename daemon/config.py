"""Loads the configuration: layers it, validates it, and says where each value came from.

    built-in defaults < device profile < nestd.yaml < environment < command line

The device profile is the one named by the command line, by NESTD_PROFILE or by `profile:` in
nestd.yaml, else the one detected. In the environment NESTD_MQTT__HOST is `mqtt.host`; every
variable that starts with NESTD_ is a setting, so a misspelt one is an error and not silence.

All errors of all layers are reported at once, one per line, each with its file, line and column
(or variable, or option), the key, and what to do.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nestd.bundle.errors import ConfigError
from nestd.daemon.marked_yaml import KeyPath, Mark, MarkedYaml, parse
from nestd.daemon.section import Section
from nestd.daemon.settings import Settings
from nestd.device_profiles import Profile, chain, detect, find

__all__ = [
    "CONFIG_FILE",
    "HIDDEN",
    "Explained",
    "Settings",
    "explain_settings",
    "load_settings",
    "parse_assignments",
]

CONFIG_FILE = "etc/nestd/nestd.yaml"
HIDDEN = "(set, hidden)"
_PREFIX = "NESTD_"
_NOT_SETTINGS = {"NESTD_CONFIG", "NESTD_PROFILE"}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was set: the layer's name, and the places of key and value in its file."""

    layer: str
    key: Mark | None = None
    value: Mark | None = None


@dataclass(frozen=True, slots=True)
class Explained:
    """Settings with the origin of each value.

    Attributes:
        origins: dotted key -> layer in words, for every key of the settings.
        detected: the profile was detected and not named by anyone.
    """

    settings: Settings
    origins: dict[str, str]
    detected: bool

    def redacted(self) -> dict[str, Any]:
        """Return the settings as plain data with secrets replaced, fit for logs and topics."""
        return _redact(self.settings)

    def lines(self) -> list[str]:
        """Return one line per value: key, value, and where it came from."""
        rows = [
            (key, "null" if value is None else str(value), self.origins[key])
            for key, value in _flatten(self.redacted())
        ]
        key_width = max(len(key) for key, _, _ in rows)
        value_width = min(30, max(len(value) for _, value, _ in rows))
        return [
            f"{key:{key_width}}  {value:{value_width}}  {origin}" for key, value, origin in rows
        ]


@dataclass(slots=True)
class _Merged:
    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)

    def put(self, path: KeyPath, value: object, origin: Origin) -> None:
        """Set the value at `path`, whatever stood there."""
        node = self.data
        for part in path[:-1]:
            child = node.setdefault(str(part), {})
            if not isinstance(child, dict):
                return  # a scalar stands where a section belongs; validation reports that one
            node = child
        node[str(path[-1])] = value
        # Set anew, so that the order of `origins` is the order in which values were set.
        self.origins.pop(path, None)
        self.origins[path] = origin

    def last_set(self, paths: Iterable[KeyPath]) -> KeyPath:
        """Return the one of `paths` set by the highest layer: of two that clash, the newcomer."""
        order = list(self.origins)
        return max(paths, key=lambda path: order.index(path) if path in self.origins else -1)

    def put_yaml(self, document: MarkedYaml, layer: str, below: KeyPath = ()) -> None:
        """Merge the mapping at `below` of a YAML file."""
        tree: Any = document.data
        for part in below:
            tree = tree.get(part)
        if tree is None:
            return
        for path, value in _leaves(tree, ()):
            place = (*below, *path)
            self.put(path, value, Origin(layer, document.keys[place], document.values[place]))


def load_settings(
    config: Path | None = None,
    profile: str | None = None,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    root: Path = Path("/"),
) -> Settings:
    """Return the effective settings.

    Args:
        config: the configuration file; None takes /etc/nestd/nestd.yaml if there is one.
        profile: name or path of the device profile; None leaves it to the other layers.
        overrides: dotted key -> value from the command line; None means not given.
        environ: the environment; None takes the process's own.
        root: what /proc, /sys and /etc are read below.

    Raises:
        ConfigError: one line per mistake.
    """
    return explain_settings(config, profile, overrides, environ, root).settings


def explain_settings(
    config: Path | None = None,
    profile: str | None = None,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    root: Path = Path("/"),
) -> Explained:
    """Like `load_settings`, with the origin of each value."""
    environ = os.environ if environ is None else environ
    document = _read_config(config, environ, root)
    chosen, detected = _choose_profile(profile, environ, document, root)

    merged = _Merged()
    for item in chain(chosen):
        merged.put_yaml(parse(item.text, item.path), f"profile {item.name}", ("settings",))
    merged.put_yaml(document, "file")
    for name, text in environ.items():
        if name.startswith(_PREFIX) and name not in _NOT_SETTINGS:
            path = tuple(name.removeprefix(_PREFIX).lower().split("__"))
            merged.put(path, _from_environment(text), Origin(f"environment {name}"))
    for key, value in (overrides or {}).items():
        if value is not None:
            merged.put(tuple(key.split(".")), value, Origin("command line"))
    merged.data["profile"] = profile or chosen.name

    try:
        settings = Settings.model_validate(merged.data)
    except ValidationError as error:
        lines = [_sentence(item, merged) for item in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None
    origins = {}
    for key, _ in _flatten(_redact(settings)):
        origin = merged.origins.get(tuple(key.split(".")))
        origins[key] = _origin_words(origin)
    if detected:
        origins["profile"] = "detected"
    return Explained(settings, origins, detected)


def parse_assignments(items: Sequence[str]) -> dict[str, object]:
    """Return the overrides of `--set KEY=VALUE` options.

    Raises:
        ConfigError: one has no `=`.
    """
    overrides: dict[str, object] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: write KEY=VALUE, for example mqtt.host=broker.lan")
        overrides[key.strip()] = _from_environment(text)
    return overrides


def _origin_words(origin: Origin | None) -> str:
    if origin is None:
        return "default"
    if origin.layer == "file" and origin.key is not None:
        return f"{origin.key.file}:{origin.key.line}"
    return origin.layer


def _read_config(config: Path | None, environ: Mapping[str, str], root: Path) -> MarkedYaml:
    named = config or (Path(environ["NESTD_CONFIG"]) if environ.get("NESTD_CONFIG") else None)
    path = named or root / CONFIG_FILE
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        if named is None:
            return MarkedYaml({}, {}, {})
        raise ConfigError(f"the configuration file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from error


def _choose_profile(
    profile: str | None, environ: Mapping[str, str], document: MarkedYaml, root: Path
) -> tuple[Profile, bool]:
    if profile or environ.get("NESTD_PROFILE"):
        return find(profile or environ["NESTD_PROFILE"]), False
    named = document.data.get("profile")
    if named is None:
        return detect(root), True
    try:
        return find(str(named)), False
    except ConfigError as error:
        raise ConfigError(f"{document.values[('profile',)]}: profile: {error}") from None


def _from_environment(text: str) -> object:
    """Return `null`, lists and mappings as YAML has them; pydantic converts all other text."""
    if text.strip() in {"", "null", "~"}:
        return None
    if text.lstrip().startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text


def _model_at(path: KeyPath) -> type[Section] | None:
    """Return the section that `path` names, or None for a value or an unknown key."""
    model: type[Section] = Settings
    for part in path:
        info = model.model_fields.get(str(part))
        kind = info.annotation if info else None
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            return None
        model = kind
    return model


def _leaves(tree: Mapping[str, Any], path: KeyPath) -> list[tuple[KeyPath, Any]]:
    """Return every value below `tree`; a section without keys (all commented out) has none."""
    found: list[tuple[KeyPath, Any]] = []
    for key, value in tree.items():
        place = (*path, key)
        if _model_at(place) is None:
            found.append((place, value))
        elif isinstance(value, Mapping):
            found += _leaves(value, place)
        elif value is not None:
            found.append((place, value))
    return found


def _flatten(tree: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += _flatten(value, f"{above}{key}.")
        else:
            found.append((f"{above}{key}", value))
    return found


def _is_secret(path: KeyPath) -> bool:
    model = _model_at(path[:-1])
    info = model.model_fields.get(str(path[-1])) if model else None
    if info is None:
        # A key that we do not know may be a misplaced password.
        return True
    schema = model.model_json_schema()["properties"][str(path[-1])] if model else {}
    return "secret" in str(schema)


def _redact(section: Section, path: KeyPath = ()) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            result[name] = _redact(value, (*path, name))
        elif value not in (None, ()) and _is_secret((*path, name)):
            result[name] = HIDDEN
        elif isinstance(value, Path):
            result[name] = str(value)
        elif isinstance(value, tuple):
            result[name] = list(value)
        else:
            result[name] = value
    return result


def _sentence(error: ErrorDetails, merged: _Merged) -> str:
    """Return one pydantic error as `place: key: what is wrong; what to do`."""
    path: KeyPath = error["loc"]
    if keys := error.get("ctx", {}).get("keys"):
        path = merged.last_set((*path, key) for key in keys)
    unknown = error["type"] == "extra_forbidden"
    where = _place(path, merged, unknown)
    name = ".".join(str(part) for part in path)
    return (
        f"{where}: {name}: {_problem(error, path)}" if where else f"{name}: {_problem(error, path)}"
    )


def _place(path: KeyPath, merged: _Merged, key_is_wrong: bool) -> str:
    # An error inside a list belongs to the list's key; one of a whole section to any key in it.
    for length in range(len(path), 0, -1):
        origin = merged.origins.get(path[:length])
        if origin is not None:
            mark = origin.key if key_is_wrong or length < len(path) else origin.value
            return str(mark) if mark else origin.layer
    return ""


def _problem(error: ErrorDetails, path: KeyPath) -> str:
    kind, message = error["type"], error["msg"]
    if kind == "extra_forbidden":
        model = _model_at(path[:-1])
        known = sorted(model.model_fields) if model else []
        close = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.6)
        advice = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(known)}"
        return f"unknown key; {advice}"
    if kind == "missing":
        return "is missing; set it here or in the device profile"
    model = _model_at(path)
    if model is not None:
        return f"expected a section with the keys {', '.join(sorted(model.model_fields))}"
    message = message.removeprefix("Value error, ").replace("Input should", "should")
    message = message[:1].lower() + message[1:]
    value = error["input"]
    if _is_secret(path) or isinstance(value, Mapping | Section):
        return message
    return f"{message}; it is {value!r}"
