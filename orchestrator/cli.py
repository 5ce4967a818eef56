"""The `luthier` command. Imports neither torch nor ray: each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.commands.command_group import Commands
from orchestrator.commands.console import Output
from orchestrator.commands.data import data_app
from orchestrator.commands.exit_status import FAILED, OK, PARTIAL, of_trials, worst

EXIT_CODES = (
    "Exit codes: 0 ok, 1 failed, 2 usage (command line or study file), 3 partial (some trials or images failed), "
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
StudyFileOrFolder = Annotated[Path, typer.Argument(metavar="STUDY", help="The study file, or the folder of a study.")]
Progress = Annotated[bool, typer.Option(help="Show a live table, or a line per event.")]
AllowChange = Annotated[
    list[str] | None, typer.Option(metavar="KEY", help="Continue although this key has changed. May be repeated.")
]


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        typer.echo(f"luthier {version('luthier')}")
        raise typer.Exit(OK)


def _reject_check(requested: bool) -> None:
    if requested:
        raise typer.BadParameter("checking a study's folder is a command of its own: luthier check STUDY")


@app.callback()
def options(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Data on stdout as JSON, logs on stderr.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks and more logs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find out which way of fine-tuning a pretrained vision model works best on your data.

    --json and -v are accepted in any position.
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
    progress: Progress = True,
    allow_change: AllowChange = None,
    check: Annotated[bool, typer.Option("--check", callback=_reject_check, is_eager=True, hidden=True)] = False,
) -> None:
    """Run a study, or continue it: on the cluster of RAY_ADDRESS, else on this machine."""
    from orchestrator.commands.run_summary import print_summary
    from orchestrator.running.tracking_process import study_backlog
    from orchestrator.study import Study

    opened = Study.from_yaml(study)
    finished = opened.run(progress=progress, allow_change=allow_change or ())
    data = {
        **finished.to_dict(),
        "folder": str(opened.folder),
        "tracking": {"missing": study_backlog(opened.spec, opened.folder).to_dict()},
    }
    context.obj.result(data, lambda console: print_summary(console, opened, finished))
    raise typer.Exit(of_trials(finished.records))


@app.command()
def check(context: typer.Context, study: StudyFile = Path("study.yaml")) -> None:
    """Verify everything in a study's folder and show what a run would continue with. Changes nothing."""
    from orchestrator.commands.check import check_study
    from orchestrator.study import Study

    checked = check_study(Study.from_yaml(study))
    context.obj.result(checked.to_dict(), checked.render)
    raise typer.Exit(OK if checked.sound else FAILED)


@app.command()
def fsr(
    context: typer.Context,
    study: StudyFile = Path("study.yaml"),
    progress: Progress = True,
    allow_change: AllowChange = None,
) -> None:
    """Measure how well the training images represent the target (FSR), and the λ that follows from it."""
    from orchestrator.commands.fsr import measure_fsr
    from orchestrator.study import Study

    measured = measure_fsr(Study.from_yaml(study), progress=progress, allow_change=allow_change or ())
    context.obj.result(measured.to_dict(), measured.render)
    raise typer.Exit(of_trials(measured.records))


@app.command()
def status(context: typer.Context, study: StudyFileOrFolder = Path("study.yaml")) -> None:
    """Show a study's progress, from its journal alone."""
    from orchestrator.commands.status import status as status_of

    current = status_of(study)
    context.obj.result(current.to_dict(), current.render)


@app.command()
def results(context: typer.Context, study: StudyFileOrFolder = Path("study.yaml")) -> None:
    """Show leaderboard, findings and warnings, from the study's folder alone; with --json also every trial."""
    from orchestrator.commands.status import find_study, read_journal
    from orchestrator.record.records import fold, measurements
    from orchestrator.results.study_results import Results

    spec, folder = find_study(study)
    events = read_journal(spec, folder)
    study_results = Results(fold(events), spec, measurements=measurements(events), folder=folder)
    context.obj.result({**study_results.to_dict(), "folder": str(folder)}, study_results.render)


@app.command()
def report(
    context: typer.Context,
    study: StudyFileOrFolder = Path("study.yaml"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write. Default: report.html in the folder.")
    ] = None,
    features: Annotated[
        Literal["chosen", "all"] | None,
        typer.Option(
            help="Show the pictures whose features moved most and least from the pretrained network; computes the "
            "features of ID test and OOD, of the chosen entry or of all."
        ),
    ] = None,
    progress: Progress = True,
) -> None:
    """Write a study as one self-contained HTML page, from its folder alone."""
    from orchestrator.commands.report import report_study

    written = report_study(study, output, features, progress)
    context.obj.result(written.to_dict(), written.render)


