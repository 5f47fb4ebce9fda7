"""Sub-models: which layers of a bundle run wide and which are skipped.

A sub-model is a MatFormer slice: a layer in `wide_layers` runs its whole feed-forward width, every
other kept layer the first `nested_intermediate_size` rows of it, a layer in `skipped_layers` does
not run at all. Sources: MatFormer (arXiv:2310.07707) and the slicing table of Google's MatFormer
Lab, kept in `published_slices.yaml` in the numbering of the 35-layer E4B checkpoint.

This module knows names and layers only; what they cost is in the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

from nestd.bundle.errors import BundleError

PUBLISHED_LAYERS = 35
PUBLISHED_KV_SHARED_LAYERS = 15


@dataclass(frozen=True, slots=True)
class Slice:
    """One sub-model's layers.

    Attributes:
        name: for people and requests, for example `E2B`.
        wide_layers: layers that run the whole feed-forward width, ascending.
        skipped_layers: layers that do not run, ascending.
        mmlu_percent: published MMLU of the pretrained model, or None where nothing is published.
    """

    name: str
    wide_layers: tuple[int, ...]
    skipped_layers: tuple[int, ...]
    mmlu_percent: float | None = None


def check_slice(item: Slice, num_layers: int, num_kv_shared_layers: int) -> None:
    """Raise BundleError unless `item` can run on a model of this shape.

    Only layers that read another layer's KV cache can be skipped: a skipped owner would leave a
    hole in the cache that no later step can fill.
    """
    first_shared = num_layers - num_kv_shared_layers
    for layer in (*item.wide_layers, *item.skipped_layers):
        if not 0 <= layer < num_layers:
            raise BundleError(
                f"sub-model {item.name} names layer {layer}, but the model has layers 0 to "
                f"{num_layers - 1}: correct its wide_layers or skipped_layers"
            )
    owners = [layer for layer in item.skipped_layers if layer < first_shared]
    if owners:
        raise BundleError(
            f"sub-model {item.name} skips layer {owners[0]}, which owns a KV cache: only layers "
            f"{first_shared} to {num_layers - 1} can be skipped"
        )
    both = set(item.wide_layers) & set(item.skipped_layers)
    if both:
        raise BundleError(f"sub-model {item.name} both widens and skips layer {min(both)}")


def parse_slices(document: Any, where: str) -> list[Slice]:  # noqa: ANN401  (YAML)
    """Read a list of slices (`submodels:` or `slices:`) from a parsed YAML `document`.

    Raises:
        BundleError: an entry is malformed; the message names `where` and the entry.
    """
    entries = document.get("submodels", document.get("slices")) if isinstance(document, dict) else 0
    if not isinstance(entries, list) or not entries:
        raise BundleError(f"{where}: expected a list of sub-models under the key `submodels`")
    slices = []
    for number, entry in enumerate(entries):
        try:
            slices.append(
                Slice(
                    name=str(entry["name"]),
                    wide_layers=_layers(entry["wide_layers"]),
                    skipped_layers=_layers(entry["skipped_layers"]),
                    mmlu_percent=entry.get("mmlu_pretrained_percent"),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{where}: sub-model number {number + 1} needs name, wide_layers and "
                f"skipped_layers (lists of layer numbers): {error}"
            ) from error
    names = [item.name for item in slices]
    if len(set(names)) != len(names):
        raise BundleError(f"{where}: two sub-models have the same name")
    return slices


def _layers(values: Iterable[Any]) -> tuple[int, ...]:
    layers = tuple(values)
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise TypeError(f"layer numbers must be integers, got {list(layers)}")
    return tuple(sorted(set(layers)))


def published_slices() -> list[Slice]:
    """Return the sixteen published slices of E4B, E4B and E2B among them."""
    text = files("nestd.bundle").joinpath("published_slices.yaml").read_text(encoding="utf-8")
    return parse_slices(yaml.safe_load(text), "published_slices.yaml")


def slices_for(
    intermediate_size: Sequence[int], nested_intermediate_size: int, num_kv_shared_layers: int
) -> list[Slice]:
    """Return the sub-models that a checkpoint of this shape contains.

    A checkpoint of E4B's 35 layers contains the published slices whose wide layers are wide in it:
    all of them, if it is E4B. Beyond these, and for any other shape, it gets what can be said
    without a published table: `full` (each layer as wide as the checkpoint has it), and, where they
    differ, `nested` (all layers narrow) and `half` between the two, which widens the deeper half of
    the layers (the published slices widen from the deep end too).
    """
    num_layers = len(intermediate_size)
    widenable = [i for i, width in enumerate(intermediate_size) if width > nested_intermediate_size]
    if (num_layers, num_kv_shared_layers) == (PUBLISHED_LAYERS, PUBLISHED_KV_SHARED_LAYERS):
        contained = [s for s in published_slices() if set(s.wide_layers) <= set(widenable)]
        whole = Slice("full", tuple(widenable), ())
        if not any(s.wide_layers == whole.wide_layers and not s.skipped_layers for s in contained):
            contained.append(whole)
        return contained
    full = Slice("full", tuple(widenable), ())
    if not widenable:
        return [full]
    nested = Slice("nested", (), ())
    if len(widenable) < 2:
        return [nested, full]
    return [nested, Slice("half", tuple(widenable[len(widenable) // 2 :]), ()), full]
