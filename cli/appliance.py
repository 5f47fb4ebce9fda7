"""What `nestd install` puts where, and what `nestd uninstall` takes away again.

Every file that is written is recorded with its digest. A file that was changed since is somebody's
work: it is never overwritten and never removed, except by a purge; what would have been written
lies beside it, as FILE.new. The record is root's, for it says what root removes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nestd.bundle.errors import ConfigError

# Below the root directory.
CONFIG = Path("etc/nestd/nestd.yaml")
RECORD = Path("etc/nestd/installed.json")
PASSWORD = Path("etc/credstore/nestd.mqtt-password")
UNIT = Path("etc/systemd/system/nestd.service")
DROP_INS = Path("etc/systemd/system/nestd.service.d")
SYSUSERS = Path("etc/sysusers.d/nestd.conf")
TMPFILES = Path("etc/tmpfiles.d/nestd.conf")
STATE = Path("var/lib/nestd")
# Where a Debian package has its unit: then unit, user and directories are dpkg's.
PACKAGED_UNIT = Path("usr/lib/systemd/system/nestd.service")

KEPT_WITHOUT_PURGE = (CONFIG, PASSWORD)


@dataclass(frozen=True, slots=True)
class File:
    """One file to install."""

    path: Path
    text: str
    mode: int = 0o644


class Tree:
    """The file system below `root`, with the record of what nestd has put there."""

    def __init__(self, root: Path, dry_run: bool, say: Callable[[str], object]) -> None:
        self._root = root
        self._dry_run = dry_run
        self._say = say
        self._record = _read_record(root / RECORD)

    @property
    def packaged(self) -> bool:
        """Whether nestd came as a Debian package."""
        return (self._root / PACKAGED_UNIT).exists()

    def put(self, file: File) -> None:
        """Write one file, or FILE.new beside it where somebody has changed it."""
        path, digest = self._root / file.path, _digest(file.text.encode())
        found = _digest(path.read_bytes()) if path.exists() else None
        key = str(file.path)
        if found == digest:
            self._say(f"unchanged  {path}")
        elif found in (None, self._record.get(key)):
            self._say(f"{'write' if found is None else 'update':9}  {path}")
            self._write(path, file)
        else:
            beside = path.with_name(f"{path.name}.new")
            self._say(f"keep       {path}: it was changed here; see {beside.name} beside it")
            self._write(beside, file)
            return
        self._record[key] = digest

    def remove(self, purge: bool) -> None:
        """Remove what was put, but what was changed, and the configuration, only to purge."""
        for key, digest in sorted(self._record.items()):
            path = self._root / key
            if not path.exists():
                del self._record[key]
            elif not purge and Path(key) in KEPT_WITHOUT_PURGE:
                self._say(f"keep       {path}")
            elif not purge and _digest(path.read_bytes()) != digest:
                self._say(f"keep       {path}: it was changed here")
            else:
                self._say(f"remove     {path}")
                del self._record[key]
                if not self._dry_run:
                    path.unlink()
        drop_ins = self._root / DROP_INS
        if not self._dry_run and drop_ins.is_dir() and not any(drop_ins.iterdir()):
            drop_ins.rmdir()

    def purge(self) -> None:
        """Remove configuration, bundles, prepared weights and state."""
        for path in (self._root / CONFIG.parent, self._root / STATE):
            if path.exists():
                self._say(f"remove     {path}")
                if not self._dry_run:
                    shutil.rmtree(path)
        self._record = {}

    def save(self) -> None:
        """Write the record."""
        path = self._root / RECORD
        if self._dry_run or (not self._record and not path.exists()):
            return
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")

    def _write(self, path: Path, file: File) -> None:
        if self._dry_run:
            return
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
            path.parent.chmod(0o755 if file.mode & 0o004 else 0o700)
        # A secret is never readable for others, not even for a moment.
        staged = path.with_name(f".{path.name}.nestd")
        staged.unlink(missing_ok=True)
        staged.touch(mode=0o600)
        staged.write_text(file.text, encoding="utf-8")
        staged.chmod(file.mode)
        staged.replace(path)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_record(path: Path) -> dict[str, str]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path} ({error}): put it right or remove it") from error
    return {str(key): str(value) for key, value in record.items()}
