"""Translate a spoken note: one JSON object with what was said and what it means.

python3 translate.py --host broker.lan --node kitchen --from Spanish --to English note.wav

Two turns of one conversation: the second asks about the same sound, which is not read again.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from common import arguments, ask, node

from nestd.cli.media import read_media


def main() -> None:
    """Print the object."""
    parser = arguments(__doc__)
    parser.add_argument("note", type=Path, help="WAV, FLAC, OGG or MP3, at best of up to 30 s")
    parser.add_argument("--from", dest="spoken", metavar="LANGUAGE", required=True)
    parser.add_argument("--to", dest="wanted", metavar="LANGUAGE", default="English")
    args = parser.parse_args()
    turns = {"conversation": uuid.uuid4().hex, "max_tokens": 256, "temperature": 0}
    prompt = f"Transcribe the following speech segment in {args.spoken}:"
    with node(args) as client:
        said = ask(client, prompt, read_media([("audio", args.note)], None), **turns)
        meant = ask(client, f"Now translate it into {args.wanted}, and say nothing else.", **turns)
    note = {
        "language": args.spoken,
        "transcript": said["text"].strip(),
        "translation": meant["text"].strip(),
    }
    print(json.dumps(note, ensure_ascii=False))


if __name__ == "__main__":
    main()
