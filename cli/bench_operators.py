"""What each operator of the decoder takes, from ONNX Runtime's own profiler.

The profiler writes down every operator, which itself takes time: shares are what to read, tokens
per second are measured without it.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from pydantic import BaseModel, ConfigDict

from nestd.daemon.engine.graphs import Graphs
from nestd.daemon.engine.prepare import GRAPH

# The part of a layer that an operator belongs to, by the name of a weight that it reads; the first
# that fits. Operators without weights count by their type.
KINDS = (
    ("embed_tokens", "lm_head"),
    ("norm", "norms"),
    (".mlp.", "feed-forward"),
    (".self_attn.", "attention, projections"),
    ("rope.", "attention, keys and values"),
    (".laurel.", "LAuReL"),
    ("altup", "AltUp"),
    ("per_layer", "per-layer embeddings"),
)
WITHOUT_WEIGHTS = "element-wise and shapes"
OUTSIDE = "outside operators"
# Their time is that of the operators in their branch.
CONTAINERS = ("If", "Loop", "Scan")


class Figures(BaseModel):
    """Part of the report of `nestd bench`."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Cost(Figures):
    """Calls and milliseconds of one group of operators, for one run of the graph."""

    name: str
    calls: float
    milliseconds: float
    share: float


class Phase(Figures):
    """Prefill or decode: `runs` of the graph, their mean, and where it goes, largest first."""

    runs: int
    milliseconds: float
    operators: tuple[Cost, ...]
    kinds: tuple[Cost, ...]


def profile(
    graphs: Graphs, prepared: Path, work: Callable[[], None], phases: Mapping[str, int]
) -> dict[str, Phase]:
    """Run `work` on `graphs` and return what the decoder did meanwhile, by phase.

    Args:
        graphs: the loaded bundle; its decoder is replaced by one that is profiled.
        prepared: the directory of its prepared decoder.
        work: runs the decoder, first to warm up.
        phases: how many of its last runs belong to each phase, in order.
    """
    path = prepared / GRAPH
    with tempfile.TemporaryDirectory(prefix="nestd-profile-") as directory:
        # The engine's own session with its own options, but for the profiler, which the engine
        # itself has no use for.
        session: Any = graphs._decoder
        options = session.get_session_options()
        options.enable_profiling = True
        options.profile_file_prefix = f"{directory}/profile"
        session = type(session)(str(path), options, providers=["CPUExecutionProvider"])
        graphs._decoder = session
        work()
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kinds = kinds_of_operators(onnx.load(path, load_external_data=False).graph)
    runs = list(runs_of(events))[-sum(phases.values()) :]
    found, first = {}, 0
    for name, count in phases.items():
        found[name] = phase(runs[first : first + count], kinds)
        first += count
    return found


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the graph: its microseconds and its operators' events."""

    microseconds: int
    operators: list[dict[str, Any]]


def runs_of(events: Iterable[dict[str, Any]]) -> Iterator[Run]:
    """Yield the runs in a profile, which names a run after the operators that ran in it."""
    operators: list[dict[str, Any]] = []
    for event in events:
        if event["name"] == "model_run":
            yield Run(event["dur"], operators)
            operators = []
        elif event["cat"] == "Node" and event["args"]["op_name"] not in CONTAINERS:
            operators.append(event)


def phase(runs: Sequence[Run], kinds: Mapping[str, str]) -> Phase:
    """Return the mean of `runs` by type and by kind of operator."""
    microseconds = sum(run.microseconds for run in runs)
    by_type: dict[str, list[int]] = defaultdict(list)
    by_kind: dict[str, list[int]] = defaultdict(list)
    for event in (event for run in runs for event in run.operators):
        by_type[event["args"]["op_name"]].append(event["dur"])
        node = event["name"].removesuffix("_kernel_time")
        by_kind[kinds.get(node, WITHOUT_WEIGHTS)].append(event["dur"])
    outside = [microseconds - sum(sum(spent) for spent in by_type.values())]
    return Phase(
        runs=len(runs),
        milliseconds=microseconds / 1000 / len(runs),
        operators=costs({**by_type, OUTSIDE: outside}, len(runs), microseconds),
        kinds=costs({**by_kind, OUTSIDE: outside}, len(runs), microseconds),
    )


def costs(groups: Mapping[str, Sequence[int]], runs: int, microseconds: int) -> tuple[Cost, ...]:
    """Return the groups, whose values are microseconds of each call, the costliest first."""
    found = [
        Cost(
            name=name,
            calls=0 if name == OUTSIDE else len(spent) / runs,
            milliseconds=sum(spent) / 1000 / runs,
            share=sum(spent) / microseconds,
        )
        for name, spent in groups.items()
    ]
    return tuple(sorted(found, key=lambda cost: -cost.milliseconds))


def kinds_of_operators(graph: Any) -> dict[str, str]:  # noqa: ANN401  (protobuf)
    """Return the kind of every operator that reads weights, by its name, branches included."""
    kinds: dict[str, str] = {}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                kinds |= kinds_of_operators(attribute.g)
        for part, kind in KINDS:
            if any(part in name for name in node.input):
                kinds[node.name] = kind
                break
    return kinds
