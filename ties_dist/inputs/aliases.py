"""One parameter under several names: found by name, decided by what is stored, counted and merged once.

Candidates are names that transformers gives to one parameter (`alias_table`) and, for families that are not in it,
names of token embeddings and output heads. Two candidates are one parameter where they are equal in every model that
stores both; a model may store any one of them. What config.json says of tying decides nothing: transformers 4 leaves
the key out where a class ties by default, transformers 5 writes `true` into T5 v1.1, whose head is its own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.checkpoints.parameters import Parameter
from ties_dist.dtypes import FLOATS
from ties_dist.inputs.alias_table import groups_of, linked
from ties_dist.inputs.configs import classes, is_scaled_by_tying, says_tied
from ties_dist.inputs.names import embedding_rank, is_embedding, is_head, matching
from ties_dist.messages import show

Same = Callable[[int, Parameter, Parameter], bool]
"""Whether two parameters of the n-th model are the same numbers."""
Named = tuple[tuple[str, ...], dict[str, str]]
"""Names of one parameter, and those of them that a model stores, each with what it stores it as."""
_LANGUAGE_MODEL = re.compile(r"CAUSAL_LM|SEQ_2_SEQ_LM|LM$|LMHead|ForConditionalGeneration|ForPreTraining")
"""Of transformers' classes, and of peft's tasks."""
OPTION = "tie_word_embeddings: false"


@dataclass(frozen=True, kw_only=True)
class Aliases:
    """canonical: of every other name of a parameter. written: the output's names of a parameter, where they are not
    just its canonical one. also: parameters that a model has by another's name, where it stores none of its own.

    notes, problems, advice: sentences.
    """

    canonical: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    also: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    def fold(self, model: Checkpoint) -> Checkpoint:
        """The model with every parameter under its canonical name alone; the same object where nothing changes."""
        parameters = dict(model.parameters)
        for name, best in self.canonical.items():  # the better one first
            if (found := parameters.pop(name, None)) is not None:
                parameters.setdefault(best, replace(found, name=best))
        for name, other in self.also.items():
            if name not in parameters and other in parameters:
                parameters[name] = replace(parameters[other], name=name)
        return replace(model, parameters=parameters) if parameters.keys() != model.parameters.keys() else model


def find_aliases(
    models: Sequence[Checkpoint], same: Same, *, exclude: Iterable[str] = (), untie: bool = False, kind: str = "expert"
) -> Aliases:
    """models: the base, then all whose weights are read. exclude: globs; a parameter is excluded by its canonical name.

    untie: whether a head is a parameter of its own though the base ties it. kind: what messages call an expert.
    """
    search = _Search(models, same, exclude, untie=untie, kind=kind)
    for component in search.components():
        search.settle(component)
    if untie:
        search.untie_all()
    return search.aliases()


def with_every_name(model: Checkpoint, wanted: Iterable[str], also_of: Iterable[str] = ()) -> Checkpoint:
    """The model with all the names that its class has for what an adapter changes: an adapter may move one of them.

    wanted: names of what the adapter has something for, as the model in memory has them. also_of: more classes.
    """
    if says_tied(model.config) is False:
        return model
    wanted = set(wanted)
    groups = _groups(model, [*classes(model.config), *also_of])
    lacking = [name for name in sorted(wanted) if model.find(name) is None and not any(name in g for g, _ in groups)]
    groups += [guess for name in lacking for guess in _guessed(name, model)]
    added: dict[str, Parameter] = {}
    for group, stored in groups:
        if wanted & {*group, *stored.values()}:
            source = model.parameters[min(stored.values(), key=_by_role)]
            for name in group:
                if name not in stored:
                    added.setdefault(name, replace(source, name=name))
    return replace(model, parameters={**model.parameters, **added}) if added else model


def lone_embedding(model: Checkpoint, wanted: Iterable[str], also_of: Iterable[str] = ()) -> str | None:
    """A token embedding that an adapter changes, of a language model whose head has no name that is known here.

    Such a model ties its head, or its output would be lost; with the embedding alone the adapter would move both.
    """
    made_for = [*classes(model.config), *also_of]
    if says_tied(model.config) is False or not any(_LANGUAGE_MODEL.search(name) for name in made_for):
        return None
    if any(is_head(name) for name in model.parameters) or groups_of(made_for):
        return None
    return next((name for name in sorted(wanted) if is_embedding(name)), None)


def _groups(model: Checkpoint, classes: Iterable[str]) -> list[Named]:
    """Names of what models of these classes have once, where this one stores any, with what it stores them as.

    Models with a head have the body's names behind one more word, which old checkpoints lack.
    """
    groups = [group.names for group in groups_of(classes)]
    exact = [(group, {n: n for n in group if n in model.parameters}) for group in groups]
    found = [(group, stored) for group, stored in exact if stored]
    if not found:
        behind = [(g, {n: f for n in g if (f := model.find(n)) is not None}) for g in groups]
        found = [(group, stored) for group, stored in behind if stored]
    return found


def _guessed(name: str, model: Checkpoint) -> Iterator[Named]:
    """What a name that a model of an unknown class lacks may be another one of: of an embedding, or of a head."""
    opposite = is_embedding if is_head(name) else is_head if is_embedding(name) else None
    if opposite is not None and (stored := [n for n in model.parameters if opposite(n)]):
        best = min(stored, key=_by_role)
        yield (best, name), {best: best}


def _by_role(name: str) -> tuple[object, ...]:
    return embedding_rank(name), natural(name)


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """To sort by: numbers in a name by their size."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))


