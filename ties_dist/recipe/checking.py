"""A recipe read without its models: valid or not, the numbers of any tensor, and what mergekit would do with it.

Whether models are there, fit together, and have the tensors that filters name, is for `plan` to find.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ties_dist.errors import RecipeError
from ties_dist.messages import nearest
from ties_dist.recipe.comparison import differences
from ties_dist.recipe.document import RecipeSource, read_document
from ties_dist.recipe.draft import Draft
from ties_dist.recipe.recipe import read_draft
from ties_dist.recipe.spec import MethodSpec
from ties_dist.recipe.values import Setting, find_layer, layer_depths


@dataclass(frozen=True, kw_only=True)
class Effective:
    """One number that a tensor is merged with. model: as written, None for what holds for the whole merge.

    value: None where it follows from how many layers the model has, or where no filter fits. set_by: key path of what
    set it, or which default it is. filter: the one that fitted. points: of a gradient.
    """

    model: str | None
    parameter: str
    value: float | bool | None
    set_by: str
    filter: str | None = None
    points: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TensorNumbers:
    """All numbers of one tensor. depth: of its layer, 0 the first and 1 the last; None: not known."""

    tensor: str
    depth: float | None
    numbers: tuple[Effective, ...]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What can be said of a recipe alone. mergekit: what mergekit 0.1.5 would do differently, each after "would"."""

    title: str
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    method: str = ""
    semantics: str = ""
    base: str | None = None
    models: tuple[str, ...] = ()
    mergekit: tuple[str, ...] = ()
    tensors: tuple[TensorNumbers, ...] = ()

    @property
    def valid(self) -> bool:
        return not self.problems


def check_recipe(
    source: RecipeSource,
    *,
    methods: Mapping[str, MethodSpec],
    semantics: str | None = None,
    tensors: Sequence[str] = (),
    layers: int | None = None,
    like: Sequence[str] | None = None,
) -> Checked:
    """Everything that is wrong with a recipe, or what it means.

    tensors: names whose numbers are asked for. layers: of the models; like: names of all tensors of such a model.
    Raises RecipeError where a tensor is not one of theirs.
    """
    try:
        document, title, folder = read_document(source)
        roots = (folder, Path.cwd())
        draft = read_draft(document, methods=methods, semantics=semantics, roots=roots, here=False)
    except RecipeError as error:
        return Checked(title=str(source) if isinstance(source, Path) else "the recipe", problems=(str(error),))
    if draft.problems:
        return Checked(title=title, problems=tuple(dict.fromkeys(draft.problems)), notes=tuple(draft.notes))
    depth = _Depths(layers or draft.parts.layers, like)
    return Checked(
        title=title,
        problems=(),
        notes=tuple(dict.fromkeys([*draft.notes, *_absent(draft)])),
        method=draft.method,
        semantics=draft.options.semantics,
        base=draft.base.text if draft.base else None,
        models=tuple(entry.location.text for entry in draft.models if entry.location),
        mergekit=tuple(differences(draft)),
        tensors=tuple(_numbers(draft, tensor, depth.of(tensor)) for tensor in tensors),
    )


class _Depths:
    """Where tensors stand in their stack of layers, as far as that is known."""

    def __init__(self, layers: int | None, like: Sequence[str] | None) -> None:
        self._layers = layers
        self._known = layer_depths(like) if like is not None else None

    def of(self, tensor: str) -> float | None:
        """None: not known. Raises RecipeError for a tensor that the models do not have."""
        if self._known is not None:
            if tensor not in self._known:
                raise RecipeError(
                    f"--tensor: no tensor '{tensor}' there; {nearest(tensor, sorted(self._known)[:1000])}"
                )
            return self._known[tensor]
        layer, _ = find_layer(tensor)
        if not layer:
            return 0.0
        if self._layers is None:
            return None
        index, last = int(layer.rpartition(".")[2]), self._layers - 1
        if index > last:
            raise RecipeError(f"--tensor: '{tensor}' is of layer {index}, and {self._layers} layers end at {last}")
        return index / last if last else 1.0


def _absent(draft: Draft) -> Iterator[str]:
    """Models that are neither here nor on the hub, by their names: `check` asks nobody."""
    locations = [draft.base, draft.elect_from, *(entry.location for entry in draft.models)]
    absent = [each.text for each in locations if each and each.path is None and not each.is_hub_id]
    if absent:
        yield f"not here, nor named as on the hub: {', '.join(dict.fromkeys(absent))}; `merge` needs them."


def _numbers(draft: Draft, tensor: str, depth: float | None) -> TensorNumbers:
    ignored = {p.name for p in draft.spec.parameters if p.ignored} if draft.spec else set()
    places = [
        (e.location.text if e.location else e.where, s)
        for e, s in zip(draft.models, draft.expert_parameters, strict=True)
    ]
    found = [
        _effective(model, name, setting, tensor, depth)
        for model, settings in [*places, (None, draft.parameters)]
        for name, setting in settings.items()
        if name not in ignored
    ]
    return TensorNumbers(tensor=tensor, depth=depth, numbers=tuple(found))


def _effective(model: str | None, name: str, setting: Setting, tensor: str, depth: float | None) -> Effective:
    try:
        case = setting.case_of(tensor)
    except RecipeError:
        return Effective(model=model, parameter=name, value=None, set_by=f"{setting.where}: no filter fits")
    pattern, points = setting.cases[case]
    gradient = points if len(points) > 1 else ()
    value = None if gradient and depth is None else setting.at(tensor, depth or 0.0)
    return Effective(
        model=model, parameter=name, value=value, set_by=setting.origins[case], filter=pattern, points=gradient
    )
