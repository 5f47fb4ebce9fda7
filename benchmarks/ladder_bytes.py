"""Bytes on disk: one bundle with the whole ladder, beside a separate model for each size.

    python benchmarks/ladder_bytes.py BUNDLE

Writes benchmarks/results/ladder_bytes.md. A separate model would hold the weights that its size
runs, the token table, and the per-layer embeddings of the layers that it keeps, at the same widths.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from real_shape import RESULTS

from nestd.bundle.manifest import Bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    manifest = Bundle.open(parser.parse_args().bundle).manifest
    layers = manifest.model.num_layers
    table = manifest.sections["per_layer_embeddings"]
    bits = manifest.quantization.bits
    lines = [
        f"# The ladder on disk, {bits} bits",
        "",
        "| sub-model | as a separate model, MB |",
        "|---|---|",
    ]
    total = 0.0
    for item in manifest.submodels:
        size = item.decoder_bytes + table * (layers - len(item.skipped_layers)) / layers
        total += size
        lines.append(f"| {item.name} | {size / 1e6:,.0f} |")
    bundle = sum(file.bytes for file in manifest.files.values())
    lines += [
        f"| all {len(manifest.submodels)}, separately | {total / 1e6:,.0f} |",
        f"| **one bundle with all of them** | **{bundle / 1e6:,.0f}** |",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ladder_bytes.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
