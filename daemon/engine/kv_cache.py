"""The key-value cache of one sequence: buffers that ONNX Runtime reads and extends in place.

One float32 pair [1, kv_heads, capacity, head_dim] for each layer that owns a cache; all other
layers read one of these. Its shape is the same for every sub-model, so a sequence may change its
sub-model between any two tokens. Rows behind `length` are garbage.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nestd.bundle.manifest import ModelConfig


class KVCache:
    """The buffers of one session.

    Attributes:
        length: tokens in the cache.
        capacity: tokens that fit.
        buffers: by graph input name without prefix, for example `0.key`.
    """

    def __init__(self, model: ModelConfig, capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        shape = (1, model.num_key_value_heads, capacity, model.head_dim)
        # Zeroed pages are not resident until they are written: a short answer costs little.
        self.buffers: dict[str, npt.NDArray[np.float32]] = {
            f"{layer}.{part}": np.zeros(shape, np.float32)
            for layer in range(model.first_kv_shared_layer)
            for part in ("key", "value")
        }

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.capacity - self.length

    @property
    def bytes_used(self) -> int:
        """Bytes of the rows written so far."""
        return sum(self.length * item.nbytes // self.capacity for item in self.buffers.values())

    def copy_rows(self, source: KVCache, count: int) -> None:
        """Take the first `count` rows of `source`; whatever was here is forgotten."""
        for name, buffer in self.buffers.items():
            buffer[:, :, :count] = source.buffers[name][:, :, :count]
        self.length = count
