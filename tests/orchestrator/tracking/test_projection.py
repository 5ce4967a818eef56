"""Projection of a study's events onto its tracked runs, without a server."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from typing import Any

import pytest

from orchestrator.record.records import TrialRecord
from orchestrator.results.study_results import Results
from orchestrator.results.summary import Summary
from orchestrator.running.tracking_process import summarizer
from orchestrator.study_file.entries import entry_problems
from orchestrator.tracking.projection import Projection
from orchestrator.tracking.run_update import Header, RunUpdate, clean_key, param_text
from tests.support.records import FULL, PROBE, shift_ratio

PLASTICITY = {"plasticity": {"metrics": {"plasticity/mha": 2.0, "plasticity/fc1": 1.0}, "curves": {}}}


class Study:
    """Events with times 1000 s, 1001 s, …, and the updates of each."""

    def __init__(self, all_pictures: bool = False, **header: Any) -> None:
        self.projection = Projection("unnamed", summarizer(all_pictures))
        self.count = 0
        if header:
            self.append("study_started", **header)

    def append(self, kind: str, **fields: Any) -> list[RunUpdate]:
        event = {"seq": self.count, "time": 1000.0 + self.count, "kind": kind} | fields
        self.count += 1
        return self.projection.apply(event)

    def suggest(self, trial_id: str = "a", **fields: Any) -> None:
        defaults = {"number": 3, "strategy": "daft", "label": "first", "config_hash": "h", "seed": 1, "role": "search"}
        self.append("trial_suggested", trial_id=trial_id, **({"hparams": {}, "held_out": None} | defaults | fields))

    def start(self, trial_id: str = "a") -> RunUpdate:
        (update,) = self.append("trial_started", trial_id=trial_id)
        return update


def test_a_trial_that_never_started_has_no_run() -> None:
    study = Study(study="pets")
    study.suggest()
    assert study.append("trial_failed", trial_id="a", reason="interrupted", error="") == []
    assert study.append("result", trial_id="unknown", unit=1, metrics={}) == []


def test_a_journal_without_header_still_has_a_study_run() -> None:
    study = Study()
    (update,) = study.append("trial_suggested", trial_id="a", number=0, strategy="full")
    assert (update.name, update.parent, update.start) == ("unnamed", None, 1_000_000)


def test_a_trial_run_starts_at_its_first_start_and_steps_are_units() -> None:
    study = Study(study="pets")
    study.suggest(hparams={"lr_backbone": 1e-3, "lr_head": 0, "bn": True})
    update = study.start()
    assert (update.name, update.start, update.status) == ("0003-first", 1_002_000, None)
    assert update.points == []
    assert update.params == {
        "strategy": "first", "lr_backbone": "0.001", "lr_backbone.log10": "-3.0", "lr_head": "0", "bn": "true",
    }  # fmt: skip
    metrics = {"val/acc": 0.5, "train/loss": None, "ood/a b/acc": math.inf, "pid": 3.0}
    (result,) = study.append("result", trial_id="a", unit=4, metrics=metrics)
    assert result.points == [("val/acc", 0.5, 1_003_000, 4)]
    assert result.tags["metrics_not_finite"] == "2"
    assert (result.uid, result.start) == (update.uid, update.start)


def test_runs_of_folds_and_confirmations_state_it_in_their_names_and_tags() -> None:
    study = Study(study="pets")
    study.suggest("a", role="fold", held_out="photo")
    study.suggest("b", role="confirm", seed=2)
    fold, confirm = study.start("a"), study.start("b")
    assert (fold.name, fold.tags["held_out"], fold.tags["role"]) == ("0003-first-without-photo", "photo", "fold")
    assert (confirm.name, confirm.tags["seed"]) == ("0003-first-confirm", "2")
    assert fold.uid != confirm.uid


def test_a_resumed_trial_continues_in_its_run() -> None:
    study = Study(study="pets")
    study.suggest("a")
    first = study.start("a")
    study.append("result", trial_id="a", unit=1, metrics={"val/acc": 0.5})
    (end,) = study.append("trial_failed", trial_id="a", reason="interrupted", error="The driver ended at unit 1.")
    assert (end.status, end.tags["status"]) == ("KILLED", "interrupted")
    study.suggest("b")
    again = study.start("b")
    assert (again.uid, again.start, again.status) == (first.uid, first.start, "RUNNING")
    assert again.tags["status.attempts"] == "2"
    (repeated,) = study.append("result", trial_id="b", unit=1, metrics={"val/acc": 0.5})
    (new,) = study.append("result", trial_id="b", unit=2, metrics={"val/acc": 0.6})
    assert (repeated.points, [point[3] for point in new.points]) == ([], [2])


def test_the_run_of_a_paused_trial_is_scheduled_and_then_running_again() -> None:
    study = Study(study="pets")
    study.suggest()
    study.start()
    study.append("result", trial_id="a", unit=1, metrics={"val/acc": 0.5})
    (paused,) = study.append("trial_paused", trial_id="a")
    assert (paused.status, paused.end, paused.tags["status"]) == ("SCHEDULED", None, "paused")
    (promoted,) = study.append("trial_promoted", trial_id="a")
    assert (promoted.status, promoted.tags["status"]) == ("RUNNING", "running")
    study.append("trial_paused", trial_id="a")
    (end,) = study.append("trial_finished", trial_id="a", state="pruned")
    assert (end.status, end.tags["status"]) == ("KILLED", "pruned")


def test_the_best_value_of_a_pruned_trial_is_that_of_its_earliest_best_unit() -> None:
    study = Study(study="pets")
    study.suggest()
    study.start()
    for unit, accuracy in enumerate((0.5, 0.7, 0.7, 0.6), start=1):
        study.append("result", trial_id="a", unit=unit, metrics={"val/acc": accuracy})
    (end,) = study.append("trial_finished", trial_id="a", state="pruned")
    assert [(key, value, step) for key, value, _, step in end.points] == [
        ("best/val/acc", 0.7, 4),
        ("best/epoch", 2, 4),
    ]


def undisturbed_or_not(endings: tuple[str, ...]) -> set[tuple[str, str, int, float]]:
    """(run, metric, step, value) of a study of three trials in several runs; each of `endings` is the end of a run that
    another one continued, and the reason of its failed trials."""
    study = Study()
    points = set[tuple[str, str, int, float]]()

    def append(kind: str, **fields: Any) -> None:
        for update in study.append(kind, **fields):
            points.update((update.name, key, step, value) for key, value, _, step in update.points)

    units = {f"{number}": range(1, 6) for number in range(3)}
    for part, ending in enumerate([*endings, "complete"]):
        append("study_started", study="pets")
        for trial, left in units.items():
            if part and len(left) == 5:  # the first trial has ended long ago
                continue
            study.suggest(f"{trial}-{part}", number=int(trial), label="full")
            study.start(f"{trial}-{part}")
            for unit in left if ending == "complete" or trial == "0" else left[:2]:
                metrics = {"val/acc": 0.5 + unit / 10 - int(trial) / 50}
                if unit == 5 and trial == "0":
                    metrics |= {"best/val/acc": 1.0, "best/epoch": 5.0, "test/acc": 0.9}
                append("result", trial_id=f"{trial}-{part}", unit=unit, metrics=metrics)
            units[trial] = left[2:] if ending != "complete" and trial != "0" else left
        for trial in units:
            if trial == "0" and part == 0:
                append("trial_finished", trial_id="0-0", state="complete")
            elif trial != "0" and ending == "complete":
                append("trial_finished", trial_id=f"{trial}-{part}", state="pruned")
            elif trial != "0":
                reason = "interrupted" if ending in ("killed", "interrupted") else ending
                append("trial_failed", trial_id=f"{trial}-{part}", reason=reason, error="E")
        if ending != "killed":
            append("study_finished", state={"interrupted": ending, "complete": ending}.get(ending, "failed"))
    return points


@pytest.mark.parametrize("first", ["killed", "interrupted", "infra", "stalled", "host_oom"])
def test_p15_a_study_that_is_continued_has_the_points_of_an_undisturbed_one_and_no_other(first: str) -> None:
    whole = undisturbed_or_not(())
    assert {row for row in whole if row[0] == "0001-full" and row[1].startswith("best/")} == {
        ("0001-full", "best/val/acc", 5, 0.98), ("0001-full", "best/epoch", 5, 5.0),
    }  # fmt: skip
    assert undisturbed_or_not((first,)) == whole
    assert undisturbed_or_not((first, "interrupted")) == whole


def test_updates_of_one_run_can_be_merged() -> None:
    first = RunUpdate("u", "n", 1, tags={"status": "running"}, points=[("a", 1.0, 1, 1)], dataset=("d", "x", "s"))
    first.merge(
        RunUpdate("u", "n", 1, tags={"status": "complete"}, points=[("a", 2.0, 2, 2)], status="FINISHED", end=9)
    )
    first.merge(RunUpdate("u", "n", 1, params={"p": "1"}, files={"f": b"t".__bytes__}))
    assert first.tags == {"status": "complete"}
    assert [point[1] for point in first.points] == [1.0, 2.0]
    assert (first.status, first.end, first.params) == ("FINISHED", 9, {"p": "1"})
    assert first.files["f"]() == b"t"
    assert first.dataset == ("d", "x", "s")


def test_the_header_names_data_and_backbone() -> None:
    spec = {"data": {"source": "folder", "root": "/data/pets"}, "model": {"name": "resnet18"}}
    header = Header("study", {"spec": spec, "dataset_digest": "abc"})
    assert header.dataset() == ("pets", "abc", "/data/pets")
    assert header.tags() == {"study": "study", "backbone": "resnet18", "dataset": "pets", "dataset_digest": "abc"}
    assert Header("study", {}).dataset() is None
    assert Header("study", {}).tags() == {"study": "study"}


def summary(records: list[TrialRecord], measurements: dict[str, Any] | None = None, state: str = "complete") -> Summary:
    return summarizer().study({"study": "pets", "state": state}, records, measurements or {})


def texts(summary: Summary) -> dict[str, str]:
    """The artifacts but for the report."""
    return {name: render().decode() for name, render in summary.files.items() if name != "report.html"}


def test_a_study_without_a_complete_trial_has_a_note_that_states_it() -> None:
    empty = summary([])
    assert empty.tags["mlflow.note.content"].startswith("# pets\n\nSelection needs at least one complete search trial")
    assert texts(empty) == {}
    assert empty.metrics == {"trials/complete": 0.0, "trials/pruned": 0.0, "trials/failed": 0.0}


def test_the_summary_of_a_study_has_gains_and_findings() -> None:
    made = summary([*PROBE, *FULL], PLASTICITY)
    assert made.metrics["gain"] == pytest.approx(0.07 / 0.9)
    assert made.metrics["gain/ood"] == pytest.approx(-0.09 / 0.5)
    note = made.tags["mlflow.note.content"]
    assert note == texts(made)["leaderboard.md"]
    assert "## Findings\n\n- Best in distribution: full (test 97.0 ± 2.5 %, 3 seeds)" in note
    assert "- MHA is the most plastic component (P 2.00; FC1 1.00).\n" in note


def test_fsr_measured_alone_is_in_the_note_too() -> None:
    note = summary(shift_ratio(0.60, 0.61, 0.62)).tags["mlflow.note.content"]
    assert note.startswith("# pets\n\nSelection needs at least one complete search trial")
    assert "\n- FSR 0.61" in note


CURVE = {"columns": {"layer": ["a", "b"], "value": [1.0, 2.0]}, "note": ""}


def pictures_of(study: Study, roles: dict[str, str], state: str = "complete") -> dict[str, int]:
    """Run → number of pictures, of a study with one complete trial per role; the later the better."""
    updates = []
    for number, (trial_id, role) in enumerate(roles.items()):
        study.suggest(trial_id, number=number, label="full", role=role, config_hash=f"h{number}")
        study.start(trial_id)
        metrics = {"val/acc": number / 10, "best/val/acc": number / 10}
        updates += study.append("result", trial_id=trial_id, unit=1, metrics=metrics, curves={"cka": CURVE})
        updates += study.append("trial_finished", trial_id=trial_id, state="complete")
    updates += study.append("study_finished", state=state)
    assert all("curves/cka.json" in update.files for update in updates if update.points and update.points[0][3] == 1)
    names = [update.name for update in updates if "curves/cka.png" in update.files]
    return {name: names.count(name) for name in names}


def test_curves_of_confirmations_and_of_the_best_trial_of_a_complete_study_are_drawn() -> None:
    roles = {"a": "search", "b": "search", "c": "search", "d": "confirm"}
    drawn = pictures_of(Study(study="pets"), roles)
    assert drawn == {"0003-full-confirm": 1, "0002-full": 1}
    assert pictures_of(Study(study="pets"), roles, state="interrupted") == {"0003-full-confirm": 1}
    assert set(pictures_of(Study(all_pictures=True, study="pets"), roles)) == {
        "0000-full", "0001-full", "0002-full", "0003-full-confirm",
    }  # fmt: skip


def test_what_was_measured_at_the_start_is_in_the_note_at_the_end() -> None:
    study = Study(study="pets")
    study.append("measured", what="plasticity", **PLASTICITY["plasticity"])
    (update,) = study.append("study_finished", state="complete")
    assert "- MHA is the most plastic component (P 2.00; FC1 1.00)." in update.tags["mlflow.note.content"]


def test_c6_c7_keys_and_values_are_made_fit_for_any_server() -> None:
    assert clean_key("ood/clip art: v1.0_x-y/acc") == "ood/clip art: v1.0_x-y/acc"
    assert clean_key("ood/clip art (é)/acc") == "ood/clip art ___-2ea5/acc"
    assert clean_key("../x//y/") == ".-5ec1/x/_-e3b0/y/_-e3b0"
    assert len(clean_key("k" * 400)) == 250
    texts = [param_text(value) for value in (3e-05, 1e-07, 0.1, 12, True, "sgd", None, [1, 2])]
    assert texts == ["0.00003", "0.0000001", "0.1", "12", "true", "sgd", "null", "[1, 2]"]


def test_d1_every_run_states_how_many_images_were_left_out() -> None:
    study = Study(study="pets", images_left_out=3)
    study.suggest()
    assert study.start().tags["dataset_left_out"] == "3"
    other = Study(study="pets", images_left_out=0)
    other.suggest()
    assert "dataset_left_out" not in other.start().tags


def test_c6_names_that_a_server_refuses_stay_apart_and_are_written_down() -> None:
    odd = ["a,b", "a;b", "a\nb", "../b", "x" * 300, "x" * 301, "é", ""]
    keys = {f"ood/{name}/acc" for name in odd}
    assert len({clean_key(key) for key in keys}) == len(keys)
    assert all(re.fullmatch(r"[\w\-. :/]{1,250}", key, re.ASCII) and ".." not in key for key in map(clean_key, keys))
    study = Study(study="pets")
    study.suggest()
    study.start()
    (update,) = study.append("result", trial_id="a", unit=1, metrics=dict.fromkeys(keys, 0.5) | {"val/acc": 1.0})
    (last,) = study.append("study_finished", state="complete")
    names = json.loads(last.files["names.json"]())
    assert {names.get(key, key) for key, *_ in update.points} == keys | {"val/acc"}


def test_c8_names_in_a_note_are_texts_and_no_cell_of_the_table_is_a_formula() -> None:
    """Names of domains and classes come from folders; a note is Markdown, which may hold HTML."""
    evil = "<img src=x onerror=alert(1)>"
    results = Results([*PROBE, *FULL], {"name": "pets", "search": {"objective": f"val_domain:{evil}"}})
    assert "<img" not in results.markdown()
    assert "&lt;img src=x onerror=alert(1)>" in results.markdown()
    made = summary([*PROBE, *FULL])
    rows = list(csv.reader(io.StringIO(texts(made)["leaderboard.csv"])))
    assert len(rows) == 3
    assert [cell for row in rows for cell in row if re.match(r"[=+@\t\r]|-\D", cell)] == []
    assert made.tags["mlflow.note.content"].startswith("# pets")


@pytest.mark.parametrize("label", ["=cmd()", "+1", "-x", "@sum", "<script>", "a|b", "a,b"])
def test_c8_a_label_cannot_be_a_formula_or_a_tag(label: str) -> None:
    problems = entry_problems([{"name": "full", "label": label}])
    assert [str(problem) for problem in problems] == [
        f"strategies[0].label: a label has 1 to 50 letters, digits, '_' or '-' and starts with a letter or digit, but "
        f"got {label!r}."
    ]
