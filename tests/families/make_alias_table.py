"""Writes ties_dist/inputs/alias_table.json: names of one parameter, as `_tied_weights_keys` of transformers have them.

Every class of transformers that has such keys is made without memory (on torch's meta device) with its default
configuration and tying switched on; parameters that are one object are then one parameter. That says more than the
keys, which are one side only in transformers 4, and patterns in both. Run in two environments, and once more:

    python -m tests.families.make_alias_table survey 4.json       # transformers 4.57
    python -m tests.families.make_alias_table survey 5.json       # transformers 5
    python -m tests.families.make_alias_table combine 4.json 5.json > ties_dist/inputs/alias_table.json

`*` in a name is any number, `{}` a number that all names of the parameter have. transformers is asked here alone.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Names = tuple[str, ...]


# -- one version of transformers --------------------------------------------------------------------------------------


def survey() -> dict[str, Any]:
    """Per class the names that are one parameter, as they are in memory and as they are in a file; and what failed."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.simplefilter("ignore")
    import transformers

    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for cls in _classes(failed):
        try:
            found[cls.__name__] = _shared(cls)
        except Exception as error:  # a default configuration that cannot be built, a library that is not there
            if pairs := _written_out(cls):
                found[cls.__name__] = {"memory": pairs, "file": pairs, "targets": _targets(cls)}
            else:
                failed[cls.__name__] = f"{type(error).__name__}: {error}"[:120]
    return {"version": transformers.__version__, "classes": found, "failed": failed}


def _classes(failed: dict[str, str]) -> Iterator[Any]:
    import transformers

    for package in pkgutil.iter_modules(transformers.models.__path__):
        folder = importlib.import_module(f"transformers.models.{package.name}")
        for module in pkgutil.iter_modules(folder.__path__):
            if not re.match(r"modeling_(?!tf_|flax_)", module.name):
                continue
            try:
                found = importlib.import_module(f"{folder.__name__}.{module.name}")
            except Exception as error:
                failed[module.name] = f"{type(error).__name__}: {error}"[:120]
                continue
            for _, cls in inspect.getmembers(found, inspect.isclass):
                ours = cls.__module__ == found.__name__ and issubclass(cls, transformers.PreTrainedModel)
                if ours and getattr(cls, "_tied_weights_keys", None) and cls.config_class is not None:
                    yield cls


def _targets(cls: Any) -> list[str]:
    """The sides of which transformers says that they follow the other."""
    return list(cls._tied_weights_keys)


def _written_out(cls: Any) -> list[list[str]]:
    """Groups of keys that are plain names on both sides (transformers 5)."""
    keys = cls._tied_weights_keys
    plain = re.compile(r"[\w.]+\.(weight|bias)")
    if not isinstance(keys, dict) or not all(plain.fullmatch(name) for pair in keys.items() for name in pair):
        return []
    groups: dict[str, set[str]] = defaultdict(set)
    for target, source in keys.items():
        groups[source] |= {source, target}
    return [sorted(group) for group in groups.values()]


def _shared(cls: Any) -> dict[str, Any]:
    model = _made(cls)
    keys = [key for module in model.modules() for key in getattr(module, "_tied_weights_keys", None) or ()]
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names: dict[int, set[str]] = defaultdict(set)
    for name, tensor in named:
        names[id(tensor)].add(name)
    # Objects that are one for another reason are buffers that a model computes.
    known = [g for g in names.values() if any(re.search(key, name) for key in keys for name in g)]
    memory = [sorted(group) for group in known if len(group) > 1]
    file = [sorted({_in_file(model, name) for name in group}) for group in memory]
    return {"memory": memory, "file": file, "targets": _targets(cls)}


def _made(cls: Any) -> Any:
    """A model without memory."""
    import torch

    failure = None
    for options in ({}, _NO_LIBRARY):
        try:
            config = cls.config_class(**options)
            _tie(config)
            with torch.device("meta"):
                model = cls(config)
            model.tie_weights()
            return model
        except ImportError as error:
            failure = error
    raise failure


