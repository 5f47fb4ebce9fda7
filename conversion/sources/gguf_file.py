"""One GGUF file, whatever it holds: its metadata, and its tensors as rows of floats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from nestd.bundle.errors import CheckpointError
from nestd.conversion.sources.tensors import Floats, TensorInfo

MAGIC: Final = b"GGUF"
# As gguf-py can decode them.
FLOATS: Final = ("F32", "F16", "BF16")
QUANTISED: Final = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS",
)  # fmt: skip


def is_gguf(path: Path) -> bool:
    """Say whether the file begins as a GGUF file does, whatever it is called."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Any:  # noqa: ANN401  (gguf.GGUFReader, which has no types)
    """Return the header of a file.

    Raises:
        CheckpointError: it is damaged or cut short, or the package `gguf` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"to read {path}, install gguf: pip install 'nestd[gguf]'") from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut short ({error}): download it again"
        ) from error


def architecture(header: Any) -> str | None:  # noqa: ANN401  (gguf.GGUFReader)
    """Return what kind of model a file holds, by its header."""
    field = header.fields.get("general.architecture")
    return None if field is None else str(field.contents())


class GgufFile:
    """Reads the tensors of one file; only the header is kept.

    Attributes:
        path: the file.
        keys: the metadata by key, as Python values.
        stored: all tensors by the name that they have in the file.
    """

    dtypes = (*FLOATS, *QUANTISED)

    def __init__(self, path: Path, header: Any = None) -> None:  # noqa: ANN401
        """Take the header in, or read it where it is not given.

        Raises:
            CheckpointError: the file is damaged or cut short.
        """
        header = header or read_header(path)
        from gguf import GGMLQuantizationType, quants

        self.path = path
        self._quants, self._types = quants, GGMLQuantizationType
        self.keys: Mapping[str, Any] = {
            name: field.contents() for name, field in header.fields.items()
        }
        self._offsets: dict[str, int] = {}
        self.stored: dict[str, TensorInfo] = {}
        for tensor in header.tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            offset, nbytes = int(tensor.data_offset), int(tensor.n_bytes)
            if not all(shape):
                raise CheckpointError(
                    f"{path} is damaged ({tensor.name} is empty): download it again"
                )
            if offset + nbytes > path.stat().st_size:
                raise CheckpointError(f"{path} is cut short: download it again")
            self._offsets[tensor.name] = offset
            self.stored[tensor.name] = TensorInfo(
                str(path), tensor.name, shape, tensor.tensor_type.name, nbytes
            )

    def rows(self, info: TensorInfo, start: int, stop: int) -> Floats:
        """Return rows `start` to `stop` of a tensor, dequantised."""
        row_bytes = info.nbytes // info.shape[0]
        data = np.fromfile(
            self.path,
            np.uint8,
            count=(stop - start) * row_bytes,
            offset=self._offsets[info.name] + start * row_bytes,
        )
        # Blocks run along the last axis, so that axis comes last here too.
        lines = (stop - start) * (info.elements // info.shape[0] // info.shape[-1])
        if len(info.shape) == 1:
            lines = 1
        floats = self._quants.dequantize(data.reshape(lines, -1), self._types[info.dtype])
        result: Floats = floats.reshape(stop - start, *info.shape[1:])
        return result

    def pieces(self, info: TensorInfo) -> list[TensorInfo]:
        """Return the tensors that are stacked along the first axis of one."""
        nbytes = info.nbytes // info.shape[0]
        found = []
        for number in range(info.shape[0]):
            name = f"{info.name}[{number}]"
            self._offsets[name] = self._offsets[info.name] + number * nbytes
            found.append(TensorInfo(info.file, name, info.shape[1:], info.dtype, nbytes))
        return found


def quantised_types(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the types of those tensors that are quantised, sorted."""
    return sorted({info.dtype for info in tensors.values()} - set(FLOATS))
