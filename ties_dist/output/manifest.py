"""What stands in OUT and where it came from: `OUT/.ties_dist/manifest.json`, and `plan.json` of an unfinished merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue

from ties_dist.thresholds import ModelCut
from ties_dist.values.inputs import Sight


class Document(BaseModel):
    """Fields that a later version added are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def to_json(self) -> bytes:
        return self.model_dump_json().encode()


class Shard(Document):
    """blocks: digest of each 1 MiB."""

    size: int
    blocks: tuple[str, ...]


def _listed(found: object) -> object:
    return (found,) if isinstance(found, str) else found


class Origin(Document):
    """What it takes to merge a part of it again.

    models: by the recipe's text, where they are as seen from OUT: the model, and the adapter that is applied to it.
    """

    models: Mapping[str, Annotated[tuple[str, ...], BeforeValidator(_listed)]] = {}
    max_shard_bytes: int | None = None
    thresholds: tuple[ModelCut, ...] = ()
    majority: int | None = None
    sight: Sight | None = None


class Manifest(Document):
    """A finished model. companions: files beside the weights that it was published with."""

    fingerprint: str
    semantics_version: int = 1
    """The first did not say it."""
    output_digest: str = ""
    companions: tuple[str, ...] = ()
    origin: Origin
    shards: Mapping[str, Shard]


class Begun(Document):
    """An unfinished merge."""

    recipe: Mapping[str, JsonValue]
    sight: Sight | None = None
    semantics_version: int = 1
