"""`nestd convert CHECKPOINT BUNDLE`: make a bundle from a Gemma 3n checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nestd.cli.main import Subparsers


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "convert", help="make a bundle from a Gemma 3n checkpoint", description=__doc__
    )
    parser.add_argument(
        "checkpoint", help="a directory, a Hugging Face repository, or kaggle:OWNER/MODEL/..."
    )
    parser.add_argument("bundle", type=Path, help="the directory to create")
    parser.add_argument(
        "--bits", type=int, choices=(4, 8, 32), default=8, help="width of the weights (default 8)"
    )
    parser.add_argument(
        "--block-size",
        type=int,
        help="weights per scale: 32 is more faithful, 128 (the default) smaller and faster",
    )
    parser.add_argument(
        "--per-layer-embedding-bits",
        type=int,
        choices=(4, 8),
        help="width of the per-layer embeddings on storage (default 8)",
    )
    parser.add_argument(
        "--submodels", type=Path, metavar="FILE", help="YAML list of sub-models to offer"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Convert and say what was made."""
    from nestd.cli.inspect import describe
    from nestd.conversion.convert import ConvertOptions, convert

    options = ConvertOptions(
        bits=args.bits,
        block_size=args.block_size,
        per_layer_embedding_bits=args.per_layer_embedding_bits,
        submodels=args.submodels,
    )
    bundle = convert(args.checkpoint, args.bundle, options, sys.stderr)
    print(describe(bundle))
    return 0