_NO_LIBRARY = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {"model_type": "resnet"},
}


def _tie(config: Any, depth: int = 3) -> None:
    """Switch tying on, in every part of a configuration."""
    for value in list(vars(config).values()):
        if depth and hasattr(value, "to_dict"):
            _tie(value, depth - 1)
    config.tie_word_embeddings = True


def _in_file(model: Any, name: str) -> str:
    """What `save_pretrained` calls it."""
    import torch

    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        for pattern, replacement in {v: k for k, v in model._checkpoint_conversion_mapping.items()}.items():
            plain = re.sub(r"\(.*\)", "", replacement.lstrip("^"))
            renamed, count = re.subn(pattern, plain, name)
            if count:
                return str(renamed)
        return name
    try:
        return str(next(iter(revert_weight_conversion(model, {name: torch.empty(1)}))))
    except Exception:  # a converter that needs its parameter's neighbours: none of the names that are tied
        return name


# -- both, as one table -----------------------------------------------------------------------------------------------


def combine(surveys: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Groups of names with the classes that store them; those that only memory knows have no class."""
    classes: dict[Names, set[str]] = defaultdict(set)
    targets: set[str] = set()
    for each in surveys:
        for name, found in each["classes"].items():
            targets |= set(found["targets"])
            for group in _templates(found["file"]):
                classes[group].add(name)
            for group in _templates(found["memory"]):
                classes[group] |= set()
    groups = sorted((_ranked(group, targets), sorted(names)) for group, names in classes.items())
    return {
        "transformers": [each["version"] for each in surveys],
        "groups": [{"names": list(group), "classes": names} for group, names in groups],
    }


def _templates(groups: Iterable[Sequence[str]]) -> set[Names]:
    """Names with the numbers of layers taken out.

    A number that differs between names of one parameter is `*`; one that differs between parameters alone is `{}`.
    """
    numbers: dict[str, list[list[set[str]]]] = defaultdict(list)  # skeleton -> per parameter, per number: its values
    groups = [group for group in groups if len(group) > 1]
    for group in groups:
        here: dict[str, list[set[str]]] = {}
        for name in group:
            values = re.findall(r"(?<=\.)\d+(?=\.)", name)
            for i, value in enumerate(values):
                here.setdefault(_skeleton(name), [set() for _ in values])[i].add(value)
        for skeleton, found in here.items():
            numbers[skeleton].append(found)

    def template(name: str) -> str:
        per_parameter, position = numbers[_skeleton(name)], iter(range(99))

        def mark(match: re.Match[str]) -> str:
            i = next(position)
            if any(len(each[i]) > 1 for each in per_parameter):
                return "*"
            return "{}" if len(set.union(*(each[i] for each in per_parameter))) > 1 else match[0]

        return re.sub(r"(?<=\.)\d+(?=\.)", mark, name)

    made = {tuple(sorted({template(name) for name in group})) for group in groups}
    return {group for group in made if len(group) > 1 or "*" in group[0]}


def _skeleton(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _ranked(group: Names, targets: set[str]) -> Names:
    """Embeddings first, best name first; then what follows nothing else."""
    from ties_dist.inputs.names import embedding_rank

    return tuple(sorted(group, key=lambda name: (embedding_rank(name), name in targets, name)))


def _compact(table: Mapping[str, Any]) -> str:
    """A group a line."""
    lines = ",\n".join(f"  {json.dumps(group)}" for group in table["groups"])
    return f'{{"transformers": {json.dumps(table["transformers"])}, "groups": [\n{lines}\n]}}\n'


def main(command: str, *files: str) -> None:
    if command == "survey":
        found = survey()
        Path(files[0]).write_text(json.dumps(found))
        print(f"{found['version']}: {len(found['classes'])} classes; not made: {found['failed']}")
    else:
        sys.stdout.write(_compact(combine([json.loads(Path(file).read_text()) for file in files])))


if __name__ == "__main__":
    main(*sys.argv[1:])
