"""Fill in a form from each scan of a folder: receipt.jpg gets receipt.jpg.json.

python3 read_documents.py --host broker.lan --node kitchen --form receipt.json scans/

The form is a JSON schema, and the result keeps to it. What has a result is left alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from common import arguments, ask, node, save, undone

from nestd.bundle.errors import RequestError
from nestd.cli.ask import json_format
from nestd.cli.media import read_media

PROMPT = "This is a scanned document. Read it and fill in the form; what it does not say is null."


def main() -> None:
    """Work through the folder once."""
    parser = arguments(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--form", type=Path, required=True, help="a JSON schema")
    parser.add_argument("--prompt", default=PROMPT)
    args = parser.parse_args()
    fields = {"response_format": json_format(args.form), "max_tokens": 512, "temperature": 0}
    with node(args) as client:
        for scan, result in undone(args.folder, (".jpg", ".jpeg", ".png", ".webp"), ".json"):
            picture = read_media([("image", scan)], "high")  # small print needs the largest size
            try:
                done = ask(client, args.prompt, picture, **fields)
            except RequestError as error:  # this file is no use; the next one may be
                print(f"{scan.name}: {error.code}: {error}")
                continue
            if done["finish_reason"] == "length":
                print(f"{scan.name}: the answer was cut off: limit the lengths in the form")
                continue
            save(result, json.dumps(json.loads(done["text"]), indent=2, ensure_ascii=False) + "\n")
            print(f"{scan.name}: {done['text']}")


if __name__ == "__main__":
    main()
