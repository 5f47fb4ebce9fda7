"""`nestd inspect BUNDLE`: show a bundle's sections, bytes and sub-models."""

from __future__ import annotations

import argparse
from pathlib import Path

from nestd.bundle.licence import notice
from nestd.bundle.manifest import Bundle
from nestd.cli.main import Subparsers


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "inspect", help="show a bundle's sections and sub-models", description=__doc__
    )
    parser.add_argument("bundle", type=Path, help="a directory made by `nestd convert`")
    parser.add_argument("--verify", action="store_true", help="compare every file's sha256")
    parser.add_argument("--json", action="store_true", help="print the manifest itself")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the bundle; BundleError where it is damaged."""
    bundle = Bundle.open(args.bundle)
    if args.verify:
        bundle.verify()
    if args.json:
        print(bundle.manifest.model_dump_json(indent=1))
    else:
        print(describe(bundle))
        if args.verify:
            print("every file matches its sha256")
        if text := notice(bundle):
            print(f"\n{text}")
    return 0


def describe(bundle: Bundle) -> str:
    """Return the bundle's description for people."""
    manifest = bundle.manifest
    quantization, source = manifest.quantization, manifest.source
    width = f"{quantization.bits} bits"
    if quantization.bits != 32:
        width += f" in blocks of {quantization.block_size}"
    media = []
    if manifest.vision:
        sizes = ", ".join(map(str, manifest.vision.sizes))
        media.append(f"a picture of {sizes} pixels is {manifest.vision.count} tokens")
    if manifest.audio:
        media.append(f"a clip of up to 30 s is {manifest.audio.count} tokens")
    lines = [
        f"{manifest.name}: {source.architecture} from {source.checkpoint}, {width}",
        f"modalities: {', '.join(manifest.modalities)}",
        *media,
        f"needs {_megabytes(manifest.minimum_ram_bytes)} of RAM at least",
        f"digest (bundle_sha256): {bundle.digest}",
        "",
        "section                        on disk",
    ]
    sections = {**manifest.sections, "all files": sum(f.bytes for f in manifest.files.values())}
    lines += [f"{name:<24}{_megabytes(size):>14}" for name, size in sections.items()]
    lines += ["", "sub-model           parameters   bytes per token   wide   skipped   MMLU"]
    for item in manifest.submodels:
        score = "" if item.mmlu_percent is None else f"{item.mmlu_percent:.1f}"
        lines.append(
            f"{item.name:<18}{item.effective_params / 1e6:>10,.1f} M"
            f"{_megabytes(item.decoder_bytes):>18}"
            f"{len(item.wide_layers):>7}{len(item.skipped_layers):>10}{score:>7}"
        )
    return "\n".join(lines)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
