"""Find pictures by words: caption each one once, then let the model pick captions that fit.

python3 find_pictures.py --host broker.lan --node kitchen index photos/
python3 find_pictures.py --host broker.lan --node kitchen search photos/ "a dog on the beach"

nestd makes no embeddings. Captions lie beside the pictures (beach.jpg.txt), so grep finds words as
they are; `search` also finds what is said in other words, one request for each 40 pictures.
"""

from __future__ import annotations

import json
from pathlib import Path

from common import arguments, ask, node, save, undone

from nestd.bundle.errors import RequestError
from nestd.cli.media import read_media
from nestd.client import Client

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
CAPTION = "Describe this picture in one sentence: what is on it, where, and in which colours."
AT_ONCE = 40


def index(client: Client, folder: Path) -> None:
    """Caption every picture that has no caption yet."""
    for picture, caption in undone(folder, ENDINGS, ".txt"):
        try:
            # The smallest size is a ninth of the largest's pixels, and enough for a sentence.
            done = ask(client, CAPTION, read_media([("image", picture)], "low"), max_tokens=60)
        except RequestError as error:  # this file is no use; the next one may be
            print(f"{picture.name}: {error.code}: {error}")
            continue
        save(caption, " ".join(done["text"].split()) + "\n")
        print(f"{picture.name}: {done['text'].strip()}", flush=True)


def search(client: Client, folder: Path, words: str) -> None:
    """Print the pictures whose captions fit the words."""
    captioned = [
        (path, path.with_name(f"{path.name}.txt").read_text(encoding="utf-8").strip())
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in ENDINGS and path.with_name(f"{path.name}.txt").exists()
    ]
    for start in range(0, len(captioned), AT_ONCE):
        some = captioned[start : start + AT_ONCE]
        for number in fitting([caption for _, caption in some], words, client):
            path, caption = some[number - 1]
            print(f"{path}\t{caption}")


def fitting(captions: list[str], words: str, client: Client) -> list[int]:
    """Return the numbers, from 1, of the captions that the model picks; perhaps none."""
    listed = "\n".join(f"{number}. {text}" for number, text in enumerate(captions, 1))
    number = {"enum": list(range(1, len(captions) + 1))}
    schema = {
        "type": "object",
        "properties": {"pictures": {"type": "array", "items": number, "maxItems": 5}},
        "required": ["pictures"],
        "additionalProperties": False,
    }
    done = ask(
        client,
        f"Pictures:\n{listed}\n\nWhich of them show {words}? Give the numbers, none if none does.",
        response_format={"type": "json_schema", "json_schema": schema},
        max_tokens=64,
        temperature=0,
    )
    return sorted(set(json.loads(done["text"])["pictures"]))


def main() -> None:
    """Index or search."""
    parser = arguments(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("index").add_argument("folder", type=Path)
    finding = commands.add_parser("search")
    finding.add_argument("folder", type=Path)
    finding.add_argument("words")
    args = parser.parse_args()
    with node(args) as client:
        if args.command == "index":
            index(client, args.folder)
        else:
            search(client, args.folder, args.words)


if __name__ == "__main__":
    main()
