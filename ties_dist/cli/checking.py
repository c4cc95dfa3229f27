"""`ties-dist check`: a recipe read without its models."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ties_dist.cli.options import alone

if TYPE_CHECKING:
    from ties_dist.recipe.checking import Checked, Effective


@click.command("check")
@click.argument("recipe", type=click.Path(path_type=Path))
@alone("semantics", "Whose TIES: paper, mergekit or peft.")
@click.option("--tensor", "tensors", multiple=True, metavar="NAME", help="Show a tensor's numbers; repeatable.")
@click.option("--layers", type=click.IntRange(min=1), help="Of the models, for layer gradients.")
@click.option("--like", type=click.Path(path_type=Path), metavar="MODEL", help="A model with their layers and tensors.")
@alone("allow_external_methods", "Read `merge_method: package.module:Class` of other packages, which runs their code.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def check_command(
    recipe: Path,
    semantics: str | None,
    tensors: tuple[str, ...],
    layers: int | None,
    like: Path | None,
    allow_external_methods: bool,
    as_json: bool,
) -> None:
    """Whether RECIPE is valid, what it means, and what mergekit would do differently; needs none of its models.

    Exits with 0 where it is valid, else with 2.
    """
    from ties_dist.checkpoints.catalogue import open_checkpoint
    from ties_dist.methods.known import known_methods
    from ties_dist.recipe.checking import check_recipe
    from ties_dist.storage.readers import open_reader

    if layers is not None and like is not None:
        raise click.UsageError("--layers and --like say the same; give one of them.")
    model = open_checkpoint(like, name=like.name or str(like), reader=open_reader) if like is not None else None
    found = check_recipe(
        recipe,
        methods=known_methods(allow_external=allow_external_methods),
        semantics=semantics,
        tensors=tensors,
        layers=layers,
        like=list(model.parameters) if model is not None else None,
    )
    if as_json:
        click.echo(json.dumps({"valid": found.valid, **asdict(found)}, indent=2))
    else:
        show(found)
    sys.exit(0 if found.valid else 2)


def show(found: Checked) -> None:
    from rich.table import Table

    from ties_dist.cli.console import console_of

    console = console_of()
    if not found.valid:
        count = "1 problem" if len(found.problems) == 1 else f"{len(found.problems)} problems"
        for line in (f"{count} in {found.title}:", *(f"  {problem}" for problem in found.problems)):
            console.print(line, soft_wrap=True)
        return
    into = f" into {found.base}" if found.base else ""
    console.print(f"{found.title} is valid: {found.method}, semantics {found.semantics}", soft_wrap=True)
    console.print(f"merges {', '.join(found.models)}{into}", soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for difference in found.mergekit or ("do the same",):
        console.print(f"mergekit would {difference}", soft_wrap=True)
    for each in found.tensors:
        depth = "" if each.depth is None else f", depth {each.depth:.4g}"
        table = Table("model", "parameter", "value", "set by", title=f"{each.tensor}{depth}", title_justify="left")
        for number in each.numbers:
            table.add_row(number.model or "", number.parameter, _value(number), _set_by(number))
        console.print(table)


def _value(number: Effective) -> str:
    if number.value is None:
        return "by layer: give --layers" if number.points else "none"
    return str(number.value).lower() if isinstance(number.value, bool) else f"{number.value:g}"


def _set_by(number: Effective) -> str:
    by_filter = f", filter {number.filter}" if number.filter is not None else ""
    gradient = f", gradient of {len(number.points)} points" if number.points else ""
    return f"{number.set_by}{by_filter}{gradient}"