@app.command()
def export(
    context: typer.Context,
    to: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; new or empty.")],
    study: StudyFileOrFolder = Path("study.yaml"),
    trial: Annotated[int | None, typer.Option(metavar="N", help="Number of a trial. Default: the chosen one.")] = None,
    entry: Annotated[
        str | None, typer.Option(metavar="LABEL", help="The chosen configuration of this entry of the study.")
    ] = None,
    format_name: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="timm, onnx, torch_export, mlflow, peft.")
    ] = "timm",
    refit: Annotated[
        bool, typer.Option("--refit", help="Train the configuration once more, on training and validation pictures.")
    ] = False,
) -> None:
    """Export a trained model with its classes, preprocessing and model card; compared before it counts."""
    from orchestrator.commands.export import export_study

    exported = export_study(
        study,
        to,
        trial=trial,
        entry=entry,
        format_name=format_name,
        refit=refit,
        on_unit=lambda unit, units: typer.echo(f"Refit: unit {unit} of {units}", err=True),
    )
    context.obj.result(exported.to_dict(), exported.render)


@app.command()
def predict(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `luthier export` has written.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Files, folders, or a data store.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, of a classifier: .csv or .parquet.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write, of a segmentation model; new or empty.")
    ] = None,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write the pictures under the colours of their masks.")
    ] = False,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split of a data store.")] = "test",
    domain_report: Annotated[
        bool, typer.Option("--domain-report", help="Compare with the classes that the folders are named after.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images (views) per forward pass. Default: 64, of masks 16.")
    ] = None,
    progress: Progress = True,
) -> None:
    """Predict the classes of images, or their masks, with an exported model. Exit code 3 if some cannot be read."""
    from orchestrator.commands.predict import predict as predict_images

    predicted = predict_images(
        model,
        images,
        output,
        to=to,
        overlay=overlay,
        split=split,
        domain_report=domain_report,
        batch_size=batch_size,
        progress=progress,
    )
    context.obj.result(predicted.to_dict(), predicted.render)
    raise typer.Exit(OK if predicted.complete else PARTIAL)


@app.command()
def sync(
    context: typer.Context,
    study: StudyFileOrFolder = Path("study.yaml"),
    tracking_uri: Annotated[
        str | None, typer.Option(metavar="URI", help="Deliver to this server instead of the study's own.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every number with the server's.")] = False,
    give_up: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="Stop after this long without progress.")
    ] = 60.0,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Draw the curves of every complete trial, not only of the best.")
    ] = False,
) -> None:
    """Deliver to MLflow what it lacks of a study, from its journal. Idempotent."""
    from orchestrator.commands.sync import sync as deliver

    delivered = deliver(study, tracking_uri, verify, give_up, pictures)
    context.obj.result(delivered.to_dict(), delivered.render)
    raise typer.Exit(OK if delivered.whole else FAILED)


@app.command()
def prune(
    context: typer.Context,
    study: StudyFileOrFolder = Path("study.yaml"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
) -> None:
    """Remove the kept weights and predictions of a study. Its record, results and report stay."""
    from orchestrator.commands.prune import prune as remove

    removed = remove(study, dry_run)
    context.obj.result(removed.to_dict(), removed.render)


@app.command()
def demo(
    context: typer.Context,
    storage: Annotated[Path, typer.Option(help="Folder for the demo's studies.")] = Path("studies"),
    trials: Annotated[int, typer.Option(min=4, help="Search trials of each study.")] = 12,
    task: Annotated[
        Literal["classification", "segmentation"], typer.Option(help="What is learned.")
    ] = "classification",
    progress: Progress = True,
) -> None:
    """Compare strategies on small networks and real digits: no data, network or GPU needed."""
    from rich.console import Console

    from orchestrator.commands.demo import run_demo

    console = Console(stderr=context.obj.as_json)
    studies = run_demo(storage, trials=trials, progress=progress, console=console, task=task)
    if context.obj.as_json:
        context.obj.result({"studies": [finished.to_dict() for finished in studies]}, lambda console: None)
    raise typer.Exit(worst(of_trials(finished.records) for finished in studies))


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
    insecure: Annotated[bool, typer.Option("--insecure", help="Also to a cluster without authentication.")] = False,
) -> None:
    """Submit a study to a cluster as a Ray job."""
    from orchestrator.commands.submit import submit as send

    code = send(
        study,
        address,
        follow=follow,
        stop_on_interrupt=stop_on_interrupt,
        insecure=insecure,
        out=sys.stderr if context.obj.as_json else sys.stdout,
        notes=sys.stderr,
    )
    if context.obj.as_json:
        context.obj.result({"study": str(study), "exit_code": code}, lambda console: None)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
