"""Held-out exact match of every size through nestd itself: convert, load, generate token by token.

    python evaluate_bundle.py --bits 8 4 32
    python evaluate_bundle.py --bits 8 32 --what media

Adds a column a width to results.json, measured on the same requests, pictures and clips as
transformers' float32 columns of evaluate.py and evaluate_media.py. Text needs nestd only, no torch;
converting the towers for media needs the convert extra.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from data import examples

from nestd.bundle.manifest import Bundle, Submodel
from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.engine.encoders import Encoders
from nestd.daemon.engine.generate import Generation
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.media import EncodedPrompt
from nestd.daemon.engine.messages import (
    ChatMessage,
    Content,
    EngineOptions,
    MediaContent,
    Sampling,
    TextContent,
)
from nestd.daemon.prompt.audio import HOP, AudioWindow
from nestd.daemon.prompt.template import Prompt

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
CONTEXT = 512
GREEDY = Sampling(max_tokens=96, temperature=0)
Case = tuple[EncodedPrompt, str]  # and the command that it should give


def answer(graphs: Graphs, prompt: Prompt, submodel: Submodel, encoded: EncodedPrompt) -> str:
    """Return the greedy answer to one request."""
    cache = graphs.new_cache(CONTEXT)
    generation = Generation(graphs, prompt.tokenizer, encoded, GREEDY, submodel, cache, CONTEXT)
    while generation.finish_reason is None:
        generation.step()
    return generation.text


def text_cases(prompt: Prompt, results: dict[str, Any]) -> Iterator[Case]:
    """Yield the requests of evaluate.py."""
    for example in islice(examples("heldout", results["seed"]), results["examples"]):
        ids = prompt.encode([ChatMessage(role="user", content=example.request)])
        yield EncodedPrompt(ids), example.command


def picture_cases(prompt: Prompt, encoders: Encoders, media: dict[str, Any]) -> Iterator[Case]:
    """Yield the pictures of evaluate_media.py, encoded."""
    from pool import picture_pool

    pool = picture_pool("heldout", media["seed"], media["pictures"])
    for pixels, request in zip(pool.pixels, pool.requests, strict=True):
        texts = [TextContent(text=text) for text in (request.before, request.after)]
        ids = _ids(prompt, [texts[0], _medium("image"), texts[1]])
        rows = encoders.image(pixels.astype(np.float32) / np.float32(255))
        yield EncodedPrompt(ids, rows), request.command


def clip_cases(prompt: Prompt, encoders: Encoders, media: dict[str, Any]) -> Iterator[Case]:
    """Yield the clips of evaluate_media.py, encoded."""
    from pool import clip_pool

    pool = clip_pool("heldout", media["seed"], media["clips"])
    for features, frames, request in zip(pool.features, pool.frames, pool.requests, strict=True):
        window = AudioWindow(features[:frames].astype(np.float32), int(frames) * HOP)
        yield (
            EncodedPrompt(_ids(prompt, [_medium("audio")]), encoders.audio(window)),
            request.command,
        )


def _ids(prompt: Prompt, content: list[Content]) -> list[int]:
    return prompt.encode([ChatMessage(role="user", content=tuple(content))], [1])


def _medium(kind: Any) -> MediaContent:  # noqa: ANN401  (a literal)
    # Already decoded: the file is never opened.
    return MediaContent(type=kind, path=Path("decoded"), sha256="0" * 64)


def scores(bundle: Bundle, bits: int, cases: dict[str, list[Case]]) -> dict[str, dict[str, float]]:
    """Return the exact match in percent by size and kind of request."""
    graphs, prompt = Graphs(bundle, EngineOptions(threads=1)), Prompt(bundle)
    result: dict[str, dict[str, float]] = {}
    for submodel in bundle.manifest.submodels:
        for kind, members in cases.items():
            right = sum(answer(graphs, prompt, submodel, made) == want for made, want in members)
            percent = round(100 * right / len(members), 2)
            result.setdefault(submodel.name, {})[kind] = percent
            print(f"{bits:2} bits  {submodel.name:8} {kind:6} {percent:6.2f} %", flush=True)
    return result


def evaluate(bits: int, what: list[str], results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Convert at one width and measure."""
    with tempfile.TemporaryDirectory() as work:
        options = ConvertOptions(
            bits=bits,  # type: ignore[arg-type]
            modalities=None if "media" in what else ("text",),
            image_sizes=(256,),
        )
        bundle = convert(str(HERE / "checkpoint"), Path(work) / "b", options, io.StringIO())
        prompt = Prompt(bundle)
        cases: dict[str, list[Case]] = {}
        if "text" in what:
            cases["text"] = list(text_cases(prompt, results))
        if "media" in what:
            encoders = Encoders(bundle, EngineOptions(threads=1))
            cases["image"] = list(picture_cases(prompt, encoders, results["media"]))
            cases["audio"] = list(clip_cases(prompt, encoders, results["media"]))
        return scores(bundle, bits, cases)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 8, 32), default=[8])
    parser.add_argument("--what", nargs="+", choices=("text", "media"), default=["text"])
    args = parser.parse_args()
    for bits in args.bits:
        measured = evaluate(bits, args.what, json.loads(RESULTS.read_text(encoding="utf-8")))
        # Read again: another width may have been measured meanwhile.
        content = json.loads(RESULTS.read_text(encoding="utf-8"))
        for kind, rows in (("text", content["rows"]), *_media_rows(content)):
            for row in rows:
                percent = measured[row["submodel"]].get(kind)
                if percent is not None:
                    infix = "" if kind == "text" else f"{kind}_"
                    row[f"nestd_{bits}_bit_{infix}exact_match_percent"] = percent
        RESULTS.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _media_rows(content: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    rows = content.get("media", {}).get("rows", [])
    return [("image", rows), ("audio", rows)]


if __name__ == "__main__":
    main()
