"""Reference page of all recorded names, generated from the metric table.

`python -m orchestrator.commands.metric_reference` regenerates docs/metrics.md; a test compares it.
"""

from __future__ import annotations

from pathlib import Path

from trainables.specs.metrics import (
    BUILT_IN_TASKS,
    QUANTITIES,
    TEST,
    TRAIN,
    VAL,
    Metric,
    Quantity,
    TaskMetrics,
    best,
    ood,
)

PAGE = Path("docs/metrics.md")

_DIRECTIONS = {"max": "higher is better", "min": "lower is better", None: "–"}
_SECTIONS = {
    "unit": ("Recorded after every unit", "Beside the task's metrics on `train` and `val`."),
    "trial": ("Recorded once per trial", "Diagnostics appear where they apply and the study asks for them."),
    "study": ("Recorded once per study", "Metrics of the study's own run."),
}


def page() -> str:
    """The page as Markdown."""
    lines = [
        "# Recorded metrics",
        "",
        "Generated from `trainables/specs/metrics.py` (`python -m orchestrator.commands.metric_reference`). Journal,",
        "MLflow, leaderboard and report use these names. Parts in angle brackets vary; fractions are displayed in per",
        "cent.",
        "",
    ]
    for task in BUILT_IN_TASKS:
        lines += _task_section(task)
    for measured, (title, note) in _SECTIONS.items():
        lines += [f"## {title}", "", note, "", "| name | direction | unit | meaning |", "|---|---|---|---|"]
        lines += [_quantity_row(quantity) for quantity in QUANTITIES if quantity.measured == measured]
        lines.append("")
    lines += ["A strategy may record further values under its own name: `<strategy>/<value>`.", ""]
    return "\n".join(lines)


def _task_section(task: TaskMetrics) -> list[str]:
    names = {
        "ID validation, per unit": task.validation,
        "ID validation, of the tested weights": task.best_validation,
        "ID test": task.test,
        "one OOD domain": task.of_domain("<domain>"),
        "mean over the OOD domains": task.ood_mean,
        "worst OOD domain": task.ood_worst,
        "held-out ID domain of a fold": task.held_out,
    }
    lines = [f"## Task `{task.task}`", "", "| metric | direction | unit | use | recorded as | meaning |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [_metric_row(task, metric) for metric in task.metrics]
    lines += ["", "Where the selection metric is recorded:", "", "| measured on | name |", "|---|---|"]
    lines += [f"| {where} | `{name}` |" for where, name in names.items()]
    return [*lines, ""]


def _metric_row(task: TaskMetrics, metric: Metric) -> str:
    uses = []
    if metric is task.selection:
        uses.append("selects")
    if metric is task.tie_breaker:
        uses.append("breaks ties")
    if metric in task.reported:
        uses.append("reported")
    names = [f"`{name}`" for name in recorded_names(task, metric)]
    direction = _DIRECTIONS[metric.direction]
    unit = metric.unit or "–"
    return f"| {metric.title} | {direction} | {unit} | {', '.join(uses)} | {', '.join(names)} | {metric.meaning} |"


def recorded_names(task: TaskMetrics, metric: Metric) -> list[str]:
    """Names under which a task records a metric.

    Example:
        >>> from trainables.specs.metrics import CLASSIFICATION, NLL
        >>> recorded_names(CLASSIFICATION, NLL)
        ['val/nll', 'test/nll', 'ood/<domain>/nll']
    """
    names = []
    if metric in task.training:
        names.append(metric.on(TRAIN))
    if metric in (task.selection, task.tie_breaker):
        names.append(metric.on(VAL))
    if metric is task.selection:
        names.append(best(metric.on(VAL)))
    if metric in task.reported:
        names += [metric.on(TEST), metric.on(ood("<domain>"))]
    return names


def _quantity_row(quantity: Quantity) -> str:
    direction = _DIRECTIONS[quantity.direction]
    meaning = quantity.meaning.replace("|", "\\|")
    return f"| `{quantity.name}` | {direction} | {quantity.unit or '–'} | {meaning} |"


def main(root: Path = Path()) -> None:
    """Regenerate the page; run it in the root of the repository."""
    (root / PAGE).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
