"""Saves the logits of a prompt and of four steps at changing sizes; see test_arm64.

A program of its own, for it runs on another CPU than the test: BUNDLE DIRECTORY OUTPUT, where the
prepared weights go to DIRECTORY.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from nestd.bundle.manifest import Bundle
from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.messages import ChatMessage, EngineOptions
from nestd.daemon.prompt.template import Prompt


def step_logits(path: Path, prepared: Path) -> np.ndarray:
    """Return float32 [5, vocab]: the end of a prompt of two chunks, then four single steps."""
    bundle = Bundle.open(path)
    graphs = Graphs(bundle, EngineOptions(threads=1, prepared_directory=prepared))
    words = "could you turn the heater in the loft off 20 minutes after half past nine pm"
    ids = np.array(Prompt(bundle).encode([ChatMessage(role="user", content=words)]))
    smallest, *_, largest = bundle.manifest.submodels
    cache = graphs.new_cache(len(ids) + 4)
    rows = [
        graphs.run(ids[:7], cache, largest, need_logits=False),
        graphs.run(ids[7:], cache, largest, need_logits=True),
    ]
    for token, submodel in zip(ids[:4], (largest, smallest, largest, smallest), strict=True):
        rows.append(graphs.run(np.array([token]), cache, submodel, need_logits=True))
    return np.stack([row for row in rows if row is not None])


if __name__ == "__main__":
    np.save(sys.argv[3], step_logits(Path(sys.argv[1]), Path(sys.argv[2])))
