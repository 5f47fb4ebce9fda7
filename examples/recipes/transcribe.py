"""Write down what is said in a recording of any length, piece by piece.

python3 transcribe.py --host broker.lan --node kitchen meeting.mp3 > meeting.txt

The model hears 30 s at once, so that is what it gets; each piece becomes a line with its time.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import soundfile
import soxr
from common import arguments, ask, node

from nestd.cli.media import Medium

PIECE_S = 30


def main() -> None:
    """Print the transcript."""
    parser = arguments(__doc__)
    parser.add_argument("recording", type=Path, help="WAV, FLAC, OGG or MP3")
    parser.add_argument("--language", help="that is spoken, in English, for example German")
    args = parser.parse_args()
    spoken = f" in {args.language}" if args.language else ""
    prompt = f"Transcribe the following speech segment{spoken}:"
    with node(args) as client:
        for second, clip in pieces(args.recording):
            done = ask(client, prompt, [clip], max_tokens=256, temperature=0)
            print(f"[{second // 60:02d}:{second % 60:02d}] {done['text'].strip()}", flush=True)


def pieces(recording: Path) -> Iterator[tuple[int, Medium]]:
    """Yield the start in seconds and the sound of each piece, as FLAC."""
    with soundfile.SoundFile(recording) as file:
        blocks = file.blocks(PIECE_S * file.samplerate, always_2d=True)
        for number, samples in enumerate(blocks):
            # One channel at 16 kHz is all that the model hears, and fits into one message.
            mono = soxr.resample(samples.mean(axis=1), file.samplerate, 16_000)
            flac = io.BytesIO()
            soundfile.write(flac, mono, 16_000, format="FLAC", subtype="PCM_16")
            yield number * PIECE_S, Medium({"type": "audio"}, flac.getvalue())


if __name__ == "__main__":
    main()
