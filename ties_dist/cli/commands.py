"""The command line. Imports nothing heavy before a command runs: `--help` answers in a fraction of a second.

click, because it is small, fast to import, and its exit status and help text can be given exactly.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ties_dist.cli.checking import check_command
from ties_dist.cli.mergekit import understands_mergekit
from ties_dist.cli.options import TALK, alone, takes
from ties_dist.cli.terminal import (
    SIGINT_STATUS,
    SIGPIPE_STATUS,
    done,
    drop_output,
    endable,
    log,
    open_streams,
    pass_over,
    progress,
    say,
    signals,
    tell,
    tell_error,
)
from ties_dist.errors import OutputError, TiesDistError, printable
from ties_dist.messages import reason
from ties_dist.planning.keywords import AnalyzeKeywords, MergeKeywords, PlanKeywords, SweepKeywords
from ties_dist.planning.options import Cluster, RunOptions

if TYPE_CHECKING:
    from ties_dist.statistics.collected import Kind


class Commands(click.Group):
    """Ends as a command should whose reader has seen enough (`ties-dist plan ... | head`)."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            found = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            drop_output()
            ctx.exit(SIGPIPE_STATUS)
        return found


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ties-dist", message="%(version)s")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    envvar="TIES_DIST_LOG_FORMAT",
    help="Of what is said on stderr; json: one object a line, for log collectors.  [default: text]",
)
def cli(log_format: str) -> None:
    """Merge fine-tuned checkpoints that do not fit in memory: exact, bounded, resumable."""


cli.add_command(check_command)


@cli.command("merge")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@takes(MergeKeywords)
@TALK
@understands_mergekit
def merge_command(
    recipe: Path,
    out: Path,
    options: MergeKeywords,
    as_json: bool,
    verbose: int,
    quiet: bool,
    answers: list[str],
) -> None:
    """Merge the models of RECIPE into the folder OUT; resumes an interrupted merge by itself.

    The flags of mergekit-yaml are understood, too.
    """
    if options["executor"] != "ray" and options["cluster"] != Cluster():
        raise click.UsageError(
            "--address, --workers, --worker-timeout, --worker-resource and --node-label go with --executor ray."
        )
    log(verbose, quiet)
    say(quiet, answers)
    with signals() as stop:
        from ties_dist.api import merge
        from ties_dist.cli.tables import merge_table

        with redirect_stdout(sys.stderr):  # Ray prints what its nodes say
            report = merge(recipe, out, stop=stop, progress=progress(quiet), told=partial(say, quiet), **options)
    with done():
        if as_json:
            click.echo(report.to_json())
        elif not quiet:
            merge_table(report, out, tensors=bool(verbose))


@cli.command("submit", context_settings={"ignore_unknown_options": True})
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("merge_options", nargs=-1, type=click.UNPROCESSED)
@click.option("--address", required=True, metavar="URL", help="Of the cluster's dashboard: http://HEAD:8265.")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    help="The folder on the cluster that RECIPE and OUT are relative to.  [default: the working directory here]",
)
@click.option("--wait", is_flag=True, help="Follow the log to the end; exit as the merge does.")
def submit_command(
    recipe: Path, out: Path, merge_options: tuple[str, ...], address: str, root: Path | None, wait: bool
) -> None:
    """Merge RECIPE into OUT on a Ray cluster, as a job of it. Options of `merge` may follow.

    Who submits the same again is attached to the job that runs, or resumes where it ended.
    """
    log(0, quiet=False)
    # A misspelt option is found here, not in the log of a job.
    above = click.get_current_context().parent
    with merge_command.make_context("merge", [str(recipe), str(out), *merge_options], parent=above) as parsed:
        if (parsed.params["recipe"], parsed.params["out"]) != (recipe, out):
            raise click.UsageError("RECIPE and OUT come first, options of `merge` after them.")
        cache = parsed.params["cache_dir"]
    place = Path.cwd() / (root or "")
    if cache is not None:
        merge_options = (*merge_options, "--cache-dir", str(place / cache))
    from ties_dist.executors.ray import job_client
    from ties_dist.executors.submit import entrypoint, follow, submit

    client = job_client(address)
    job = submit(client, entrypoint(recipe, out, place, merge_options), recipe=place / recipe)
    click.echo(f"{'attached to' if job.attached else 'submitted'} {job.id}", err=True)
    if wait:
        sys.exit(follow(client, job.id, partial(click.echo, nl=False)))
    click.echo(job.id)


