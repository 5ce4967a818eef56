"""FSR from records: closed forms, intervals, what is said; and which reference trials a study runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from orchestrator.fsr import IMAGES, SHIFT, FsrEstimate, estimates, fit_limit, suggested
from orchestrator.fsr_stage import ReferenceStage
from orchestrator.leaderboard import leaderboard, mean_interval
from orchestrator.records import TrialRecord
from orchestrator.selection import rank
from tests.synthetic import shapes
from trainables.core.task import ModelSpec, Task


def reference(number: int, sample: str, seed: int, shift: float, images: float = 100.0, **fields: Any) -> TrialRecord:
    metrics = {SHIFT: shift, IMAGES: images, "best/val/acc": 0.9, "test/acc": 0.9}
    state = fields.pop("state", "complete")
    return TrialRecord(
        trial_id=str(number), number=number, strategy="layernorm", label="layernorm", seed=seed, role="reference",
        sample=sample, config_hash=fields.pop("config_hash", "c"), state=state, metrics=metrics, **fields,
    )  # fmt: skip


def runs(**samples: list[float]) -> list[TrialRecord]:
    """Sample → shift per seed."""
    found: list[TrialRecord] = []
    for name, shifts in samples.items():
        found += [reference(len(found) + seed, name, seed, shift) for seed, shift in enumerate(shifts)]
    return found


class TestFull:
    def test_the_full_pool_against_itself_is_exactly_one(self) -> None:
        (found,) = estimates(runs(**{"1": [1.1, 0.7, 3.3], "full": [1.1, 0.7, 3.3]}))
        assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
        assert found.lam == 1.0

    def test_ratios_are_paired_by_seed_with_a_student_interval(self) -> None:
        (found,) = estimates(runs(**{"1": [1.0, 2.0, 3.0], "full": [2.0, 3.0, 6.0]}))
        mean, half = mean_interval([1 / 2, 2 / 3, 1 / 2])
        assert found.value == pytest.approx(mean)
        assert found.low == pytest.approx(mean - half)
        assert found.high == pytest.approx(mean + half)
        assert (found.reference, found.seeds, found.shift) == ("full", 3, 2.0)
        assert found.reference_shift == pytest.approx(11 / 3)

    def test_only_complete_trials_of_the_latest_configuration_count(self) -> None:
        records = runs(**{"1": [1.0, 1.0], "full": [2.0, 2.0]})
        records += [reference(10, "1", 0, 9.0, state="failed"), reference(3, "full", 7, 9.0)]
        old = [reference(-2, "1", 0, 5.0, config_hash="old"), reference(-1, "full", 0, 5.0, config_hash="old")]
        (found,) = estimates([*old, *records])
        assert found.value == 0.5

    def test_norms_that_did_not_move(self) -> None:
        (found,) = estimates(runs(**{"1": [0.0, 0.0], "full": [0.0, 0.0]}))
        assert math.isnan(found.value)
        assert found.note == "the reference's norms did not move: train with a higher rate or for longer."
        assert suggested([found]) is None
        assert found.metrics() == {}

    def test_without_references_there_is_nothing(self) -> None:
        assert estimates([]) == []
        assert estimates(runs(full=[1.0])) == []


class TestExtrapolated:
    @pytest.mark.parametrize(("limit", "slope", "exponent"), [(5.0, 20.0, 0.5), (2.0, 3.0, 1.0), (1.0, -4.0, 0.7)])
    def test_the_fit_finds_the_limit_of_a_known_curve(self, limit: float, slope: float, exponent: float) -> None:
        images = np.array([25.0, 50.0, 100.0, 400.0, 1600.0])
        found = fit_limit(images, limit - slope * images**-exponent)
        assert found[0] == pytest.approx(limit, rel=0.02)
        assert found[2] == pytest.approx(exponent, rel=0.05)

    def samples(self, noise: float = 0.0) -> list[TrialRecord]:
        """Shift(n) = 4 − 10·n^−0.5: 3 at the whole sample of 100 images, so that FSR is 0.75."""
        generator, found = np.random.default_rng(0), list[TrialRecord]()
        for name, images in (("0.25", 25), ("0.5", 50), ("1", 100)):
            for seed in range(3):
                shift = 4 - 10 * images**-0.5 + noise * generator.normal()
                found.append(reference(len(found), name, seed, shift, images))
        return found

    def test_fsr_is_the_share_of_the_limit(self) -> None:
        (found,) = estimates(self.samples())
        assert found.reference == "extrapolated"
        assert found.value == pytest.approx(0.75, abs=0.02)
        assert found.low == pytest.approx(found.value)
        assert found.high == pytest.approx(found.value)
        assert found.lam == pytest.approx(4 / 3, abs=0.04)
        assert [n for n, _, _ in found.points] == [25, 50, 100]

    def test_the_interval_holds_the_truth_and_is_the_same_every_time(self) -> None:
        (found,), (again,) = estimates(self.samples(0.02)), estimates(self.samples(0.02))
        assert found.low < 0.75 < found.high
        assert found.low < found.value < found.high
        assert (found.low, found.high) == (again.low, again.high)

    def test_a_shift_that_does_not_level_off_is_not_believed(self) -> None:
        records = [
            reference(i, name, seed, float(images), images)
            for i, (name, images) in enumerate((("0.25", 25), ("0.5", 50), ("1", 100)))
            for seed in range(2)
        ]
        (found,) = estimates(records)
        assert found.note == (
            "the shift still grows at the whole sample, so that its limit cannot be told; take `full` or more data."
        )
        assert suggested([found]) is None

    def test_two_sizes_are_too_few(self) -> None:
        assert estimates(runs(**{"1": [1.0], "0.5": [0.5]})) == []
        with pytest.raises(ValueError) as error:
            fit_limit(np.array([5.0, 10.0]), np.array([1.0, 2.0]))
        assert str(error.value) == (
            "An extrapolation needs three samples of different sizes, but got [5.0, 10.0]. Give two "
            "diagnostics.fsr_fractions at least."
        )


class TestSentences:
    def estimate(self, value: float, low: float, high: float, reference: str = "full", note: str = "") -> FsrEstimate:
        return FsrEstimate(reference, value, low, high, 1.0, 1.0 / value, 3, note)

    @pytest.mark.parametrize(
        ("values", "sentence"),
        [
            (
                (0.61, 0.54, 0.68),
                "FSR 0.61 [0.54, 0.68] (against the full pool): the sample under-represents the target; λ > 1 is "
                "expected to help, first guess 1.64.",
            ),
            (
                (1.25, 1.1, 1.4),
                "FSR 1.25 [1.10, 1.40] (against the full pool): the norms moved more than representative data moves "
                "them; λ < 1, first guess 0.80.",
            ),
            (
                (0.95, 0.8, 1.1),
                "FSR 0.95 [0.80, 1.10] (against the full pool): the sample may well represent the target; λ = 1 is the "
                "first guess.",
            ),
            (
                (0.5, math.nan, math.nan),
                "FSR 0.50 (against the full pool): one seed is no interval; raise diagnostics.fsr_seeds before "
                "believing it.",
            ),
        ],
    )
    def test_what_the_number_means(self, values: tuple[float, float, float], sentence: str) -> None:
        assert self.estimate(*values).sentence() == sentence

    def test_an_oracle_is_marked_and_never_suggests(self) -> None:
        oracle = self.estimate(0.5, 0.4, 0.6, "oracle:sketch")
        assert oracle.sentence().startswith("FSR 0.50 [0.40, 0.60] (oracle on sketch, for analysis only): ")
        assert suggested([oracle]) is None
        extrapolated = self.estimate(0.5, 0.4, 0.6, "extrapolated")
        assert suggested([oracle, extrapolated]) is extrapolated
        assert suggested([self.estimate(0.9, 0.8, 1.1), oracle]) is None
        assert oracle.metrics() == {
            "fsr/oracle/sketch": 0.5,
            "fsr/oracle/sketch/low": 0.4,
            "fsr/oracle/sketch/high": 0.6,
        }


class TestStage:
    def stage(self, *references: str, **task: Any) -> ReferenceStage:
        shared = Task(store="m", model=ModelSpec(name="m"), epochs=3, batch_size=16, **task)
        return ReferenceStage(shared, shapes(), "id_val", references, (0.5, 0.25), 2, 0)  # type: ignore[arg-type]

    def test_every_sample_has_the_same_steps(self) -> None:
        samples = self.stage("extrapolated", "full", "oracle", train_fraction=0.5).samples()
        shares = {name: (task.train_fraction, task.train_on) for name, task in samples.items()}
        assert shares == {
            "1": (0.5, None),
            "0.25": (0.125, None),
            "0.5": (0.25, None),
            "full": (1.0, None),
            "oracle:inverted": (1.0, "inverted"),
            "oracle:noisy": (1.0, "noisy"),
        }
        assert {task.steps_per_unit for task in samples.values()} == {2}  # 32 images in batches of 16

    def test_seeds_pair_over_samples_and_the_default_point_serves_where_nothing_was_searched(self) -> None:
        specs = self.stage("full").next([])
        assert [(s.sample, s.role) for s in specs] == [("1", "reference"), ("full", "reference")] * 2
        assert specs[0].seed == specs[1].seed != specs[2].seed
        assert specs[0].hparams["lam"] == 1.0
        assert len({s.config_hash for s in specs}) == 1

    def test_the_best_searched_recipe_is_taken_without_its_lambda(self) -> None:
        def searched(number: int, accuracy: float, **hparams: Any) -> TrialRecord:
            return TrialRecord(
                trial_id=str(number), number=number, strategy="layernorm", label="norms", config_hash=str(number),
                state="complete", hparams=hparams, metrics={"best/val/acc": accuracy, "val/nll": 1.0},
            )  # fmt: skip

        history = [searched(0, 0.5, lam=2.0), searched(1, 0.9, lam_choice="sweep", lr_backbone=0.3, wise=0.5)]
        (spec, *_) = self.stage("full").next(history)
        assert (spec.label, spec.hparams) == ("norms", {"lam_choice": "fixed", "lam": 1.0, "lr_backbone": 0.3})


def test_reference_trials_are_never_candidates_nor_reported() -> None:
    search = TrialRecord(
        trial_id="s", number=0, strategy="layernorm", label="layernorm", config_hash="c", state="complete",
        metrics={"best/val/acc": 0.5, "test/acc": 0.5, "val/nll": 1.0},
    )  # fmt: skip
    records = [search, *runs(**{"1": [1.0], "full": [1.0]})]
    assert [choice.record for choice in rank(records)] == [search]
    (row,) = leaderboard(records).to_dict("records")
    assert (row["test/acc"], row["seeds"], row["trials"]) == (0.5, 1, 1)
