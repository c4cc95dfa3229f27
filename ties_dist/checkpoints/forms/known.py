"""Every form by its file beside this one, and what a checkpoint's tensors are the parameters of."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping

from ties_dist.checkpoints.forms import plain
from ties_dist.checkpoints.header import TensorEntry
from ties_dist.checkpoints.parameters import Form, Parameter
from ties_dist.errors import CheckpointError
from ties_dist.messages import listing, show

PACKAGE = __name__.rpartition(".")[0]


def known_forms() -> Iterator[Form]:
    """In the order of their names. `plain` is none of them: it is what no form claims."""
    for found in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__, f"{PACKAGE}."):
        if found.name not in (__name__, plain.__name__):
            form: Form = importlib.import_module(found.name)
            yield form


def parameters_of(tensors: Mapping[str, TensorEntry]) -> dict[str, Parameter]:
    """The parameters of a checkpoint; a tensor that no form claims is one by itself.

    Raises CheckpointError where two parameters claim a tensor or a name.
    """
    claimed: dict[str, str] = {}
    found: dict[str, Parameter] = {}
    problems = []
    for form in known_forms():
        for parameter, names in form.parameters(tensors):
            twice = (name for name in names if name in claimed)
            problems += [f"{show(n)}: part of {show(parameter.name)} and of {show(claimed[n])}" for n in twice]
            claimed |= dict.fromkeys(names, parameter.name)
            found[parameter.name] = parameter
    rest = {name: plain.parameter(entry) for name, entry in tensors.items() if name not in claimed}
    problems += [f"{show(name)}: stored as it is, and in codes" for name in found.keys() & rest.keys()]
    if problems:
        raise CheckpointError(listing("tensors that are part of two parameters:", problems))
    return rest | found
