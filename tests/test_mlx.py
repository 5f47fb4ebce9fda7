"""MLX directories convert to what their dequantised weights convert to.

The quantiser here follows MLX's documentation of `mlx.core.quantize` (mode "affine"); MLX itself
needs a Mac.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny import write_checkpoint

from nestd.bundle.errors import CheckpointError
from nestd.bundle.manifest import Bundle
from nestd.conversion.convert import ConvertOptions, convert

Floats = npt.NDArray[np.float32]


def quantise(weights: Floats, bits: int, group: int) -> tuple[dict[str, npt.NDArray[Any]], Floats]:
    """Return (MLX's three tensors, what they stand for)."""
    rows, columns = weights.shape
    groups = weights.reshape(rows, -1, group)
    low, high = groups.min(2), groups.max(2)
    scales = np.maximum((high - low) / (2**bits - 1), 1e-7).astype(np.float32)
    values = np.rint((groups - low[..., None]) / scales[..., None]).clip(0, 2**bits - 1)
    number = values.astype(np.uint8).reshape(rows, columns)
    lines = np.unpackbits(number[..., None], axis=2, bitorder="little")[:, :, :bits]
    packed = np.packbits(lines.reshape(rows, -1), axis=1, bitorder="little").view("<u4")
    stands_for = (values * scales[..., None] + low[..., None]).astype(np.float32)
    tensors = {"weight": packed, "scales": scales, "biases": low.astype(np.float32)}
    return tensors, stands_for.reshape(rows, columns)


def write_mlx(plain: Path, path: Path, bits: int, group: int, widths: dict[str, int]) -> Path:
    """Write `plain` as mlx-lm does, `widths` for single modules; `plain` takes the same values."""
    path.mkdir()
    for file in plain.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (path / file.name).write_bytes(file.read_bytes())
    weights = load_file(plain / "model.safetensors")
    stored: dict[str, npt.NDArray[Any]] = {}
    for name, value in list(weights.items()):
        base = name.removesuffix(".weight")
        outer = f"language_model.{base}"
        large = name.endswith(".weight") and value.ndim == 2 and not value.shape[1] % group
        if large and "altup" not in name:
            tensors, weights[name] = quantise(value, widths.get(outer, bits), group)
            stored |= {f"{outer}.{part}": tensor for part, tensor in tensors.items()}
        else:
            stored[f"language_model.{name}"] = value
    save_file(weights, plain / "model.safetensors")
    save_file(stored, path / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    own = {name: {"group_size": group, "bits": width} for name, width in widths.items()}
    quantization = {"group_size": group, "bits": bits, "mode": "affine", **own}
    (path / "config.json").write_text(json.dumps(config | {"quantization": quantization}))
    return path


def converted(source: Path, out: Path) -> tuple[Bundle, str]:
    log = io.StringIO()
    return convert(str(source), out, ConvertOptions(bits=32), log), log.getvalue()


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (4, 32), (8, 64), (6, 64), (3, 32)])
def test_affine_groups_convert_to_the_weights_that_they_stand_for(
    bits: int, group: int, tmp_path: Path
) -> None:
    plain = write_checkpoint(tmp_path / "plain")
    widths = {"language_model.model.layers.1.mlp.down_proj": 8}
    mlx = write_mlx(plain, tmp_path / "mlx", bits, group, widths)
    expected, _ = converted(plain, tmp_path / "expected")
    bundle, log = converted(mlx, tmp_path / "bundle")
    for name in ("decoder.data", "embed_tokens.data", "per_layer_embeddings.data"):
        ours = np.fromfile(bundle.path / name, np.float32)
        np.testing.assert_allclose(
            ours, np.fromfile(expected.path / name, np.float32), rtol=0, atol=1e-6
        )
    assert f"quantised already (MLX's {bits} bits)" in log
    assert "text decoder only" in log


def test_another_mode_of_mlx_is_refused(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain")
    mlx = write_mlx(plain, tmp_path / "mlx", 4, 32, {})
    config = json.loads((mlx / "config.json").read_text())
    config["quantization"]["mode"] = "mxfp4"
    (mlx / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="MLX's mode 'mxfp4'"):
        converted(mlx, tmp_path / "bundle")


def test_scales_that_do_not_fit_are_named(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain")
    mlx = write_mlx(plain, tmp_path / "mlx", 4, 32, {})
    config = json.loads((mlx / "config.json").read_text())
    config["quantization"]["group_size"] = 64
    (mlx / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"scales is missing or does not fit .* in groups of"):
        converted(mlx, tmp_path / "bundle")
