"""Which folders hold the modules of a sentence-transformers model, as `modules.json` and routers list them.

Its loader takes the modules in order, each from the folder that its `path` names: the first, mostly the transformer,
from the model's own folder or from `0_Transformer`, others from `1_Pooling`, `2_Dense`. A router lists modules of its
own by `types`, in folders below its own. Their weights are parameters as the transformer's are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ties_dist.messages import brief
from ties_dist.storage.base import Reader, Span
from ties_dist.storage.place import is_inside

MODULES: Final = "modules.json"
_ROUTERS: Final = ("router_config.json", "config.json")
"""The second one is what older versions wrote."""

Read = Callable[[str], object]
"""The JSON value of a file; None where there is none, or none that can be read, which is then told of elsewhere."""


@dataclass(frozen=True)
class Below:
    """A folder of a model, through the model's own reader."""

    whole: Reader
    folder: str
    listed: Reader

    def names(self) -> Sequence[str]:
        return self.listed.names()

    def size(self, name: str) -> int:
        return self.whole.size(f"{self.folder}/{name}")

    def read(self, name: str, start: int, stop: int) -> Span:
        return self.whole.read(f"{self.folder}/{name}", start, stop)


def module_folders(read: Read, problems: list[str]) -> tuple[str, ...]:
    """Folders of the modules in order, as paths below the model's; '' is that itself. Empty: no such model."""
    listed = read(MODULES)
    if listed is None:
        return ()
    paths = _paths(listed)
    if paths is None:
        problems.append(f"{MODULES}: must be a list of modules with a `path` each, found {brief(listed)}.")
        return ()
    found = [folder for path in paths for folder in _with_routes(path, read)]
    if outside := [folder for folder in found if folder and not is_inside(folder)]:
        problems += [f"{MODULES}: {folder!r} is no folder of this model." for folder in outside]
        return ()
    return tuple(dict.fromkeys(found))


def _paths(listed: object) -> Sequence[str] | None:
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        return None
    paths = [module.get("path") for module in listed]
    return [path.strip("/") for path in paths] if all(isinstance(path, str) for path in paths) else None


def _with_routes(folder: str, read: Read) -> Iterator[str]:
    """A module's folder, and where it is a router, those of its modules."""
    yield folder
    if folder and not is_inside(folder):
        return
    for name in _ROUTERS:
        config = read(f"{folder}/{name}" if folder else name)
        types = config.get("types") if isinstance(config, Mapping) else None
        if isinstance(config, Mapping) and isinstance(types, Mapping) and "structure" in config:
            for route in types:
                yield f"{folder}/{route}" if folder else str(route)
            return
