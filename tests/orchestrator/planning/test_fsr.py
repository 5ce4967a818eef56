"""The λ that FSR suggests in a search: when it is tried, how often, and what keeps it from being tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import search_spaces
from orchestrator.errors import PreflightError
from orchestrator.planning.fsr import Hints, hint_problems, lambda_hints
from orchestrator.record.journal import Journal
from orchestrator.results.fsr import IMAGES, SHIFT
from orchestrator.search.searcher import StudySearcher
from orchestrator.search.stages import Entry
from orchestrator.study_file.schema import StudySpec
from tests.support.driving import Config, drive, finished, searcher, task
from trainables.specs.trial_spec import TrialSpec

HINT = {"norms": {"lam": 1.643}}


def search(folder: Path, trials: int = 8, **fields: Any) -> StudySearcher:
    given: dict[str, Any] = {
        "entries": [Entry("", "full"), Entry("norms", "layernorm", {"cycles": 0})],
        "task": task(), "trials": trials, "sampler": "tpe", "seed": 3, "hints": HINT,
    }  # fmt: skip
    return searcher(folder, **{**given, **fields})


def lambdas(configs: list[Config]) -> list[float]:
    return [config["hparams"]["lam"] for config in configs if config["label"] == "norms"]


def outcome(config: Config) -> dict[str, Any]:
    return finished({**config, "strategy": "full"})


class TestSearch:
    @pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
    def test_it_follows_the_default_points_once_with_the_other_defaults(self, tmp_path: Path, sampler: str) -> None:
        configs = drive(search(tmp_path, sampler=sampler), outcome)
        assert [config["label"] for config in configs[:3]] == ["full", "norms", "norms"]
        default = search_spaces.default_point("layernorm", {"cycles": 0})
        assert [config["hparams"] for config in configs[1:3]] == [default, default | {"lam": 1.643}]
        assert lambdas(configs).count(1.643) == 1

    def test_a_search_that_continues_after_the_references_takes_it_first(self, tmp_path: Path) -> None:
        before = drive(search(tmp_path, trials=5, hints={}), outcome)
        assert 1.643 not in lambdas(before)
        after = drive(search(tmp_path, trials=8), outcome)
        assert len(after) == 3
        assert after[0]["hparams"]["lam"] == 1.643
        assert lambdas(after).count(1.643) == 1
        assert drive(search(tmp_path, trials=8), outcome) == []

    def test_a_killed_driver_leaves_it_to_the_next_one_under_its_number(self, tmp_path: Path) -> None:
        with Journal(tmp_path / "journal.jsonl") as journal:
            before = drive(search(tmp_path, journal=journal), outcome, concurrent=3, stop_after=3)
            after = drive(search(tmp_path, journal=journal), outcome)
        numbers = [c["_number"] for c in [*before, *after] if c["hparams"].get("lam") == 1.643]
        assert numbers == [2, 2]

    def test_one_that_is_the_default_changes_nothing(self, tmp_path: Path) -> None:
        plain = drive(search(tmp_path, study_name="plain", hints={}), outcome)
        assert drive(search(tmp_path, study_name="hinted", hints={"norms": {"lam": 1.0}}), outcome) == plain

    def test_reference_trials_of_the_default_point_do_not_take_its_place(self, tmp_path: Path) -> None:
        fixed = {"lam_choice": "fixed", "lam": 1.0, "cycles": 0}
        references = [
            TrialSpec(
                shared=task(), strategy="layernorm", label="norms", role="reference", sample="1", seed=seed,
                hparams=search_spaces.default_point("layernorm", fixed),
            )
            for seed in range(2)
        ]  # fmt: skip
        fields: dict[str, Any] = {"entries": [Entry("norms", "layernorm", fixed)], "hints": {}, "trials": 3}
        ran = drive(search(tmp_path, stages=[_Fixed(references)], searching=False, **fields), outcome)
        assert [config["role"] for config in ran] == ["reference"] * 2
        configs = drive(search(tmp_path, **fields), outcome)
        assert [config["role"] for config in configs] == ["search"] * 3
        assert configs[0]["hparams"] == dict(references[0].hparams)


class _Fixed:
    name = "references"

    def __init__(self, specs: list[TrialSpec]) -> None:
        self.specs = specs

    def next(self, history: Any) -> list[TrialSpec]:
        return self.specs


def study(storage: Path, name: str = "later", **changes: Any) -> StudySpec:
    fields: dict[str, Any] = {
        "name": name,
        "data": {"source": "digits", "train_fraction": 0.1},
        "model": {"name": "digits_vit"},
        "strategies": ["full", "layernorm", {"name": "layernorm", "label": "swept", "fixed": {"lam_choice": "sweep"}}],
        "storage": str(storage),
    }
    return StudySpec.from_fields({**fields, **changes})


def write_references(spec: StudySpec, own: float, full: float, digest: str = "d") -> Path:
    """A journal with two seeds on the study's own sample and on the full pool."""
    folder = Path(spec.storage) / spec.name
    folder.mkdir(parents=True)
    with Journal(folder / "journal.jsonl") as journal:
        facts = {"backbone": spec.model.name, "dataset_digest": digest}
        journal.append("study_started", study=spec.name, spec=spec.model_dump(mode="json"), **facts)
        for number in range(4):
            seed, sample = divmod(number, 2)
            trial: dict[str, Any] = {"trial_id": f"t{number}", "number": number, "label": "layernorm", "hparams": {}}
            trial |= {"strategy": "layernorm", "seed": seed, "role": "reference", "sample": ("1", "full")[sample]}
            journal.append("trial_suggested", **trial, config_hash="c", search_values={})
            journal.append("trial_started", trial_id=f"t{number}")
            metrics = {SHIFT: (own, full)[sample] * (1 + 0.001 * (number in (1, 2))), IMAGES: 100.0}
            journal.append("result", trial_id=f"t{number}", unit=1, metrics=metrics)
            journal.append("trial_finished", trial_id=f"t{number}", state="complete")
    return folder


