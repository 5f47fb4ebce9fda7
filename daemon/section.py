"""What the sections of the configuration are made of (`nestd.daemon.settings`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Percent = Annotated[float, Field(ge=0, le=100)]
Seconds = Annotated[float, Field(ge=0, le=30 * 86400)]
PositiveSeconds = Annotated[float, Field(gt=0, le=30 * 86400)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def in_order(section: Section, *keys: str) -> None:
    """Raise unless the values of `keys` ascend."""
    values = [getattr(section, key) for key in keys]
    if values != sorted(values):
        pairs = " <= ".join(keys)
        raise PydanticCustomError("order", "must keep to {pairs}", {"keys": keys, "pairs": pairs})
