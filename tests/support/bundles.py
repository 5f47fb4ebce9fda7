"""Fixtures: a tiny random checkpoint and its bundles, made once a session, without torch."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from nestd.bundle.manifest import Bundle
from nestd.conversion.convert import ConvertOptions, convert
from support.tiny import write_checkpoint
from support.tiny_media import add_media


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    destination = tmp_path_factory.mktemp("tiny_bundle") / "bundle"
    return convert(str(tiny_checkpoint), destination, ConvertOptions(), io.StringIO())


@pytest.fixture(scope="session")
def exact_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle in float32: one row and many rows give the same logits but for 1e-6."""
    destination = tmp_path_factory.mktemp("exact_bundle") / "bundle"
    return convert(str(tiny_checkpoint), destination, ConvertOptions(bits=32), io.StringIO())


@pytest.fixture(scope="session")
def media_bundle(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with encoders."""
    return add_media(tiny_bundle, tmp_path_factory.mktemp("media_bundle") / "media")
