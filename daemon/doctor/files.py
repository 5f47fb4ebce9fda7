"""The configuration: who may read its secrets and change it, and whether a profile fits."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

from nestd.daemon.credentials import secret_path
from nestd.daemon.doctor.finding import Finding, failed, ok, skipped, warning
from nestd.daemon.settings import FilterSettings, MqttSettings
from nestd.device_profiles import FALLBACK, look


def profile(root: Path, name: str, detected: bool) -> Finding:
    """The device profile in force."""
    title = look(root).title
    if detected and name == FALLBACK:
        return warning(
            "profile",
            f"none knows this board ({title}): {name} is careful rather than fast",
            "name one that is near with `profile:`, or write one (docs/configuration.md)",
        )
    return ok("profile", f"{name}{' (detected)' if detected else ''} for {title}")


def secrets(mqtt: MqttSettings) -> Finding:
    """Whether others on this machine can read the password or the key."""
    named = {"mqtt.password_file": mqtt.password_file, "mqtt.key_file": mqtt.key_file}
    files = {key: path for key, file in named.items() if (path := secret_path(file)) is not None}
    if not files:
        return skipped("secrets", "no password file and no key file is named")
    for key, path in files.items():
        try:
            mode = path.stat().st_mode
            path.open("rb").close()
        except OSError as error:
            return failed(
                "secrets",
                f"{key}: cannot read {path}: {error.strerror}",
                "name a file that exists, and let the daemon's user read it: "
                f"sudo chown nestd {path}"
                if path.is_absolute()
                else "a credential of systemd's is for the service alone, so ask as root: "
                "sudo CREDENTIALS_DIRECTORY=/etc/credstore nestd doctor",
            )
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            return failed(
                "secrets",
                f"{key}: everybody on this machine may read or change {path}",
                f"sudo chmod 600 {path}, and sudo chown nestd {path} if the daemon runs as nestd",
            )
    return ok("secrets", f"only owner and group read {', '.join(map(str, files.values()))}")


def program(settings: FilterSettings) -> Finding:
    """Whether the filter's program is there: without it every request is refused."""
    if not settings.command:
        patterns = len(settings.patterns)
        return (
            ok("filter", f"{patterns} patterns") if patterns else skipped("filter", "none is set")
        )
    name = settings.command[0]
    found = shutil.which(name)
    if found is None:
        return failed(
            "filter",
            f"{name} cannot be run, so everything is refused",
            "write the whole path of an executable program into filter.command",
        )
    return ok("filter", f"{found} may be run")


def permissions(config: Path) -> Finding:
    """Whether others on this machine can change the configuration."""
    try:
        mode = config.stat().st_mode
    except FileNotFoundError:
        return skipped("configuration file", f"there is no {config}: the defaults hold")
    except OSError as error:
        return skipped("configuration file", f"cannot look at {config}: {error.strerror}")
    if mode & stat.S_IWOTH:
        return failed(
            "configuration file",
            f"everybody on this machine may change {config}",
            f"sudo chmod 644 {config}",
        )
    return ok("configuration file", str(config))
