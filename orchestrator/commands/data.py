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
    task: Annotated[
        str | None,
        typer.Option(help="classification or segmentation; by default the latter where there are masks."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="MAP", help="Classes of masks: name=value,… or a label file or cityscapes."),
    ] = None,
    ignore: Annotated[
        str | None, typer.Option(metavar="VALUES", help="Values of masks that count nowhere, such as 255 or none.")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Mask column of Parquet files and manifests.")
    ] = None,
) -> None:
    """Summarise a data set: domains, classes, counts, sizes, unreadable files, duplicates across splits."""
    from orchestrator.ingest.check import check
    from orchestrator.ingest.label_map import mask_request_of_text
    from orchestrator.running.progress import ingest_progress

    if task not in (None, "classification", "segmentation"):
        raise typer.BadParameter(f"must be classification or segmentation, but got {task!r}.", param_hint="--task")
    masks = mask_request_of_text(labels, ignore, mask)
    with ingest_progress() as progress:
        report = check(path, progress=progress, label=label, fail_on_leak=fail_on_leak, task=task, masks=masks)
    context.obj.result(report.to_dict(), report.render)
    raise typer.Exit(PREFLIGHT if report.problems else OK)
