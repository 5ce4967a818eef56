"""`luthier data`: a look at data before a study uses them. Imports nothing heavy until its command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.console import OK, PREFLIGHT

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at data before a study uses them.")


@data_app.command("check")
def data_check(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="Folder, Parquet or .npz file.")],
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Label column of Parquet files.")] = None,
    fail_on_leak: Annotated[bool, typer.Option("--fail-on-leak", help="Exit 4 if splits share an image.")] = False,
) -> None:
    """Explain what is found: domains, classes, counts, sizes, unreadable files, duplicates across splits."""
    from orchestrator.ingest.check import check
    from orchestrator.running.progress import shown

    with shown() as progress:
        report = check(path, progress=progress, label=label, fail_on_leak=fail_on_leak)
    context.obj.result(report.to_dict(), report.render)
    raise typer.Exit(PREFLIGHT if report.problems else OK)
