"""An ONNX graph and the branches inside it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx


def branches(node: onnx.NodeProto) -> dict[str, onnx.GraphProto]:
    """Return the branches of an If by the attribute's name."""
    return {item.name: item.g for item in node.attribute if item.HasField("g")}


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the graph and every branch in it, at any depth."""
    yield graph
    for node in graph.node:
        for branch in branches(node).values():
            yield from graphs(branch)
