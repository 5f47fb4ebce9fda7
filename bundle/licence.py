"""The licence files that a bundle carries, and what they say in short."""

from __future__ import annotations

from nestd.bundle.manifest import Bundle

# In this order: a notice is short and says what matters, a licence is long.
LICENCE_FILES = ("NOTICE", "NOTICE.txt", "LICENSE", "LICENSE.txt", "LICENSE.md")


def notice(bundle: Bundle) -> str | None:
    """Return the bundle's notice, where it has none where its licence lies; None without either."""
    for name in LICENCE_FILES:
        if name in bundle.manifest.files:
            file = bundle.file(name)
            if name.startswith("NOTICE"):
                return file.read_text(encoding="utf-8", errors="replace").strip()
            return f"The licence of this bundle's model: {file}"
    return None
