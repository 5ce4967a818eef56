"""FSR from records: closed forms, intervals, what is said; and which reference trials a study runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks.support.synthetic import shapes
from orchestrator.planning.fsr import ReferenceStage
from orchestrator.record.records import TrialRecord
from orchestrator.results.fsr import IMAGES, SHIFT, FsrEstimate, estimates, study_metrics, suggested
from orchestrator.results.intervals import mean_interval
from orchestrator.results.leaderboard import leaderboard
from orchestrator.results.selection import rank
from orchestrator.search.stages import Entry
from trainables.engine.trial import Trial
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings


def reference(number: int, sample: str, seed: int, shift: float, images: float = 100.0, **fields: Any) -> TrialRecord:
    metrics = {SHIFT: shift, IMAGES: images, "best/val/acc": 0.9, "test/acc": 0.9}
    state = fields.pop("state", "complete")
    return TrialRecord(
        trial_id=str(number), number=number, strategy="layernorm", label="layernorm", seed=seed, role="reference",
        sample=sample, config_hash=fields.pop("config_hash", "c"), state=state, metrics=metrics, **fields,
    )  # fmt: skip


def runs(**samples: list[float]) -> list[TrialRecord]:
    """Sample → shift per seed."""
    records: list[TrialRecord] = []
    for name, shifts in samples.items():
        records += [reference(len(records) + seed, name, seed, shift) for seed, shift in enumerate(shifts)]
    return records


class TestFull:
    def test_the_full_pool_against_itself_is_exactly_one(self) -> None:
        (estimate,) = estimates(runs(**{"1": [1.1, 0.7, 3.3], "full": [1.1, 0.7, 3.3]}))
        assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)
        assert (estimate.lam, estimate.lam_interval) == (1.0, (1.0, 1.0))

    def test_ratios_are_paired_by_seed_with_a_student_interval(self) -> None:
        (estimate,) = estimates(runs(**{"1": [1.0, 2.0, 3.0], "full": [2.0, 3.0, 6.0]}))
        mean, half = mean_interval([1 / 2, 2 / 3, 1 / 2])
        assert estimate.value == pytest.approx(mean)
        assert estimate.low == pytest.approx(mean - half)
        assert estimate.high == pytest.approx(mean + half)
        assert (estimate.reference, estimate.seeds, estimate.shift) == ("full", 3, 2.0)
        assert estimate.reference_shift == pytest.approx(11 / 3)
        assert estimate.by_seed == {0: 1 / 2, 1: 2 / 3, 2: 1 / 2}
        assert estimate.lam == pytest.approx(1 / mean)
        assert estimate.lam_interval == pytest.approx((1 / (mean + half), 1 / (mean - half)))

    def test_seeds_with_training_subsamples_of_their_own(self) -> None:
        """The ratios' spread is that of seeds and subsamples together; the reference has all images."""
        records = [
            reference(0, "1", 0, 1.0, 40.0),
            reference(1, "1#1", 1, 2.0, 40.0),
            reference(2, "1#2", 2, 3.0, 40.0),
        ]
        records += [reference(3 + seed, "full", seed, shift) for seed, shift in enumerate([2.0, 3.0, 6.0])]
        (estimate,) = estimates(records)
        mean, half = mean_interval([1 / 2, 2 / 3, 1 / 2])
        assert (estimate.low, estimate.high) == pytest.approx((mean - half, mean + half))
        assert estimate.basis == "seeds and training subsamples"
        assert estimate.n == "n = 3 seeds, 3 training subsamples of 40 images"
        assert "(against the full pool; n = 3 seeds, 3 training subsamples of 40 images)" in estimate.sentence()

    def test_seeds_on_one_training_sample(self) -> None:
        (estimate,) = estimates(runs(**{"1": [1.0, 2.0], "full": [2.0, 2.0]}))
        assert (estimate.basis, estimate.n) == ("seeds", "n = 2 seeds, 1 training subsample of 100 images")

    def test_a_drawn_trial_takes_the_place_of_an_earlier_one_of_its_seed(self) -> None:
        records = runs(**{"1": [1.0, 9.0], "full": [2.0, 2.0]})
        for order in ([*records, reference(9, "1#1", 1, 1.0)], [reference(9, "1#1", 1, 1.0), *records]):
            (estimate,) = estimates(order)
            assert estimate.by_seed == {0: 0.5, 1: 0.5}

    def test_an_interval_that_holds_zero_leaves_lambda_open(self) -> None:
        (estimate,) = estimates(runs(**{"1": [0.1, 3.0], "full": [1.0, 1.0]}))
        assert estimate.low < 0
        assert estimate.lam_interval[1] == math.inf
        assert suggested([estimate]) is None

    def test_only_complete_trials_of_the_latest_configuration_count(self) -> None:
        records = runs(**{"1": [1.0, 1.0], "full": [2.0, 2.0]})
        records += [reference(10, "1", 0, 9.0, state="failed"), reference(3, "full", 7, 9.0)]
        old = [reference(-2, "1", 0, 5.0, config_hash="old"), reference(-1, "full", 0, 5.0, config_hash="old")]
        (estimate,) = estimates([*old, *records])
        assert estimate.value == 0.5

    @pytest.mark.parametrize(
        ("own", "full", "whose"), [(0.0, 0.0, "reference's"), (1.0, 0.0, "reference's"), (0.0, 1.0, "study's own")]
    )
    def test_norms_that_did_not_move(self, own: float, full: float, whose: str) -> None:
        (estimate,) = estimates(runs(**{"1": [own, own], "full": [full, full]}))
        assert estimate.sentence() == (
            f"No FSR (against the full pool): the {whose} norms did not move: train with a higher rate or for longer."
        )
        assert suggested([estimate]) is None
        assert estimate.metrics() == {}

    def test_seeds_that_do_not_pair(self) -> None:
        (estimate,) = estimates([reference(0, "1", 0, 1.0), reference(1, "full", 1, 1.0)])
        assert estimate.sentence() == "No FSR (against the full pool): no seed has a trial on both samples."

    def test_without_references_there_is_nothing(self) -> None:
        assert estimates([]) == []
        assert estimates(runs(full=[1.0])) == []


