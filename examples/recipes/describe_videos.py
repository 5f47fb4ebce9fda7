"""Describe each video of a folder in a file beside it: door.mp4 gets door.mp4.txt.

python3 describe_videos.py --host broker.lan --node kitchen recordings/

What has a description is left alone, so a timer may run it again and again.
"""

from __future__ import annotations

from pathlib import Path

from common import arguments, ask, node, save, undone

from nestd.bundle.errors import RequestError
from nestd.cli.media import read_media

PROMPT = "These pictures are from one recording, in order. Describe what happens in two sentences."


def main() -> None:
    """Work through the folder once."""
    parser = arguments(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", default=PROMPT)
    args = parser.parse_args()
    with node(args) as client:
        for video, text in undone(args.folder, (".mp4", ".mov", ".mkv", ".webm", ".avi"), ".txt"):
            try:
                done = ask(
                    client, args.prompt, read_media([("video", video)], None), max_tokens=120
                )
            except RequestError as error:  # this file is no use; the next one may be
                print(f"{video.name}: {error.code}: {error}")
                continue
            save(text, done["text"].strip() + "\n")
            print(f"{video.name}: {done['text'].strip()}")


if __name__ == "__main__":
    main()