class TestHints:
    def test_every_entry_that_searches_lambda_gets_it(self, tmp_path: Path) -> None:
        spec = study(tmp_path)
        hints = lambda_hints(spec, write_references(spec, 0.8, 1.0))
        assert hints.values == {"layernorm": {"lam": pytest.approx(1.25, abs=0.002)}}
        assert hints.source.startswith("later: FSR 0.80 ± 0.0")
        assert hints.fields() == {"hints": hints.values, "hints_from": hints.source}

    @pytest.mark.parametrize(("own", "full", "lam"), [(0.2, 1.0, 2.0), (4.0, 1.0, 0.25)])
    def test_it_stays_in_the_range_of_the_search(self, tmp_path: Path, own: float, full: float, lam: float) -> None:
        spec = study(tmp_path)
        assert lambda_hints(spec, write_references(spec, own, full)).values["layernorm"]["lam"] == pytest.approx(
            lam, abs=0.002
        )

    def test_without_references_or_with_an_interval_around_one_there_is_none(self, tmp_path: Path) -> None:
        spec = study(tmp_path)
        assert lambda_hints(spec, tmp_path / "later") == Hints()
        assert lambda_hints(spec, write_references(spec, 1.0, 1.0)) == Hints()
        assert Hints().fields() == {}

    def test_a_search_that_leaves_lambda_alone_gets_none(self, tmp_path: Path) -> None:
        spec = study(tmp_path)
        folder = write_references(spec, 0.8, 1.0)
        for changes in (
            {"strategies": ["full", {"name": "layernorm", "fixed": {"lam": 1.0}}]},
            {"strategies": ["full", {"name": "layernorm", "preset": "sweep"}]},
            {"search": {"sampler": "paper", "trials": 40}},
        ):
            assert lambda_hints(study(tmp_path, **changes), folder) == Hints()

    def test_another_study_of_the_same_network_and_sample_serves_too(self, tmp_path: Path) -> None:
        write_references(study(tmp_path, name="first"), 0.8, 1.0)
        spec = study(tmp_path, diagnostics={"fsr_from": "first"})
        assert list(hint_problems(spec)) == []
        hints = lambda_hints(spec, tmp_path / "later", digest="d")
        assert list(hints.values) == ["layernorm"]
        assert hints.source.startswith("first: FSR 0.80")


class TestProblems:
    def message(self, spec: StudySpec, **arguments: str) -> str:
        with pytest.raises(PreflightError) as error:
            lambda_hints(spec, Path(spec.storage) / spec.name, **arguments)
        return str(error.value)

    def test_a_study_that_has_not_been_run(self, tmp_path: Path) -> None:
        assert self.message(study(tmp_path, diagnostics={"fsr_from": "nowhere"})) == (
            "The study 'later' cannot run here: diagnostics.fsr_from: fsr_from is the name of a study in the same "
            f"storage that has been run, but 'nowhere' has no journal at {tmp_path / 'nowhere' / 'journal.jsonl'}. Run "
            "`luthier fsr` on it, or leave the key out."
        )

    def test_another_network(self, tmp_path: Path) -> None:
        write_references(study(tmp_path, name="first"), 0.8, 1.0)
        spec = study(tmp_path, diagnostics={"fsr_from": "first"}, model={"name": "vit_small_patch16_224"})
        assert self.message(spec) == (
            "The study 'later' cannot run here: diagnostics.fsr_from: FSR belongs to one network and one training "
            "sample, but 'first' has the network digits_vit, and this study vit_small_patch16_224. Name another study, "
            "or leave the key out."
        )

    def test_another_sample(self, tmp_path: Path) -> None:
        write_references(study(tmp_path, name="first"), 0.8, 1.0)
        spec = study(tmp_path, diagnostics={"fsr_from": "first"}, data={"source": "digits", "train_fraction": 0.5})
        assert "'first' has the train_fraction 0.1, and this study 0.5." in self.message(spec)

    def test_other_data(self, tmp_path: Path) -> None:
        write_references(study(tmp_path, name="first"), 0.8, 1.0)
        spec = study(tmp_path, diagnostics={"fsr_from": "first"})
        assert "'first' has the data digest d, and this study other." in self.message(spec, digest="other")
