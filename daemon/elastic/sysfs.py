"""Small readers for /proc and /sys. A file that is absent, closed or nonsense reads as None."""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path) -> str | None:
    """Return the stripped text of `path`, or None where this board has none to give.

    Sysfs answers some reads with an error (EAGAIN of a sensor that is switched off, EACCES of an
    energy counter that only root may read): that too is a board that cannot tell.
    """
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123  (half the cost of Path.open)
            return file.read(65536).decode("utf-8", errors="replace").strip()
    except OSError:
        return None


def read_int(path: Path, base: int = 10) -> int | None:
    """Return the whole number in `path`, or None."""
    text = read_text(path)
    try:
        return None if text is None else int(text, base)
    except ValueError:
        return None


def read_scaled(path: Path, scale: float) -> float | None:
    """Return the number in `path` times `scale`, or None."""
    number = read_int(path)
    return None if number is None else number * scale


def read_keys(path: Path) -> dict[str, int]:
    """Return the `name value` or `name: value kB` lines of `path`; kB become bytes."""
    result = {}
    for line in (read_text(path) or "").splitlines():
        parts = line.replace(":", " ").split()
        if len(parts) >= 2 and parts[1].isdigit():
            result[parts[0]] = int(parts[1]) * (1024 if parts[2:] == ["kB"] else 1)
    return result


def children(folder: Path, pattern: str) -> list[Path]:
    """Return what `pattern` matches below `folder`, by name; nothing where it does not exist."""
    return sorted(folder.glob(pattern))


def hwmons(root: Path, *names: str) -> list[Path]:
    """Return the hwmon folders whose driver calls itself one of `names`."""
    return [
        path
        for path in children(root / "sys/class/hwmon", "hwmon*")
        if read_text(path / "name") in names
    ]