class TestExtrapolated:
    def samples(self, noise: float = 0.0) -> list[TrialRecord]:
        """Shift(n) = 4 − 10·n^−0.5: 3 at the whole sample of 100 images, so that FSR is 0.75."""
        generator = np.random.default_rng(0)
        records = list[TrialRecord]()
        for name, images in (("0.25", 25), ("0.5", 50), ("1", 100)):
            for seed in range(3):
                shift = 4 - 10 * images**-0.5 + noise * generator.normal()
                records.append(reference(len(records), name, seed, shift, images))
        return records

    def test_fsr_is_the_share_of_the_limit(self) -> None:
        (estimate,) = estimates(self.samples())
        assert estimate.reference == "extrapolated"
        assert estimate.value == pytest.approx(0.75, abs=0.01)
        assert (estimate.low, estimate.high) == pytest.approx((estimate.value, estimate.value))
        assert estimate.lam == pytest.approx(4 / 3, abs=0.02)
        assert (estimate.shift, estimate.reference_shift) == pytest.approx((3, 4), abs=0.03)

    def test_the_curve_is_measured_at_the_samples_and_extrapolated_to_the_limit(self) -> None:
        (estimate,) = estimates(self.samples())
        assert estimate.curve is not None
        images, shift, fit = (estimate.curve["columns"][name] for name in ("images", "shift", "fit"))
        measured = {n: (s, f) for n, s, f in zip(images, shift, fit, strict=True) if s is not None}
        assert set(measured) == {25, 50, 100}
        assert all(s == pytest.approx(f, abs=0.01) for s, f in measured.values())
        assert images == sorted(images)
        assert images[-1] == pytest.approx(400)
        assert fit[-1] == pytest.approx(4 - 10 / 20, abs=0.02)

    def test_the_interval_holds_the_truth_and_is_the_same_every_time(self) -> None:
        (estimate,) = estimates(self.samples(0.02))
        (again,) = estimates(self.samples(0.02))
        assert estimate.low < 0.75 < estimate.high
        assert estimate.low < estimate.value < estimate.high
        assert (estimate.low, estimate.high) == (again.low, again.high)

    @pytest.mark.parametrize(
        ("shifts", "moves", "if_so"),
        [
            ((25, 50, 100), "grows", " (should it go on growing, the sample under-represents the target: λ > 1)"),
            ((1.0, 1.5, 2.0), "grows", " (should it go on growing, the sample under-represents the target: λ > 1)"),
            ((1.0, 1.0001, 1.0002), "grows", ""),
            ((4.0, 2.0, 0.5), "falls", ""),
        ],
    )
    def test_a_shift_that_does_not_level_off_gives_no_number(
        self, shifts: tuple[float, ...], moves: str, if_so: str
    ) -> None:
        records = [
            reference(10 * i + seed, name, seed, shift * (1 + 0.001 * seed * i), images)
            for i, (name, images, shift) in enumerate(zip(("0.25", "0.5", "1"), (25, 50, 100), shifts, strict=True))
            for seed in range(2)
        ]
        (estimate,) = estimates(records)
        assert estimate.sentence() == (
            f"No FSR (extrapolated): the shift still {moves} at the whole sample, so that its limit cannot be "
            f"told{if_so}; take `full` or more data."
        )
        assert suggested([estimate]) is None
        assert estimate.metrics() == {}

    def test_a_limit_far_beyond_all_samples_is_said_but_not_believed(self) -> None:
        sizes = {"0.25": 25, "0.5": 50, "1": 100}
        shifts = {name: 3 - 8 * n**-0.25 for name, n in sizes.items()}  # 0.47 at the whole sample
        (estimate,) = estimates(
            [reference(n + s, name, s, shifts[name], n) for name, n in sizes.items() for s in (0, 1)]
        )
        assert estimate.sentence().startswith(
            "FSR 0.16 ± 0.00 (extrapolated; n = 2 seeds, 1 training subsample of 100 images): the shift still grows at "
            "the whole sample,"
        )
        assert suggested([estimate]) is None

    def test_samples_of_one_size_leave_the_other_references_alone(self) -> None:
        records = runs(**{"1": [1.0, 1.0], "0.25": [1.0, 1.0], "0.5": [1.0, 1.0], "full": [2.0, 2.0]})
        full, extrapolated = estimates(records)
        assert full.value == 0.5
        assert extrapolated.sentence() == (
            "No FSR (extrapolated): an extrapolation needs samples of three different sizes, but they have 100 images. "
            "List other diagnostics.fsr_fractions."
        )

    def test_seeds_that_are_not_in_every_sample_are_left_out(self) -> None:
        records = self.samples()
        (estimate,) = estimates([r for r in records if (r.sample, r.seed) != ("0.5", 2)])
        assert estimate.seeds == 2
        (none,) = estimates([r for r in records if r.seed == {"0.25": 0, "0.5": 1, "1": 2}[r.sample or ""]])
        assert none.sentence() == "No FSR (extrapolated): no seed has a trial on every nested sample."

    def test_two_sizes_are_too_few(self) -> None:
        assert estimates(runs(**{"1": [1.0], "0.5": [0.5]})) == []


