"""Held-out exact match of every size through nestd itself: convert, load, generate token by token.

    python evaluate_bundle.py --bits 8 4 32

Adds a column a width to results.json, measured on the same requests as evaluate.py's float32 column
of transformers. Needs nestd only, no torch.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from itertools import islice
from pathlib import Path

from data import Example, examples

from nestd.bundle.manifest import Submodel
from nestd.conversion.convert import ConvertOptions, convert
from nestd.daemon.engine.generate import Generation
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.messages import ChatMessage, EngineOptions, Sampling
from nestd.daemon.prompt.template import Prompt

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
CONTEXT = 512
GREEDY = Sampling(max_tokens=96, temperature=0)


def answer(graphs: Graphs, prompt: Prompt, submodel: Submodel, request: str) -> str:
    """Return the greedy answer to one request."""
    ids = prompt.encode([ChatMessage(role="user", content=request)])
    generation = Generation(graphs, prompt.tokenizer, ids, GREEDY, submodel, CONTEXT, CONTEXT)
    while generation.finish_reason is None:
        generation.step()
    return generation.text


def evaluate(bits: int, samples: list[Example]) -> dict[str, float]:
    """Return the exact match in percent of every size at one width."""
    with tempfile.TemporaryDirectory() as work:
        options = ConvertOptions(bits=bits)  # type: ignore[arg-type]
        bundle = convert(str(HERE / "checkpoint"), Path(work) / "b", options, io.StringIO())
        graphs, prompt = Graphs(bundle, EngineOptions(threads=1)), Prompt(bundle)
        scores = {}
        for submodel in bundle.manifest.submodels:
            right = sum(
                answer(graphs, prompt, submodel, sample.request) == sample.command
                for sample in samples
            )
            scores[submodel.name] = round(100 * right / len(samples), 2)
            print(f"{bits:2} bits  {submodel.name:8} {scores[submodel.name]:6.2f} %", flush=True)
    return scores


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 8, 32), default=[8])
    args = parser.parse_args()
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    samples = list(islice(examples("heldout", content["seed"]), content["examples"]))
    for bits in args.bits:
        scores = evaluate(bits, samples)
        # Read again: another width may have been measured meanwhile.
        content = json.loads(RESULTS.read_text(encoding="utf-8"))
        for row in content["rows"]:
            row[f"nestd_{bits}_bit_exact_match_percent"] = scores[row["submodel"]]
        RESULTS.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
