"""The patterns of `filter.patterns` as a filter program, with the patterns as its arguments.

Of a request it looks at all text, tools and schemas included; of an answer at the answer. It is a
process because an expression that backtracks for ever cannot be stopped inside of one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any


def texts(document: dict[str, Any]) -> Iterator[str]:
    """Yield what the patterns must not occur in."""
    if document["stage"] == "answer":
        yield document["text"]
        return
    for key in ("messages", "tools", "response_format"):
        yield from _strings(document[key])


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (key, *_strings(item))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def main() -> None:
    """Read a document, write a verdict."""
    patterns = [re.compile(item) for item in sys.argv[1:]]
    found = any(
        pattern.search(text) for text in texts(json.load(sys.stdin.buffer)) for pattern in patterns
    )
    json.dump({"allow": not found, "reason": "a pattern matches" if found else None}, sys.stdout)


if __name__ == "__main__":
    main()
