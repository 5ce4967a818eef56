"""The studies that `warm_start` names: what keeps them from being used, what is read, and where it is shown."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands.status import status
from orchestrator.errors import PreflightError, StudyError
from orchestrator.planning.plan import make_plan
from orchestrator.planning.warm_start import own_events, warm_start_of, warm_start_problems
from orchestrator.record.journal import Journal
from orchestrator.record.records import WARM_START
from orchestrator.report.page import REPORT, write_report
from orchestrator.search.warm_start import WarmStart
from orchestrator.study_file.schema import StudySpec
from orchestrator.study_file.yaml_text import write_yaml


def study(storage: Path, name: str = "later", **changes: Any) -> StudySpec:
    fields: dict[str, Any] = {
        "name": name,
        "data": {"source": "digits"},
        "model": {"name": "digits_cnn"},
        "strategies": ["linear_probe", "full", "daft"],
        "search": {"trials": 12, "allocation": "equal"},
        "storage": str(storage),
    }
    return StudySpec.from_fields({**fields, **changes})


def write_trials(spec: StudySpec, strategy: str = "full", count: int = 4) -> Path:
    """A journal with complete search trials, of which the last is the best."""
    folder = Path(spec.storage) / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder / "journal.jsonl") as journal:
        journal.append("study_started", study=spec.name, spec=spec.model_dump(mode="json"))
        for number in range(count):
            hparams = {"lr_backbone": 0.001 * (number + 1), "lr_head": 5.0}
            trial = {"trial_id": f"t{number}", "number": number, "strategy": strategy, "label": strategy}
            journal.append("trial_suggested", **trial, hparams=hparams, role="search")
            journal.append("trial_started", trial_id=f"t{number}")
            metrics = {"best/val/acc": 0.5 + number / 10, "test/acc": 0.5}
            journal.append("result", trial_id=f"t{number}", unit=1, metrics=metrics)
            journal.append("trial_finished", trial_id=f"t{number}", state="complete")
    return folder


def warm(storage: Path, *names: str, **changes: Any) -> StudySpec:
    return study(storage, warm_start=list(names), **changes)


def message(spec: StudySpec) -> str:
    with pytest.raises(PreflightError) as caught:
        warm_start_of(spec)
    assert [str(problem) for problem in caught.value.problems] == [str(p) for p in warm_start_problems(spec)]
    return str(caught.value)


class TestConflicts:
    def test_an_unknown_study_has_a_near_name(self, tmp_path: Path) -> None:
        write_trials(study(tmp_path, "pets-2026"))
        journal = tmp_path / "pets-2025" / "journal.jsonl"
        assert message(warm(tmp_path, "pets-2025")) == (
            "The study 'later' cannot run here: warm_start[0]: warm_start names studies in the same storage that have "
            f"been run, but 'pets-2025' has no journal at {journal}. Did you mean 'pets-2026'? There are pets-2026."
        )

    def test_a_study_of_other_strategies_only(self, tmp_path: Path) -> None:
        write_trials(study(tmp_path, "before"), strategy="bitfit")
        assert message(warm(tmp_path, "before")) == (
            "The study 'later' cannot run here: warm_start[0]: a strategy learns from trials of the same strategy, but "
            "'before' has search trials of bitfit, and this study searches daft and full. Leave it out."
        )

    def test_a_study_that_selects_by_another_metric(self, tmp_path: Path) -> None:
        write_trials(study(tmp_path, "before", search={"metric": "nll"}))
        assert message(warm(tmp_path, "before")) == (
            "The study 'later' cannot run here: warm_start[0]: trials can be ranked for this study where they were "
            "selected by the same metric, but 'before' selects by nll of classification, and this study by acc of "
            "classification. Leave it out, or change search.metric."
        )

    def test_a_damaged_journal(self, tmp_path: Path) -> None:
        journal = write_trials(study(tmp_path, "before")) / "journal.jsonl"
        journal.write_bytes(b"{damaged}\n" + journal.read_bytes())
        assert "is damaged" in message(warm(tmp_path, "before"))

    def test_a_study_that_searches_nothing(self, tmp_path: Path) -> None:
        (problem,) = warm_start_problems(warm(tmp_path, "before", strategies=["linear_probe"]))
        assert "needs an entry that the sampler searches" in problem.message

    def test_all_are_reported_at_once(self, tmp_path: Path) -> None:
        write_trials(study(tmp_path, "before"), strategy="bitfit")
        assert [p.path for p in warm_start_problems(warm(tmp_path, "before", "nowhere"))] == [
            ("warm_start", 0), ("warm_start", 1),
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("names", "search", "rule"),
        [
            (["later"], {}, "warm_start[0]: warm_start names earlier studies, but got this study, 'later'."),
            (["a", "a"], {}, "warm_start[1]: the study 'a' is listed twice."),
            (["../a"], {}, "warm_start[0]: a study's name has"),
            (["a"], {"sampler": "paper"}, "warm_start: the papers' sweeps try what they list, but got warm_start [a]"),
            ([], {}, "warm_start: "),
        ],
    )
    def test_in_the_study_file(self, tmp_path: Path, names: list[str], search: dict[str, Any], rule: str) -> None:
        with pytest.raises(StudyError) as caught:
            warm(tmp_path, *names, search=search)
        assert rule in str(caught.value)


class TestReading:
    def test_trials_of_another_network_and_data_count(self, tmp_path: Path) -> None:
        write_trials(study(tmp_path, "before", model={"name": "resnet18"}))
        taken = warm_start_of(warm(tmp_path, "before"))
        assert [point.hparams["lr_backbone"] for point in taken.entries["full"].points] == [0.004, 0.003]
        assert taken.entries["daft"].examined == 0
        assert list(taken.entries) == ["full", "daft"]

    def test_without_the_key_nothing_is_taken(self, tmp_path: Path) -> None:
        write_trials(study(tmp_path, "before"))
        assert warm_start_of(study(tmp_path)) == WarmStart()

    def test_the_studys_own_journal_takes_precedence(self, tmp_path: Path) -> None:
        before = write_trials(study(tmp_path, "before"))
        spec = warm(tmp_path, "before")
        taken = warm_start_of(spec)
        folder = write_trials(spec, count=1)
        with Journal(folder / "journal.jsonl") as journal:
            journal.append(WARM_START, **taken.fields())
        shutil.rmtree(before)
        assert list(warm_start_problems(spec)) == []
        assert warm_start_of(spec, own_events(spec)) == taken

    def test_other_studies_are_read_for_entries_that_were_added(self, tmp_path: Path) -> None:
        before = write_trials(study(tmp_path, "before"))
        spec = warm(tmp_path, "before", strategies=["daft"])
        folder = write_trials(spec, count=1)
        with Journal(folder / "journal.jsonl") as journal:
            journal.append(WARM_START, **warm_start_of(warm(tmp_path, "before")).fields())
            shutil.rmtree(before)
            assert list(warm_start_problems(warm(tmp_path, "before", strategies=["daft", "full"]))) == []
            (problem,) = warm_start_problems(warm(tmp_path, "before", strategies=["daft", "bitfit"]))
        assert "'before' has no journal" in problem.message

    def test_a_changed_list_is_read(self, tmp_path: Path) -> None:
        for name in ("before", "other"):
            write_trials(study(tmp_path, name))
        taken = warm_start_of(warm(tmp_path, "before"))
        events = [{"kind": WARM_START, **taken.fields()}]
        assert warm_start_of(warm(tmp_path, "other"), events).entries["full"].points[0].study == "other"


LINES = [
    "Warm start from before:",
    "  full: 2 first points, and 4 of 4 earlier trials for its sampler.",
    "  daft: nothing, no trial of this strategy is complete there.",
]


class TestShown:
    def test_plan(self, tmp_path: Path) -> None:
        write_trials(study(tmp_path, "before"))
        plan = make_plan(warm(tmp_path, "before"))
        lines = plan.lines()
        assert lines[lines.index(LINES[0]) :][:3] == LINES
        assert plan.to_dict()["warm_start"] == tuple(LINES)

    def test_status_and_report(self, tmp_path: Path) -> None:
        write_trials(study(tmp_path, "before"))
        spec = warm(tmp_path, "before")
        folder = write_trials(spec)
        with Journal(folder / "journal.jsonl") as journal:
            journal.append(WARM_START, **warm_start_of(spec).fields())
            journal.append("study_started", study=spec.name, spec=spec.model_dump(mode="json"))
        (folder / "study.yaml").write_text(write_yaml(spec.model_dump(mode="json")))
        assert status(folder).to_dict()["warm_start"] == LINES
        write_report(Journal.read(folder / "journal.jsonl"), folder / REPORT, folder)
        assert "full: 2 first points, and 4 of 4 earlier trials for its sampler." in (folder / REPORT).read_text()
