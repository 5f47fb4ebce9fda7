"""Reads a YAML mapping and remembers at which line and column every key and value stands.

The schema is JSON's: mappings with string keys, lists, scalars. Duplicate keys are an error
(PyYAML silently takes the last).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from nestd.bundle.errors import ConfigError

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a file; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class MarkedYaml:
    """A parsed file: its data, and the place of each key and of each value by path."""

    data: dict[str, Any]
    keys: dict[KeyPath, Mark]
    values: dict[KeyPath, Mark]


def parse(text: str, file: str) -> MarkedYaml:
    """Parse `text`; `file` is its name in messages. An empty file is an empty mapping.

    Raises:
        ConfigError: not YAML, not a mapping, a key twice or not a string; says where.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return MarkedYaml({}, {}, {})
        keys: dict[KeyPath, Mark] = {}
        values: dict[KeyPath, Mark] = {}
        for path, key_node, value_node in _walk(node, (), file):
            values[path] = _mark(value_node, file)
            keys[path] = _mark(key_node or value_node, file)
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise ConfigError(f"{values[()]}: expected `key: value` lines")
    return MarkedYaml(data, keys, values)


def _mark(node: yaml.Node, file: str) -> Mark:
    return Mark(file, node.start_mark.line + 1, node.start_mark.column + 1)


def _walk(
    node: yaml.Node, path: KeyPath, file: str, key_node: yaml.Node | None = None
) -> Iterator[tuple[KeyPath, yaml.Node | None, yaml.Node]]:
    yield path, key_node, node
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise ConfigError(f"{_mark(key, file)}: a key must be a word; put it in quotes")
            if key.value in seen:
                raise ConfigError(
                    f"{_mark(key, file)}: `{key.value}` is set twice; delete one of the two"
                )
            seen.add(key.value)
            yield from _walk(value, (*path, key.value), file, key)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, (*path, index), file)
