"""A JSON schema of pydantic's in words, for a table's cell."""

from __future__ import annotations

import json
from typing import Any

from nestd.daemon.units import format_bytes

Schema = dict[str, Any]
_RANGES = (
    ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", ""),
    ("minLength", "", "maxLength", "", " characters"),
    ("minItems", "", "maxItems", "", " items"),
)


def words(schema: Schema) -> str:
    """Return what a value must be: its type, its limits, links to the models in it."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{item}`" for item in schema["enum"])
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(words(choice) for choice in choices))
    kind = schema.get("type", "anything")
    if kind == "array":
        kind = f"list of {words(schema.get('items', {}))}"
    limits = [limit for keys in _RANGES if (limit := _range(schema, *keys))]
    if "pattern" in schema:
        limits.append(f"matching `{schema['pattern']}`")
    return _cell(", ".join([kind, *limits]))


def default_words(value: object) -> str:
    """Return a default as it is written in YAML or JSON."""
    return f"`{_cell(json.dumps(value, ensure_ascii=False))}`"


def size_words(key: str, value: object) -> str:
    """Return the value of a setting; a size in bytes is written as one writes it."""
    if key.endswith("_bytes") and isinstance(value, int) and value >= 1024:
        return f"{value} ({format_bytes(value)})"
    return "null" if value is None else str(value)


def _range(schema: Schema, least: str, above: str, most: str, below: str, unit: str) -> str | None:
    """Return `1 to 64`, `at least 1`, `above 0 to 10`; None where nothing is stated."""
    low = f"above {_number(schema[above])}" if above in schema else None
    low = f"{_number(schema[least])}" if least in schema else low
    high = f"below {_number(schema[below])}" if below in schema else None
    high = f"{_number(schema[most])}" if most in schema else high
    if low is None and high is None:
        return None
    if high is None:
        return f"{low if least not in schema else f'at least {low}'}{unit}"
    if low is None:
        return f"at most {high}{unit}"
    return f"{low} {'to' if below not in schema else 'and'} {high}{unit}"


def _number(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