class _Search:
    """The names of all models while it is decided which are one parameter's."""

    def __init__(
        self, models: Sequence[Checkpoint], same: Same, exclude: Iterable[str], *, untie: bool, kind: str
    ) -> None:
        self.models, self.base, self.same, self.untie, self.kind = models, models[0], same, untie, kind
        self.tied = says_tied(self.base.config)
        self.groups = _groups(self.base, classes(self.base.config)) if self.tied is not False else []
        self.own = [group for group, _ in self.groups]
        stored = {name for model in models for name, found in model.parameters.items() if found.dtype in FLOATS}
        self.excluded = matching(exclude, {*stored, *(name for group in self.own for name in group)})
        self.names = stored - (self.excluded - self.base.parameters.keys())  # what experts alone have is left out
        self.ranks: dict[str, int] = {}
        self.links: dict[str, set[str]] = defaultdict(set)
        self.canonical: dict[str, str] = {}
        self.written: dict[str, tuple[str, ...]] = {}
        self.also: dict[str, str] = {}
        self.notes: dict[str, None] = {}
        self.problems: dict[str, None] = {}
        self.advice: dict[str, None] = {}

    def aliases(self) -> Aliases:
        return Aliases(
            canonical=self.canonical,
            written=self.written,
            also=self.also,
            notes=tuple(self.notes),
            problems=tuple(self.problems),
            advice=tuple(self.advice),
        )

    # -- candidates ---------------------------------------------------------------------------------------------------

    def components(self) -> Iterator[list[str]]:
        """Sets of names that are linked with each other, the best name first."""
        table = [*linked(self.names), *self.own]
        for group in table:
            for rank, name in enumerate(group):
                self.ranks[name] = min(rank, self.ranks.get(name, rank))
        by_role = [n for n in self.names if (is_embedding(n) or is_head(n)) and self._is_matrix(n)]
        for names in [*table, by_role]:
            present = self.names & {*names}
            for name in present:
                self.links[name] |= present
        seen: set[str] = set()
        for name in sorted(self.links):
            if name not in seen:
                component = self._reach(name)
                seen |= component
                yield sorted(component, key=self._rank)

    def _is_matrix(self, name: str) -> bool:
        return any(name in m.parameters and len(m.parameters[name].shape) == 2 for m in self.models)

    def _reach(self, name: str) -> set[str]:
        found, front = {name}, {name}
        while front:
            front = {n for each in front for n in self.links[each]} - found
            found |= front
        return found

    def _rank(self, name: str) -> tuple[object, ...]:
        return embedding_rank(name), self.ranks.get(name, len(self.names)), natural(name)

    # -- which of them are one parameter ------------------------------------------------------------------------------

    def settle(self, component: Sequence[str]) -> None:
        parameters: list[list[str]] = []
        for name in component:
            home = next((names for names in parameters if self._belongs(name, names)), None)
            if home is None:
                parameters.append([name])
            else:
                home.append(name)
        for names in parameters:
            self._call(names, alone=len(parameters) == 1)
        for i, one in enumerate(parameters):
            for other in parameters[i + 1 :]:
                if any(self.links[name] & {*other} for name in one):
                    self._settle_apart(one, other)

    def _belongs(self, name: str, names: Sequence[str]) -> bool:
        if self.untie and self._is_head(name) and is_embedding(names[0]):
            return False
        return bool(self.links[name] & {*names}) and not self._differing(names, [name])

    def _differing(self, one: Sequence[str], other: Sequence[str]) -> list[int]:
        """Models that store two parameters as different numbers. one: with the better name."""
        return [i for i in range(len(self.models)) if self._differ(i, one, other)]

    def _differ(self, i: int, one: Sequence[str], other: Sequence[str]) -> bool:
        stored = self.models[i].parameters
        left, right = ([stored[name] for name in names if name in stored] for names in (one, other))
        if not left or not right or (i and one[0] in self.excluded):  # nothing of an expert's would be used
            return False
        return not self.same(i, left[0], right[0])

    def _is_head(self, name: str) -> bool:
        of_class = any(name in group and is_embedding(group[0]) for group in self.own)
        return not is_embedding(name) and (of_class or is_head(name))

    def _call(self, names: Sequence[str], *, alone: bool) -> None:
        """What a parameter of these names is called, and under which of them it is written."""
        written = [name for name in names if name in self.base.parameters]
        if not written:
            return
        known = (group for group in self.own if alone and not self.untie and {*group} & {*names})
        best = min([*names, *({n for group in known for n in group} - self.names)], key=self._rank)
        self.canonical |= {name: best for name in names if name != best}
        self._say_dropped(best, names)
        others = sorted((name for name in written if name != best), key=natural)
        if not others:
            return
        self.written[best] = (*([best] if best in written else []), *others)
        more = f" and {len(others) - 1:,} more names are" if len(others) > 1 else " is"
        self.notes[f"{show(others[0])}{more} tied to {show(best)} and counted once"] = None
        if best not in self.excluded and (said := sorted(self.excluded & {*others})):
            self.notes[f"exclude: {show(said[0])} is merged, as {show(best)} is, whose other name it is"] = None

    def _say_dropped(self, best: str, names: Sequence[str]) -> None:
        for model in self.models[1:]:
            stored = [name for name in names if name in model.parameters]
            for name in stored if len(stored) > 1 else ():
                if name not in self.base.parameters and name != best:
                    self.notes[f"{self.kind} '{model.name}': {show(name)}, tied to {show(best)}, is dropped"] = None

    # -- which are two, though they might be one ----------------------------------------------------------------------

    def _settle_apart(self, one: Sequence[str], other: Sequence[str]) -> None:
        """Candidates that some model tells apart. one: with the better name."""
        head = is_embedding(one[0]) and self._is_head(other[0])
        in_base = [[name for name in names if name in self.base.parameters] for names in (one, other)]
        if not any(in_base):
            return
        if all(in_base) and self._differ(0, one, other):
            if head and self.tied:
                said = "differ and are two parameters, though config.json says tie_word_embeddings: true"
                self.notes[f"{show(one[0])} and {show(other[0])} {said}"] = None
        elif head and self.untie:
            self._split(one, other)
        elif all(in_base) and (not head or self.tied is False):
            self.notes[f"{show(one[0])} and {show(other[0])} are equal in the base and two parameters"] = None
        elif (head and self.tied is not False) or any({*one} & {*g} and {*other} & {*g} for g in self.own):
            self._refuse(one, other, head)

    def _refuse(self, one: Sequence[str], other: Sequence[str], head: bool) -> None:
        """The base has one parameter for both, an expert has two."""
        pair = f"{show(one[0])} and {show(other[0])}"
        for i in self._differing(one, other):
            name = self.models[i].name
            self.problems[f"{self.kind} '{name}': {pair} differ, and are one parameter in the base."] = None
        best = self.canonical.get(one[0], one[0])
        self.canonical |= {name: best for name in (*one, *other) if name != best}  # nothing more is wrong with them
        if head and not is_scaled_by_tying(self.base.config):
            advice = f"`{OPTION}` in `ties_dist:` makes the head a parameter of its own, and config.json say so."
        elif head:
            advice = (
                "Models of this family scale their output by `tie_word_embeddings`, so they stay tied: "
                f"`exclude: ['{best}']` keeps the base's embedding and head."
            )
        else:
            advice = f"`exclude: ['{best}']` keeps the base's."
        self.advice[advice] = None

    # -- heads that are untied ----------------------------------------------------------------------------------------

    def _split(self, embedding: Sequence[str], head: Sequence[str]) -> None:
        """Two parameters; a model that stores one of them has its numbers for both."""
        one, other = (self.canonical.get(names[0], names[0]) for names in (embedding, head))
        self.also |= {one: other, other: one}
        for best, names in ((one, embedding), (other, head)):
            if not any(name in self.base.parameters for name in names):
                self.canonical |= {name: best for name in names if name != best}
                self.written[best] = (best,)
        self.notes[f"{show(other)} is a parameter of its own ({OPTION})"] = None

    def untie_all(self) -> None:
        """Find the head by the base's class where nobody stores one; then write all names that the class has.

        Loaders of such a model tie nothing of it any more: not the encoder's embedding, no bias.
        """
        if is_scaled_by_tying(self.base.config):
            self.problems[f"`{OPTION}`: models of this family scale their output by that key. Leave it out."] = None
            return
        for group, stored in self.groups if not self.also else ():
            heads, embeddings = [[n for n in group if self._is_head(n)], [n for n in group if is_embedding(n)]]
            if heads and embeddings and not self.also:
                self._split(*([stored[n] for n in names if n in stored] or names[:1] for names in (embeddings, heads)))
        if not self.also:
            self.problems[f"`{OPTION}`: no head is known that the base ties to its embedding. Leave it out."] = None
        for group, stored in self.groups if self.also else ():
            for name in group:
                if name not in stored:
                    self._write_also(name, next(iter(stored.values())))

    def _write_also(self, name: str, found: str) -> None:
        best = self.canonical.get(found, found)
        if (is_embedding(best) and self._is_head(name)) or (not is_embedding(best) and is_embedding(name)):
            best = self.also.get(best, best)
        names = self.written.get(best, (best,))
        if name not in names:
            self.written[best] = (*names, name)
