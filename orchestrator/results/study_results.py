"""What a study found: leaderboard, best configuration, regret and warnings, from its records alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.record.records import INTERRUPTED, TrialRecord
from orchestrator.results import selection
from orchestrator.results.findings import findings
from orchestrator.results.leaderboard import choice_values, finite, leaderboard, markdown_table, measured, print_table

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from orchestrator.study_file.schema import StudySpec

NearEdge = Callable[..., list[str]]
"""(strategy, hparams, fixed=…, preset=…) → one sentence per value at an edge, as `search_spaces.near_edge`."""

ENOUGH_SEEDS = 3
"""Below this many seeds a leaderboard row is warned about: the 95 % interval of two seeds is 12.7 standard errors."""


class Results:
    """The outcome of a study. Reading it changes nothing and needs neither a cluster nor a tracking server.

    Args:
        records: the study's trials (`orchestrator.record.journal.fold`).
        spec: the study, or its fields as a mapping; `name`, `search.objective` and the `label`, `fixed` and `preset` of
            its strategies are read.
        near_edge: says which values lie at the edge of their range; default `search_spaces.near_edge`.
        measurements: what was measured of the study as a whole (`orchestrator.record.records.measurements`).
    """

    def __init__(
        self,
        records: Sequence[TrialRecord],
        spec: StudySpec | Mapping[str, Any] | None = None,
        near_edge: NearEdge | None = None,
        measurements: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.records = list(records)
        self.measurements = dict(measurements or {})
        self.spec = spec
        self.name = str(_field(spec, "name") or "study")
        objective = _field(_field(spec, "search"), "objective")
        self.rule = str(objective or "id_val")
        self._near_edge = near_edge

    def leaderboard(self, rule: str | None = None) -> pd.DataFrame:
        """One row per label; columns and errors: see `orchestrator.results.leaderboard.leaderboard`. Default rule: the
        study's own."""
        return leaderboard(self.records, rule or self.rule)

    def best(self, rule: str = "id_val", label: str | None = None) -> selection.Choice:
        """The configuration that a rule chooses, of all or of one label (ValueError: no complete trial)."""
        return selection.select(self.records, rule, label)

    def regret(self, rule: str | None = None) -> selection.Regret:
        """What the rule gave away against the oracle (ValueError: no complete trial)."""
        return selection.regret(self.records, rule or self.rule)

    def findings(self) -> list[str]:
        """What the study says, in sentences; none before a trial is complete."""
        return findings(self.records, self.rule, self.measurements)

    def warnings(self) -> list[str]:
        """What a reader of the leaderboard should know before believing it, one sentence each."""
        found = [*_trouble(self.records)]
        if any(r.role == "search" and r.state == "complete" for r in self.records):
            found += self._edges() + self._few_seeds()
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values (NaN as None), with every trial under `records`.

        Without a complete trial the leaderboard is empty and `problem` says why.
        """
        out: dict[str, Any] = {"study": self.name, "rule": self.rule, "problem": None, "leaderboard": []}
        out |= {"best": None, "regret": None, "findings": self.findings(), "warnings": self.warnings()}
        out["measurements"] = finite(self.measurements)
        out["trials"] = dict(Counter(r.state for r in self.records))
        out["records"] = [finite(_trial_values(record)) for record in self.records]
        try:
            best, lost, table = self.best(self.rule), self.regret(), self.leaderboard()
        except ValueError as error:
            return out | {"problem": str(error)}
        out["leaderboard"] = finite(table.to_dict("records"))
        out["best"] = finite(choice_values(best))
        out["regret"] = finite(
            {
                "metric": lost.metric,
                "value": lost.value,
                "chosen": choice_values(lost.chosen),
                "oracle": choice_values(lost.oracle),
            }
        )
        return out

    def render(self, console: Console) -> None:
        """Print leaderboard, regret line, findings and warnings."""
        try:
            title = f"{self.name}: leaderboard by {self.rule}{self._oracle_mark()}"
            rows = self.leaderboard().to_dict("records")
            console.print(title, markup=False, highlight=False, style="bold", soft_wrap=True)
            print_table(console, rows)
            console.print(self.regret_line(), markup=False, highlight=False)
        except ValueError as error:
            console.print(str(error), markup=False)
        for sentence in self.findings():
            console.print(f"- {sentence}", markup=False, highlight=False)
        for warning in self.warnings():
            console.print(f"Warning: {warning}", markup=False, highlight=False, style="yellow")

    def regret_line(self) -> str:
        """One sentence: what the rule chose, and what the oracle would have (ValueError: no complete trial)."""
        lost = self.regret()
        chosen, best = lost.chosen.record, lost.oracle.record
        head = f"Selection by {lost.chosen.rule}: {chosen.label} (trial {chosen.number})."
        if lost.value == 0:
            return (
                f"{head} Regret 0.0 points of {lost.metric}: the oracle, which looks at test data, finds none better."
            )
        return (
            f"{head} Regret {100 * lost.value:.1f} points of {lost.metric}: the oracle, which looks at test data, "
            f"would choose {best.label} (trial {best.number}), {100 * lost.oracle.value:.1f} %."
        )

    def markdown(self) -> str:
        """Leaderboard, regret, findings and warnings as Markdown (the note of the study's run in MLflow)."""
        lines = [f"# {self.name}", "", f"Selection by `{self.rule}`{self._oracle_mark()}.", ""]
        try:
            lines += [*markdown_table(self.leaderboard().to_dict("records")), "", self.regret_line()]
        except ValueError as error:
            lines += [str(error)]
        if found := self.findings():
            lines += ["", "## Findings", "", *(f"- {sentence}" for sentence in found)]
        text = "\n".join([*lines, "", *(f"- **Warning:** {w}" for w in self.warnings())]).rstrip() + "\n"
        return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)  # Markdown may hold HTML, and names come from anywhere

    def _oracle_mark(self) -> str:
        return " (ORACLE: looks at test data, an upper bound)" if self.rule == "oracle" else ""

    def _edges(self) -> list[str]:
        near_edge = self._near_edge or _near_edge_of_the_spaces()
        entries = {str(_field(entry, "label")): entry for entry in _field(self.spec, "strategies") or ()}
        found = []
        for label, record in self._chosen().items():
            fixed, preset = _field(entries.get(label), "fixed") or {}, _field(entries.get(label), "preset")
            edges = near_edge(record.strategy, record.hparams, fixed=tuple(fixed), preset=preset)
            found += [f"{label}: {edge}" for edge in edges]
        return found

    def _chosen(self) -> dict[str, TrialRecord]:
        """The chosen configuration per label; by ID validation where the study's own rule cannot say."""
        try:
            choices = selection.per_label(self.records, self.rule)
        except ValueError:
            choices = selection.per_label(self.records)
        return {label: choice.record for label, choice in choices.items()}

    def _few_seeds(self) -> list[str]:
        runs = {label: len(measured(self.records, r.config_hash)) for label, r in self._chosen().items()}
        few = [f"{label} ({count})" for label, count in runs.items() if count < ENOUGH_SEEDS]
        if not few:
            return []
        return [
            f"Fewer than {ENOUGH_SEEDS} seeds stand behind {', '.join(few)}: differences between these rows may be "
            "chance. Raise confirm.seeds, and confirm.top_k to at least the number of strategies."
        ]


