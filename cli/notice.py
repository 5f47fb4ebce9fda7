"""Shows a bundle's notice once: whoever runs a model should know its terms, and not every day."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from nestd.bundle.licence import notice
from nestd.bundle.manifest import Bundle


def show_once(bundle: Bundle, state: Path, show: Callable[[str], None]) -> None:
    """Call `show` with the bundle's notice unless `state` remembers that one of these words was.

    A state directory that cannot be written remembers nothing, and the notice comes again.
    """
    text = notice(bundle)
    if text is None:
        return
    seen = state / "notices" / hashlib.sha256(text.encode()).hexdigest()[:16]
    if seen.exists():
        return
    show(text)
    try:
        seen.parent.mkdir(parents=True, exist_ok=True)
        seen.touch()
    except OSError as error:
        show(f"(cannot remember in {seen.parent} that this was shown: {error.strerror})")
