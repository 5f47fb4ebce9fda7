"""The bundle: whether it is whole, and which of its sizes fit this board."""

from __future__ import annotations

from nestd.bundle.errors import BundleError
from nestd.bundle.manifest import Bundle
from nestd.bundle.trust import authenticate
from nestd.daemon.doctor.finding import Finding, failed, ok, skipped, warning
from nestd.daemon.elastic.cost import ModelCost
from nestd.daemon.elastic.limits import budget
from nestd.daemon.elastic.resources import Snapshot
from nestd.daemon.settings import Settings
from nestd.daemon.units import format_bytes


def integrity(settings: Settings, bundle: Bundle) -> Finding:
    """Every file against its sha256, and the whole against what is pinned or signed."""
    sha256, signers = settings.bundle_sha256, settings.bundle_signers
    try:
        authenticate(bundle, sha256, signers)
        if sha256 is None and signers is None:
            bundle.verify()
    except BundleError as error:
        return failed("bundle files", str(error), "copy the bundle again, or convert it again")
    pinned = " and the digest is the pinned one" if sha256 is not None else ""
    signed = " and the signature is good" if signers is not None else ""
    return ok("bundle files", f"all {len(bundle.manifest.files)} match{pinned}{signed}")


def fit(settings: Settings, bundle: Bundle, snapshot: Snapshot) -> Finding:
    """Which sub-models fit into the memory that is free now."""
    free = budget(snapshot.memory, settings.elastic)
    if free is None:
        return skipped("memory for the model", "this board does not tell how much memory is free")
    cost = ModelCost.of(bundle.manifest, settings)
    stage = cost.largest_stage(free)
    smallest = cost.stages[cost.stage_of_rung(0)]
    needed = format_bytes(cost.bytes_of(smallest))
    has = f"{format_bytes(max(0, free))} are free beside the reserve"
    remedy = (
        "stop another program, lower engine.context_length or elastic.memory.reserve_bytes, "
        "convert to 4 bits, or take a board with more memory"
    )
    if stage < 0:
        seen = f"not even {smallest.submodel.name} fits: it needs {needed}, {has}"
        return failed("memory for the model", seen, remedy)
    largest = cost.stages[stage]
    if stage < cost.stage_of_rung(0):
        seen = f"{smallest.submodel.name} fits with {largest.context_length} tokens only: {has}"
        return warning("memory for the model", seen, remedy)
    return ok("memory for the model", f"up to {largest.submodel.name} fits: {has}")
