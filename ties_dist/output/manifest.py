"""What stands in OUT and where it came from: `OUT/.ties_dist/manifest.json`, and `plan.json` of an unfinished merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, JsonValue, NonNegativeInt, model_validator

from ties_dist.output.documents import FileName, Name
from ties_dist.storage.base import BLOCK_BYTES
from ties_dist.thresholds import ModelCut, TensorCut
from ties_dist.values.inputs import Sight


class Document(BaseModel):
    """Fields that a later version added are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def to_json(self) -> bytes:
        return self.model_dump_json().encode()


class Shard(Document):
    """blocks: digest of each 1 MiB."""

    size: NonNegativeInt
    blocks: tuple[str, ...]

    @model_validator(mode="after")
    def _is_covered(self) -> Self:
        if len(self.blocks) != -(-self.size // BLOCK_BYTES):
            raise ValueError(f"{len(self.blocks)} digests of {self.size} bytes")
        return self


def _is_float32(bits: int) -> None:
    if not 0 <= bits < 1 << 32:
        raise ValueError(f"{bits} is no pattern of a float32")


def _checked(cut: ModelCut) -> ModelCut:
    _is_float32(cut.threshold.bits)
    return cut


def _tensor_checked(cut: TensorCut) -> TensorCut:
    _is_float32(cut.bits)
    return cut


KnownCut = Annotated[ModelCut, AfterValidator(_checked)]
KnownTensorCut = Annotated[TensorCut, AfterValidator(_tensor_checked)]
"""Thresholds as a file has them."""


def _is_path(part: str) -> str:
    if "\0" in part:
        raise ValueError(f"{part!r} is no path")
    return part


def _listed(found: object) -> object:
    return (found,) if isinstance(found, str) else found


class Origin(Document):
    """What it takes to merge a part of it again.

    models: by the recipe's text, where they are as seen from OUT: the model, and the adapter that is applied to it.
    """

    models: Mapping[str, Annotated[tuple[Annotated[str, AfterValidator(_is_path)], ...], BeforeValidator(_listed)]] = {}
    max_shard_bytes: int | None = None
    thresholds: tuple[KnownCut, ...] = ()
    majority: int | None = None
    sight: Sight | None = None


class Manifest(Document):
    """A finished model. companions: files beside the weights that it was published with."""

    fingerprint: Name
    semantics_version: int = 1
    """The first did not say it."""
    output_digest: str = ""
    companions: tuple[FileName, ...] = ()
    origin: Origin
    shards: Mapping[FileName, Shard]


class Begun(Document):
    """An unfinished merge."""

    recipe: Mapping[str, JsonValue]
    sight: Sight | None = None
    semantics_version: int = 1
