"""MkDocs' hooks: links that lead out of docs/ work on the site as they do in the repository.

Pages outside docs/ that pages link to (results of benchmarks, README files of examples) become
pages of the site. A link to anything else, a folder or a script, becomes its text and its path.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/results/*.md",
    "examples/*/README.md",
)
LINK = re.compile(r"(!?)\[([^\]\[]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:  # noqa: ANN401
    """Add the pages that lie outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = str(path.relative_to(ROOT))
            place = (str(ROOT), config.site_dir, config.use_directory_urls)
            files.append(File(name, *place, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:  # noqa: ANN401, ARG001
    """Rewrite the page's links to files of the repository."""

    def link(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        name, hash_, anchor = target.partition("#")
        in_repository = os.path.relpath(Path(page.file.abs_src_path).parent / name, ROOT)
        on_site = in_repository.removeprefix("docs/")
        if files.get_file_from_path(on_site) is None:
            return match[0] if in_repository.startswith("docs/") else f"{text} (`{in_repository}`)"
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"{mark}[{text}]({posixpath.relpath(on_site, here)}{hash_}{anchor})"

    # What stands in code stays as it is.
    pieces = CODE.split(markdown)
    pieces[::2] = [LINK.sub(link, piece) for piece in pieces[::2]]
    return "".join(pieces)
