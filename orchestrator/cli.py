"""The `luthier` command. Imports neither torch nor ray: each command loads what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.command_group import Commands
from orchestrator.commands.console import FAILED, OK, PARTIAL, Output
from orchestrator.commands.data import data_app

EXIT_CODES = (
    "Exit codes: 0 ok, 1 failed, 2 usage (command line or study file), 3 partial (some trials failed), "
    "4 preflight (the study could not run here), 130 interrupted, 143 terminated."
)

app = typer.Typer(
    name="luthier",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="The study file (docs/study.md).")]
StudyPlace = Annotated[Path, typer.Argument(metavar="STUDY", help="The study file, or the folder of a study.")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"luthier {version('luthier')}")
        raise typer.Exit(OK)


@app.callback()
def options(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Data on stdout as JSON, logs on stderr.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks and more logs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find out which way of fine-tuning a pretrained vision model works best on your data.

    --json and -v may stand anywhere on the command line.
    """
    context.obj = Output(as_json, verbose)
    context.with_resource(context.obj.opened())


@app.command()
def init(
    context: typer.Context,
    data: Annotated[Path | None, typer.Argument(help="Your images. Left out: the built-in digits.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("study.yaml"),
    model: Annotated[str | None, typer.Option(help="A timm model name.")] = None,
    name: Annotated[str | None, typer.Option(help="The study's name. Default: that of the data.")] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Label column of Parquet files.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented study file for your data."""
    from orchestrator.commands.init import announced, write_study

    written = write_study(data, output, model=model, name=name, label=label, force=force)
    context.obj.result(written, announced(written))


@app.command()
def plan(context: typer.Context, study: StudyFile = Path("study.yaml")) -> None:
    """Check a study and show what it would do and cost. Nothing is spent."""
    from orchestrator.study import Study

    planned = Study.from_yaml(study).plan()
    context.obj.result(planned.to_dict(), planned.render)


@app.command()
def run(
    context: typer.Context,
    study: StudyFile = Path("study.yaml"),
    progress: Annotated[bool, typer.Option(help="Show a live table, or a line per event.")] = True,
    allow_change: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Continue although this key has changed. May be repeated.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only look whether the study's folder is whole.")] = False,
) -> None:
    """Run a study, or continue it: on the cluster of RAY_ADDRESS, else on this machine."""
    from orchestrator.commands.outcome import finished, outcome_code
    from orchestrator.running.tracking_process import study_backlog
    from orchestrator.study import Study

    it = Study.from_yaml(study)
    if check:
        from orchestrator.commands.check import check_study

        found = check_study(it)
        context.obj.result(found.to_dict(), found.render)
        raise typer.Exit(OK if found.sound else FAILED)
    results = it.run(progress=progress, allow_change=allow_change or ())
    told = {"folder": str(it.folder), "tracking": {"missing": study_backlog(it.spec, it.folder).to_dict()}}
    context.obj.result({**results.to_dict(), **told}, lambda console: finished(console, it, results))
    raise typer.Exit(outcome_code(results.records))


@app.command()
def fsr(
    context: typer.Context,
    study: StudyFile = Path("study.yaml"),
    progress: Annotated[bool, typer.Option(help="Show a live table, or a line per event.")] = True,
    allow_change: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Continue although this key has changed. May be repeated.")
    ] = None,
) -> None:
    """Measure how well the training images represent the target (FSR), and the λ that follows from it."""
    from orchestrator.commands.fsr import measure_fsr
    from orchestrator.commands.outcome import outcome_code
    from orchestrator.study import Study

    found = measure_fsr(Study.from_yaml(study), progress=progress, allow_change=allow_change or ())
    context.obj.result(found.to_dict(), found.render)
    raise typer.Exit(outcome_code(found.records))


@app.command()
def status(context: typer.Context, study: StudyPlace = Path("study.yaml")) -> None:
    """Show where a study stands, from its journal alone."""
    from orchestrator.commands.status import status as status_of

    now = status_of(study)
    context.obj.result(now.to_dict(), now.render)


@app.command()
def results(context: typer.Context, study: StudyPlace = Path("study.yaml")) -> None:
    """Show the leaderboard, what the study found, and warnings, from the journal alone."""
    from orchestrator.commands.status import find_study, read_journal
    from orchestrator.record.records import fold, measurements
    from orchestrator.results.study_results import Results

    spec, folder = find_study(study)
    events = read_journal(spec, folder)
    found = Results(fold(events), spec, measurements=measurements(events))
    context.obj.result({**found.to_dict(), "folder": str(folder)}, found.render)


@app.command()
def report(
    context: typer.Context,
    study: StudyPlace = Path("study.yaml"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write. Default: report.html in the folder.")
    ] = None,
) -> None:
    """Write a study as one HTML page that opens anywhere, from the journal alone."""
    from orchestrator.commands.status import find_study, read_journal
    from orchestrator.report.page import REPORT, write_report

    spec, folder = find_study(study)
    place = output or folder / REPORT
    write_report(read_journal(spec, folder), place)
    told = f"Wrote {place}"
    context.obj.result({"report": str(place)}, lambda console: console.print(told, markup=False, soft_wrap=True))


@app.command()
def sync(
    context: typer.Context,
    study: StudyPlace = Path("study.yaml"),
    tracking_uri: Annotated[
        str | None, typer.Option(metavar="URI", help="Deliver to this server instead of the study's own.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every number with the server's.")] = False,
    give_up: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="Stop when the server takes nothing for so long.")
    ] = 60.0,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Draw the curves of every complete trial, not only of the best.")
    ] = False,
) -> None:
    """Deliver to MLflow what it lacks of a study, from its journal. Adds nothing twice."""
    from orchestrator.commands.sync import sync as deliver

    done = deliver(study, tracking_uri, verify, give_up, pictures)
    context.obj.result(done.to_dict(), done.render)
    raise typer.Exit(OK if done.whole else FAILED)


@app.command()
def demo(
    context: typer.Context,
    storage: Annotated[Path, typer.Option(help="Folder for the demo's studies.")] = Path("studies"),
    trials: Annotated[int, typer.Option(min=4, help="Search trials of each of the two studies.")] = 12,
    progress: Annotated[bool, typer.Option(help="Show a live table, or a line per event.")] = True,
) -> None:
    """Tune two small networks on real digits with five strategies: no data, network or GPU needed."""
    from rich.console import Console

    from orchestrator.commands.demo import run_demo
    from orchestrator.commands.outcome import outcome_code

    console = Console(stderr=context.obj.as_json)
    outcomes = run_demo(storage, trials=trials, progress=progress, console=console)
    if context.obj.as_json:
        context.obj.result({"studies": [found.to_dict() for found in outcomes]}, lambda console: None)
    codes = {outcome_code(found.records) for found in outcomes}
    raise typer.Exit(FAILED if FAILED in codes else PARTIAL if PARTIAL in codes else OK)


@app.command()
def submit(
    context: typer.Context,
    study: StudyFile = Path("study.yaml"),
    address: Annotated[str | None, typer.Option(help="http://HOST:8265. Default: RAY_API_SERVER_ADDRESS.")] = None,
    follow: Annotated[bool, typer.Option(help="Print the job's output and return its exit code.")] = True,
    stop_on_interrupt: Annotated[
        bool | None,
        typer.Option("--stop-on-interrupt/--leave-on-interrupt", help="What Ctrl-C does to the job. Default: ask."),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Send it even to a cluster that asks no token.")] = False,
) -> None:
    """Send a study to a cluster as a Ray job."""
    import sys

    from orchestrator.commands.submit import submit as send

    out = sys.stderr if context.obj.as_json else sys.stdout
    code = send(
        study, address, follow=follow, stop_on_interrupt=stop_on_interrupt, insecure=insecure, out=out, notes=sys.stderr
    )
    if context.obj.as_json:
        context.obj.result({"study": str(study), "exit_code": code}, lambda console: None)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
