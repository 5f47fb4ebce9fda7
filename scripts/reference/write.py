"""Writes the generated pages and tables of docs/: python scripts/reference/write.py."""

from __future__ import annotations

from pathlib import Path

import boards
import messages
import settings

DOCS = Path(__file__).parents[2] / "docs"


def generated() -> dict[Path, str]:
    """Return the text of every page that is generated, whole or in part."""
    reference = DOCS / "reference"
    return {
        reference / "messages.md": messages.page(),
        reference / "settings.md": settings.settings_page(),
        reference / "profiles.md": settings.profiles_page(),
        **{page: boards.filled(page) for page in sorted(boards.BOARDS.glob("*.md"))},
    }


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