class TestSentences:
    def estimate(self, value: float, low: float, high: float, reference: str = "full", note: str = "") -> FsrEstimate:
        return FsrEstimate(reference, value, low, high, 1.0, 1.0 / value, 3, note)

    @pytest.mark.parametrize(
        ("values", "sentence"),
        [
            (
                (0.61, 0.54, 0.68),
                "FSR 0.61 ± 0.07 (extrapolated): the sample under-represents the target; λ > 1 is expected to help, "
                "first guess λ = 1.64.",
            ),
            (
                (0.61, 0.52, 0.75),
                "FSR 0.61 [0.52, 0.75] (extrapolated): the sample under-represents the target; λ > 1 is expected to "
                "help, first guess λ = 1.64.",
            ),
            (
                (1.25, 1.1, 1.4),
                "FSR 1.25 ± 0.15 (extrapolated): the norms moved more than data of the target move them; λ < 1 is "
                "expected to help, first guess λ = 0.80.",
            ),
            (
                (1.25, 1.1, math.inf),
                "FSR 1.25 [1.10, ∞) (extrapolated): the norms moved more than data of the target move them; λ < 1 is "
                "expected to help, first guess λ = 0.80.",
            ),
            (
                (0.95, 0.8, 1.1),
                "FSR 0.95 ± 0.15 (extrapolated): the sample may well represent the target; λ = 1 is the first guess.",
            ),
            (
                (0.997, 0.65, 0.9999),
                "FSR 1.00 [0.65, 1.00] (extrapolated): the sample may well represent the target; λ = 1 is the first "
                "guess.",
            ),
            (
                (0.5, math.nan, math.nan),
                "FSR 0.50 (extrapolated): one seed is no interval; raise diagnostics.fsr_seeds before believing it.",
            ),
        ],
    )
    def test_what_the_number_means(self, values: tuple[float, float, float], sentence: str) -> None:
        estimate = self.estimate(*values, "extrapolated")
        assert estimate.sentence().replace(f"; {estimate.n}", "") == sentence
        assert (suggested([estimate]) is None) == ("first guess λ" not in sentence)
        full = self.estimate(*values)
        assert full.sentence().replace(f"; {full.n}", "") == sentence.replace("extrapolated", "against the full pool")

    @pytest.mark.parametrize(
        ("values", "meaning"),
        [
            ((0.5, 0.4, 0.6), "the sample under-represents this domain."),
            ((1.0, 0.9, 1.1), "the sample may well represent this domain."),
            ((2.0, 1.9, 2.1), "the norms moved more than data of this domain move them."),
        ],
    )
    def test_an_oracle_is_marked_and_never_suggests(self, values: tuple[float, float, float], meaning: str) -> None:
        oracle = self.estimate(*values, "oracle:sketch")
        assert (
            oracle.sentence() == f"FSR {oracle.number()} (oracle on sketch, for analysis only; {oracle.n}): {meaning}"
        )
        assert suggested([oracle]) is None

    def test_the_full_pool_comes_first_and_an_oracle_never(self) -> None:
        oracle, extrapolated = (self.estimate(0.5, 0.4, 0.6, name) for name in ("oracle:sketch", "extrapolated"))
        assert suggested([oracle, extrapolated]) is extrapolated
        full = self.estimate(0.8, 0.7, 0.9)
        assert suggested([full, extrapolated, oracle]) is full
        assert suggested([self.estimate(0.9, 0.8, 1.1), extrapolated]) is None

    def test_metrics_of_the_study(self) -> None:
        oracle, full = self.estimate(0.5, 0.4, math.inf, "oracle:sketch"), self.estimate(0.8, 0.7, 0.9)
        assert study_metrics([full, oracle]) == {
            "fsr/full": 0.8,
            "fsr/full/low": 0.7,
            "fsr/full/high": 0.9,
            "fsr/oracle/sketch": 0.5,
            "fsr/oracle/sketch/low": 0.4,
            "fsr/lambda": 1.25,
        }
        assert "fsr/lambda" not in study_metrics([oracle])


