"""What every source of weights offers: tensors by name, read as row ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: its file, its name there, shape, type of its elements, and bytes."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


class TensorReader(Protocol):
    """Reads the tensors of one source.

    Attributes:
        dtypes: types of elements that `rows` gives as floats.
    """

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Types of elements that can be read."""

    def tensors(self) -> dict[str, TensorInfo]:
        """Return all tensors by their Hugging Face name; CheckpointError if one is cut short."""

    def rows(self, info: TensorInfo, start: int, stop: int) -> Floats:
        """Return rows `start` to `stop` of a tensor: [stop - start, ...]."""


class Together:
    """Several readers as one, for a model whose parts lie in files of their own."""

    def __init__(self, *readers: TensorReader) -> None:
        """Take readers whose tensors differ in name."""
        self._tensors: dict[str, TensorInfo] = {}
        self._reader: dict[TensorInfo, TensorReader] = {}
        for reader in readers:
            self._tensors |= reader.tensors()
            self._reader |= dict.fromkeys(reader.tensors().values(), reader)
        self.dtypes = tuple(dict.fromkeys(name for reader in readers for name in reader.dtypes))

    def tensors(self) -> dict[str, TensorInfo]:
        """Return the tensors of all."""
        return dict(self._tensors)

    def rows(self, info: TensorInfo, start: int, stop: int) -> Floats:
        """Return rows `start` to `stop` of a tensor, from the file that holds it."""
        return self._reader[info].rows(info, start, stop)