def _trial_values(record: TrialRecord) -> dict[str, Any]:
    """One trial as plain values: its identity, configuration, state, and the last value of every metric."""
    return {
        "number": record.number,
        "label": record.label,
        "strategy": record.strategy,
        "role": record.role,
        "held_out": record.held_out,
        "sample": record.sample,
        "seed": record.seed,
        "config_hash": record.config_hash,
        "hparams": dict(record.hparams),
        "state": record.state,
        "reason": record.reason,
        "error": record.error,
        "units": record.unit,
        "metrics": dict(record.metrics),
    }


def _near_edge_of_the_spaces() -> NearEdge:
    import search_spaces

    found: NearEdge = search_spaces.near_edge
    return found


def _trouble(records: Sequence[TrialRecord]) -> list[str]:
    found = []
    failed = [r for r in records if r.state == "failed" and r.reason != INTERRUPTED]
    if failed:
        reasons = ", ".join(f"{n} {why or 'unknown'}" for why, n in Counter(r.reason for r in failed).most_common())
        found.append(f"{len(failed)} of {len(records)} trials failed ({reasons}); `luthier status` shows their errors.")
    if unfinished := [r for r in records if r.unfinished]:
        found.append(f"{len(unfinished)} of {len(records)} trials are unfinished. Run the study again to continue it.")
    search = [r for r in records if r.role == "search"]
    for label in dict.fromkeys(r.label for r in search):
        states = Counter(r.state for r in search if r.label == label)
        if not states["complete"]:
            got = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
            found.append(f"{label}: no trial used its whole budget ({got}), so it cannot be ranked.")
    return found


def _field(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
