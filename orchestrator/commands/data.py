"""`luthier data`: inspect data before a study uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.exit_status import OK, PREFLIGHT

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Inspect data before a study uses them.")


@data_app.command("check")
def data_check(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="Folder, Parquet or .npz file.")],
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Label column of Parquet files.")] = None,
    fail_on_leak: Annotated[bool, typer.Option("--fail-on-leak", help="Exit 4 if splits share an image.")] = False,
) -> None:
    """Summarise a data set: domains, classes, counts, sizes, unreadable files, duplicates across splits."""
    from orchestrator.ingest.check import check
    from orchestrator.running.progress import ingest_progress

    with ingest_progress() as progress:
        report = check(path, progress=progress, label=label, fail_on_leak=fail_on_leak)
    context.obj.result(report.to_dict(), report.render)
    raise typer.Exit(PREFLIGHT if report.problems else OK)
