"""`nestd convert CHECKPOINT BUNDLE`: make a bundle from a Gemma 3n checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from nestd.bundle.manifest import Modality
from nestd.cli.main import Subparsers


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "convert", help="make a bundle from a Gemma 3n checkpoint", description=__doc__
    )
    parser.add_argument(
        "checkpoint",
        help="a directory (Hugging Face, MLX, GGUF), a GGUF file, a Hugging Face repository, "
        "kaggle:OWNER/MODEL/... or ollama:MODEL:TAG",
    )
    parser.add_argument("bundle", type=Path, help="the directory to create")
    parser.add_argument(
        "--mmproj",
        type=Path,
        metavar="FILE",
        help="llama.cpp's GGUF file of eyes and ears, to go with a GGUF file of text (in a "
        "directory with both it is found)",
    )
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
    parser.add_argument(
        "--modalities",
        type=_modalities,
        metavar="text,vision,audio",
        help="what the bundle shall understand (default: all that the checkpoint has)",
    )
    parser.add_argument(
        "--image-sizes",
        type=_sizes,
        metavar="256,512,768",
        help="side lengths of pictures in pixels, a vision graph each (default 256,512,768)",
    )
    parser.add_argument(
        "--encoder-bits",
        type=int,
        choices=(8, 32),
        help="width of the encoders' weights (default 8, or 32 where --bits is 32)",
    )
    parser.add_argument(
        "--lm-head-screen",
        action="store_true",
        help="score all tokens at 4 bits and only the likeliest 256 exactly: fewer bytes a token",
    )
    parser.add_argument(
        "--sparse-rows",
        action="store_true",
        help="decode the sparse layers by the channels that are not zero: fewer bytes a token, "
        "for a larger bundle",
    )
    return parser


def _modalities(text: str) -> tuple[Modality, ...]:
    names = text.split(",")
    known = get_args(Modality)
    if not set(names) <= set(known) or "text" not in names:
        raise argparse.ArgumentTypeError(f"give text, and what else of {', '.join(known[1:])}")
    return tuple(name for name in known if name in names)


def _sizes(text: str) -> tuple[int, ...]:
    if not all(size.isdecimal() for size in text.split(",")):
        raise argparse.ArgumentTypeError("give whole numbers with commas between")
    return tuple(int(size) for size in text.split(","))


def run(args: argparse.Namespace) -> int:
    """Convert and say what was made."""
    from nestd.cli.inspect import describe
    from nestd.cli.notice import show_once
    from nestd.conversion.convert import ConvertOptions, convert
    from nestd.conversion.encoders.config import IMAGE_SIZES
    from nestd.daemon.settings import default_state_path

    options = ConvertOptions(
        bits=args.bits,
        block_size=args.block_size,
        per_layer_embedding_bits=args.per_layer_embedding_bits,
        submodels=args.submodels,
        modalities=args.modalities,
        image_sizes=args.image_sizes or IMAGE_SIZES,
        encoder_bits=args.encoder_bits,
        mmproj=args.mmproj,
        lm_head_screen=args.lm_head_screen,
        sparse_rows=args.sparse_rows,
    )
    bundle = convert(args.checkpoint, args.bundle, options, sys.stderr)
    print(describe(bundle))
    show_once(bundle, default_state_path(), lambda text: print(f"\n{text}"))
    return 0
