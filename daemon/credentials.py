"""Passwords and keys: in files, or as systemd's credentials."""

from __future__ import annotations

import os
from pathlib import Path

from nestd.bundle.errors import ConfigError


def secret_path(path: Path | None) -> Path | None:
    """Return where a secret lies: a relative path is one of systemd's credentials, if it has any.

    Source: systemd.exec(5), LoadCredential= and $CREDENTIALS_DIRECTORY.
    """
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    return path if path is None or credentials is None else Path(credentials) / path


def read_secret(file: Path | None, key: str) -> str | None:
    """Return the first line of the file that the setting `key` names, None where it names none.

    Raises:
        ConfigError: it cannot be read, or its first line is empty.
    """
    path = secret_path(file)
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: cannot read {path}: {error}") from error
    if not lines or not lines[0]:
        raise ConfigError(f"{key}: the first line of {path} is empty")
    return lines[0]