class TestStage:
    def stage(self, *references: str, **task: Any) -> ReferenceStage:
        entry, rule = task.pop("entry", None), task.pop("rule", "id_val")
        shared = SharedTrialSettings(store="m", model=ModelSpec(name="m"), epochs=3, batch_size=16, **task)
        return ReferenceStage(shared, shapes(), rule, references, (0.5, 0.25), 2, 0, entry)  # type: ignore[arg-type]

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
        specs = self.stage("full", train_fraction=0.5).next([])
        assert [(s.sample, s.train_draw, s.role) for s in specs] == [
            ("1", 0, "reference"), ("full", 0, "reference"), ("1#1", 1, "reference"), ("full", 0, "reference"),
        ]  # fmt: skip
        assert specs[0].seed == specs[1].seed != specs[2].seed
        assert specs[0].hparams["lam"] == 1.0
        assert len({s.config_hash for s in specs}) == 1

    def test_a_sample_of_all_images_has_one_draw_and_its_shares_have_several(self) -> None:
        specs = self.stage("extrapolated").next([])
        assert [(s.sample, s.train_draw) for s in specs] == [
            ("1", 0), ("0.25", 0), ("0.5", 0), ("1", 0), ("0.25#1", 1), ("0.5#1", 1),
        ]  # fmt: skip

    def test_shares_that_do_not_differ_in_size_are_not_trained(self, caplog: pytest.LogCaptureFixture) -> None:
        stage = self.stage("extrapolated", train_fraction=0.125)  # eight images, and four of any smaller share
        assert stage.samples() == {}
        assert stage.next([]) == []
        assert caplog.messages == [
            "FSR cannot be extrapolated: the shares 0.25, 0.5 of the training images do not make two samples of "
            "different sizes below the whole. List other diagnostics.fsr_fractions, or train on more images."
        ]
        assert list(self.stage("extrapolated", "full", train_fraction=0.125).samples()) == ["1", "full"]

    @pytest.mark.parametrize(
        ("entry", "expected"),
        [
            (
                Entry("norms", "layernorm", {"lr_head": 3.0, "norms": "attention"}),
                {"lr_head": 3.0, "norms": "attention"},
            ),
            (Entry("norms", "layernorm", {"train": "gamma"}, preset="cyclic"), {"lr_backbone": 0.1, "train": "gamma"}),
        ],
    )
    def test_the_default_point_is_that_of_the_entry(self, entry: Entry, expected: dict[str, Any]) -> None:
        (spec, *_) = self.stage("full", entry=entry).next([])
        assert spec.label == "norms"
        assert expected.items() <= spec.hparams.items()
        assert (spec.hparams["lam_choice"], spec.hparams["lam"]) == ("fixed", 1.0)

    def test_a_rule_that_lacks_its_folds_gives_way_to_validation(self) -> None:
        record = TrialRecord(
            trial_id="a", number=0, strategy="layernorm", label="norms", config_hash="a", state="complete",
            hparams={"lr_backbone": 0.3}, metrics={"best/val/acc": 0.5, "val/nll": 1.0},
        )  # fmt: skip
        (spec, *_) = self.stage("full", rule="leave_one_domain_out").next([record])
        assert spec.hparams["lr_backbone"] == 0.3

    def test_the_best_searched_recipe_is_taken_without_its_lambda(self) -> None:
        def searched(number: int, accuracy: float, **hparams: Any) -> TrialRecord:
            return TrialRecord(
                trial_id=str(number), number=number, strategy="layernorm", label="norms", config_hash=str(number),
                state="complete", hparams=hparams, metrics={"best/val/acc": accuracy, "val/nll": 1.0},
            )  # fmt: skip

        history = [searched(0, 0.5, lam=2.0), searched(1, 0.9, lam_choice="sweep", lr_backbone=0.3, wise=0.5)]
        (spec, *_) = self.stage("full").next(history)
        assert (spec.label, spec.hparams) == ("norms", {"lam_choice": "fixed", "lam": 1.0, "lr_backbone": 0.3})