@cli.command("status")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def status_command(out: Path, as_json: bool) -> None:
    """How far the merge into OUT is, running or not; from any machine that sees OUT."""
    from ties_dist.output.status import describe, status
    from ties_dist.storage.local_place import LocalPlace

    if not out.exists():
        raise OutputError(f"{out} does not exist: nothing was merged there.")
    found = status(LocalPlace(out))
    click.echo(json.dumps(asdict(found), indent=2) if as_json else printable(describe(found)))


@cli.command("sweep")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--density", metavar="VALUES", help="Like 0.1,0.2,0.3 or 0.1:0.3:0.1 (from:to:step).")
@click.option("--lambda", "lam", metavar="VALUES", help="The same for lambda.")
@takes(SweepKeywords)
@TALK
def sweep_command(
    recipe: Path,
    out: Path,
    density: str | None,
    lam: str | None,
    options: SweepKeywords,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Merge RECIPE with every density and lambda, from one read of the inputs, into folders under OUT.

    Each holds what its own merge would write. An interrupted sweep is resumed by the same command.
    """
    log(verbose, quiet)
    with signals() as stop:
        from ties_dist.cli.tables import sweep_table
        from ties_dist.sweeping.sweeping import parse_values, sweep

        swept = sweep(
            recipe,
            out,
            density=parse_values(density, "density") if density else (),
            lam=parse_values(lam, "lambda") if lam else (),
            stop=stop,
            progress=progress(quiet),
            told=partial(say, quiet),
            **options,
        )
    with done():
        if as_json:
            documents = [{"out": str(s.path), "values": s.variant.values, "report": asdict(s.report)} for s in swept]
            click.echo(json.dumps(documents, indent=2))
        elif not quiet:
            sweep_table(swept)


@cli.command("plan")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@takes(PlanKeywords)
@click.option("--sample", is_flag=True, help="Read some pages; predict thresholds, kept shares and time.")
@TALK
def plan_command(
    recipe: Path, out: Path | None, options: PlanKeywords, sample: bool, as_json: bool, verbose: int, quiet: bool
) -> None:
    """What merging RECIPE will read, write and need, from the checkpoints' headers."""
    log(verbose, quiet)
    from ties_dist.api import plan
    from ties_dist.cli.tables import plan_table

    with endable():
        report = plan(recipe, out, sample=sample, **options)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
    else:
        say(quiet, report.notes)
        plan_table(report)


@cli.command("analyze")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="A folder for report.html, a page with charts, and analysis.json."
)
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    help="Of the figures by parameter, layer and tensor.  [default: the recipe's, else 0.2]",
)
@takes(AnalyzeKeywords)
@TALK
def analyze_command(
    recipe: Path,
    out: Path | None,
    density: float | None,
    options: AnalyzeKeywords,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """How the experts of RECIPE differ from their base and from each other, from one read of them."""
    log(verbose, quiet)
    with signals() as stop:
        from ties_dist.analysis.analyzing import analyze, to_json
        from ties_dist.cli.tables import analysis_table

        found = analyze(
            recipe,
            out,
            density=density,
            stop=stop,
            progress=progress(quiet),
            told=partial(say, quiet),
            **options,
        )
    if as_json:
        click.echo(to_json(found))
    elif not quiet:
        analysis_table(found, detailed=bool(verbose))


@cli.command("verify")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--sample",
    type=click.FloatRange(0, 1),
    help="Share of units to merge again, 0 for none.  [default: 0.02, or 0 where the inputs are gone]",
)
@click.option("--sha256", is_flag=True, help="Print sha256 sums of the shards.")
@alone("memory_budget", "For the buffers of what is merged again.")
@alone("allow_external_methods", "Merge the sample again also by code of other packages.")
@TALK
def verify_command(
    out: Path,
    sample: float | None,
    sha256: bool,
    memory_budget: int,
    allow_external_methods: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Read OUT again and compare it with its manifest; merge a random sample again and compare."""
    log(verbose, quiet)
    with endable():
        from ties_dist.engine.verify import summary, verify
        from ties_dist.storage.local_place import LocalPlace

        options = RunOptions(memory_budget=memory_budget, allow_external_methods=allow_external_methods)
        report = verify(LocalPlace(out), options, sample=sample, sha256=sha256, progress=progress(quiet))
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
    else:
        for name, value in report.sha256.items():
            click.echo(printable(f"{value}  {name}"))
        click.echo(printable(summary(report)))
        for doubt in report.doubts:
            click.echo(printable(doubt))


@cli.command("collect")
@click.argument("kind", type=click.Choice(["fisher", "gram"]))
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Examples, one JSON object a line.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="STORE", help="Where to; resumes there.")
@click.option("--model", metavar="P.M:F", help="A function of yours that makes the model.  [default: by transformers]")
@click.option("--examples", type=click.IntRange(min=1), help="Use the first so many.  [default: all]")
@click.option("--max-length", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of a text.")
@alone("memory_budget", "For what is collected, beside the model.")
@click.option("--device", default="cpu", show_default=True, help="Of torch: cpu, cuda, cuda:1, ...")
@click.option("--fresh", is_flag=True, help="Discard what stands in STORE.")
@TALK
def collect_command(
    kind: Kind,
    checkpoint: Path,
    data: Path,
    out: Path,
    model: str | None,
    examples: int | None,
    max_length: int,
    memory_budget: int,
    device: str,
    fresh: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Run CHECKPOINT over examples, for what `fisher` and `regmean` have to know of it."""
    log(verbose, quiet)
    with signals() as stop:
        from ties_dist.collecting.collect import collect

        store = collect(
            kind,
            checkpoint,
            data,
            out,
            model=model,
            examples=examples,
            max_length=max_length,
            memory_budget=memory_budget,
            device=device,
            fresh=fresh,
            stop=stop,
            progress=progress(quiet),
        )
    found = {"kind": store.origin.kind, "arrays": len(store.arrays), "examples": store.origin.examples}
    with done():
        if as_json:
            click.echo(json.dumps(found | {"store": str(store.path)}, indent=2))
        elif not quiet:
            text = f"{store.path}: {found['kind']} of {found['arrays']} tensors from {found['examples']} examples"
            click.echo(printable(text))


@cli.command("methods")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def methods_command(as_json: bool) -> None:
    """Every merge method: its parameters, their defaults, and how often it reads the inputs."""
    from ties_dist.cli.tables import methods_document, methods_table

    if as_json:
        click.echo(json.dumps(methods_document(), indent=2))
    else:
        methods_table()


@cli.command("inspect")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@TALK
def inspect_command(checkpoint: Path, as_json: bool, verbose: int, quiet: bool) -> None:
    """What a checkpoint holds, from its headers."""
    log(verbose, quiet)
    from ties_dist.checkpoints.catalogue import open_checkpoint
    from ties_dist.cli.tables import inspect_document, inspect_table
    from ties_dist.storage.readers import open_reader

    found = open_checkpoint(checkpoint, name=checkpoint.name or str(checkpoint), reader=open_reader)
    if as_json:
        click.echo(json.dumps(inspect_document(found), indent=2))
    else:
        inspect_table(found)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: maps the package's errors to exit statuses, without a traceback."""
    # Before torch loads: OpenMP threads that spin between kernels take the cores from those that read and write.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Importing and compiling allocate millions of objects that stay: collecting them costs a second of a merge.
    gc.set_threshold(200_000, 50, 50)
    open_streams()
    sys.unraisablehook = pass_over
    try:
        status = cli.main(arguments, prog_name="ties-dist", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(SIGINT_STATUS)
    except KeyboardInterrupt:
        sys.exit(SIGINT_STATUS)
    except TiesDistError as error:
        tell_error(error)
        sys.exit(error.exit_status)
    except (OSError, MemoryError) as error:
        tell(logging.ERROR, f"{type(error).__name__}: {reason(error)}")
        sys.exit(TiesDistError.exit_status)


def console() -> None:
    """`main` for a process of its own: ends it at once, whatever the compiler's threads are still doing."""
    try:
        main()
    except SystemExit as end:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # was told, or cannot be
                stream.flush()
        os._exit(end.code if isinstance(end.code, int) else 1 if end.code else 0)
