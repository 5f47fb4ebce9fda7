"""Byte sizes for people: `600M`, `1.5G` in, `2.3 GB` out. Multiples are binary (K = 1024)."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", re.IGNORECASE)
_FACTOR = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(value: object) -> int:
    """Return the bytes of `600M`, `1.5 GiB`, `4096` or a whole number.

    Raises:
        ValueError: it is not a size.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("write a size as bytes or with K, M or G, for example 600M or 1.5G")
    return int(float(match[1]) * _FACTOR[match[2].lower()])


def format_bytes(count: int) -> str:
    """Return `count` with three digits or fewer: `512 B`, `39 MB`, `2.31 GB`."""
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} GB"


ByteSize = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