def test_the_full_pool_against_itself_in_real_trials(network: Callable[[str], str]) -> None:
    """The stage's own trials on a pool of which all is used: the same numbers, so that FSR is 1 without rounding."""
    shared = SharedTrialSettings(store="m", model=ModelSpec(name=network("vit")), epochs=2, batch_size=16)
    stage = ReferenceStage(shared, shapes(), "id_val", ("full", "extrapolated"), (0.5, 0.25), 2, 0)  # type: ignore[arg-type]
    records = []
    for number, spec in enumerate(stage.next([])):
        run = Trial(spec, store=shapes(), device="cpu")
        result = dict[str, Any]()
        while not run.finished:
            result = run.step()
        metrics = {name: float(result[name]) for name in (SHIFT, IMAGES)}
        records.append(
            TrialRecord(
                trial_id=str(number),
                number=number,
                strategy=spec.strategy,
                label=spec.label,
                seed=spec.seed,
                role=spec.role,
                sample=spec.sample,
                config_hash=spec.config_hash,
                state="complete",
                metrics=metrics,
            )
        )
    full, extrapolated = estimates(records)
    assert (full.value, full.low, full.high) == (1.0, 1.0, 1.0)
    assert full.shift > 0
    assert extrapolated.seeds == 2
    assert [r.metric(IMAGES) for r in records[:4]] == [64, 16, 32, 64]


def test_reference_trials_are_never_candidates_nor_reported() -> None:
    search = TrialRecord(
        trial_id="s", number=0, strategy="layernorm", label="layernorm", config_hash="c", state="complete",
        metrics={"best/val/acc": 0.5, "test/acc": 0.5, "val/nll": 1.0},
    )  # fmt: skip
    records = [search, *runs(**{"1": [1.0], "full": [1.0]})]
    assert [choice.record for choice in rank(records)] == [search]
    (row,) = leaderboard(records).to_dict("records")
    assert (row["test/acc"], row["seeds"], row["trials"]) == (0.5, 1, 1)
