"""Every sentence, word for word, on records made for it; and its absence where the records do not support it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from orchestrator.record.records import TrialRecord
from orchestrator.results.findings import findings
from orchestrator.results.fsr import estimates
from orchestrator.results.leaderboard import configuration, leaderboard, relative_gain
from orchestrator.results.study_results import Results
from orchestrator.wording import listed
from tests.support.records import FULL, PROBE, Values, entry, shift_ratio


def said(*entries: list[TrialRecord], plasticity: Mapping[str, float] | None = None) -> list[str]:
    measured = {}
    if plasticity is not None:
        metrics = {f"plasticity/{kind}": value for kind, value in plasticity.items()}
        measured["plasticity"] = {"metrics": metrics, "curves": {}}
    return findings([record for group in entries for record in group], "id_val", measured)


def about(sentences: list[str], *words: str) -> list[str]:
    return [sentence for sentence in sentences if all(word in sentence for word in words)]


CLOSE = entry(2, "lp_ft", (0.955, 0.965, 0.975), (0.60, 0.61, 0.62))


class TestBest:
    def test_intervals_that_overlap_make_the_order_uncertain(self) -> None:
        first, second, *_ = said(FULL, PROBE, CLOSE)
        assert first == (
            "Best in distribution: full (test 97.0 ± 2.5 %, 3 seeds), then lp_ft (96.5 ± 2.5 %), with a difference of "
            "0.5 points; over seeds alone: no per-sample results, so that the order may be chance."
        )
        assert second == (
            "Best out of distribution: lp_ft (OOD mean 61.0 ± 2.5 %, 3 seeds), then linear_probe (50.0 ± 0.0 %), with "
            "a difference of 11.0 points; over seeds alone: no per-sample results, so that the order may be chance."
        )

    def test_one_seed_is_no_interval(self) -> None:
        single = entry(3, "daft", 0.9)
        assert said(single, entry(4, "lora", 0.8, 0.6)) == [
            "Best in distribution: daft (test 90.0 %, 1 seed), then lora (80.0 %), with a difference of 10.0 points; "
            "one seed, so that the order may be chance.",
            "Best out of distribution: lora (OOD mean 60.0 %, 1 seed), then daft (50.0 %), with a difference of 10.0 "
            "points; one seed, so that the order may be chance.",
        ]

    def test_a_domain_that_was_given_up_for_validation_is_not_ood(self) -> None:
        domains = {"ood__a__acc": 0.2, "ood__b__acc": 0.8}
        records = entry(0, "full", 0.9, **domains) + entry(1, "daft", 0.8, ood__a__acc=0.4, ood__b__acc=0.9)
        assert "Best out of distribution: daft (OOD mean 40.0 %, 1 seed)" in findings(records, "val_domain:b")[1]

    def test_alone_or_unfinished_there_is_nothing_to_say(self) -> None:
        assert said(FULL) == []
        assert said([TrialRecord(trial_id="t", number=0, strategy="full", label="full", state="failed")]) == []


class TestGain:
    def test_relative_to_linear_probing(self) -> None:
        assert relative_gain(0.97, 0.90) == pytest.approx(0.07 / 0.90)
        assert relative_gain(0.5, 0.0) != relative_gain(0.5, 0.0)  # NaN
        assert about(said(FULL, PROBE, CLOSE), "gain") == [
            "Relative gain over linear probing (linear_probe): in distribution from lp_ft +7.2 % (over "
            "seeds alone: no per-sample results) to full +7.8 % (over seeds alone: no per-sample results); out of "
            "distribution from full -18.0 % (over seeds alone: no per-sample results) to lp_ft +22.0 % (over seeds "
            "alone: no per-sample results)."
        ]

    def test_the_gain_of_one_seed_states_it(self) -> None:
        assert about(said(entry(0, "full", 0.99), entry(1, "linear_probe", 0.9)), "gain") == [
            "Relative gain over linear probing (linear_probe): in distribution full +10.0 % (one seed); out of "
            "distribution full +0.0 % (one seed)."
        ]

    def test_one_run_of_the_probe_stands_for_every_seed_of_an_entry(self) -> None:
        (gain,) = about(said(FULL, entry(1, "linear_probe", 0.90)), "gain")
        assert "one seed" not in gain

    def test_the_leaderboard_has_it_where_there_is_a_probe(self) -> None:
        table = leaderboard(FULL + PROBE + CLOSE).set_index("label")
        assert table.loc["full", "gain"] == pytest.approx((0.97 - 0.90) / 0.90)
        assert table.loc["full", "gain/ood"] == pytest.approx((0.41 - 0.50) / 0.50)
        assert table.loc["linear_probe", "gain"] == 0
        assert "gain" not in leaderboard(FULL + CLOSE).columns

    @pytest.mark.parametrize("width", [80, 120])
    def test_it_is_shown(self, width: int) -> None:
        results = Results(FULL + PROBE + CLOSE, {"name": "pets"})
        console = Console(file=io.StringIO(), width=width)
        results.render(console)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "97.0 ± 2.5" in text
        assert ("full: trial 0, gain +7.8 %, -18.0 % OOD, -" in text) == (width == 80)
        assert "linear_probe: trial 100, -" in text
        assert "+7.8 %" in text
        assert "…" not in text
        assert "| gain | gain OOD |" in results.markdown()
        assert "| +7.8 % | -18.0 % |" in results.markdown()


P = {"mha": 1.93, "fc1": 1.5, "fc2": 1.2, "ln1": 0.4, "ln2": 0.35}


def alone(kind: str, number: int, test: Values) -> list[TrialRecord]:
    flags: dict[str, Values] = {f"components__{k}": float(k == kind) for k in P}
    return entry(number, f"only_{kind}", test, strategy="components", components__selected=1.0, **flags)


class TestPlasticity:
    def test_the_rank_alone(self) -> None:
        assert said(plasticity=P) == [
            "MHA is the most plastic component (P 1.93; FC1 1.50, FC2 1.20, LN1 0.40, LN2 0.35)."
        ]

    def test_in_how_many_blocks(self) -> None:
        curve = {"columns": {"block": ["0", "1", "2"], "mha": [2.0, 1.0, 3.0], "fc1": [1.0, 1.5, 2.0]}, "note": ""}
        metrics = {"plasticity/mha": 2.0, "plasticity/fc1": 1.5}
        measured = {"plasticity": {"metrics": metrics, "curves": {"plasticity": curve}}}
        assert findings([], "id_val", measured) == [
            "MHA is the most plastic component (P 2.00, the highest in 2 of 3 blocks; FC1 1.50)."
        ]

    def test_the_share_of_full_fine_tunings_gain(self) -> None:
        mha = alone("mha", 3, (0.968, 0.968, 0.968))
        (sentence,) = about(said(FULL, PROBE, mha, plasticity=P), "most plastic")
        assert sentence == (
            "MHA is the most plastic component (P 1.93; FC1 1.50, FC2 1.20, LN1 0.40, LN2 0.35) and, trained alone, "
            "reaches 96.8 ± 0.0 % on the ID test; full fine-tuning's own gain over linear probing (+7.0 points) is not "
            "certain (over seeds alone: no per-sample results), so that there is no share of it to tell."
        )

    def test_full_fine_tuning_is_that_without_wise(self) -> None:
        better = entry(0, "full_wise", (0.98, 0.98, 0.98), strategy="full", hparams={"wise": "sweep"})
        plain = entry(7, "full", (0.96, 0.97, 0.98))
        (sentence,) = about(said(better, PROBE, plain, alone("mha", 3, (0.968,) * 3), plasticity=P), "most plastic")
        assert "linear probing (+7.0 points)" in sentence

    def test_a_share_of_nothing_is_not_reported(self) -> None:
        weak = entry(0, "full", (0.89, 0.91, 0.93))
        (sentence,) = about(said(weak, PROBE, alone("mha", 3, (0.92, 0.92, 0.92)), plasticity=P), "most plastic")
        assert sentence.endswith(
            "and, trained alone, reaches 92.0 ± 0.0 % on the ID test; full fine-tuning's own gain over linear probing "
            "(+1.0 points) is not certain (over seeds alone: no per-sample results), so that there is no share of it "
            "to tell."
        )

    def test_a_loss_has_no_share(self) -> None:
        lost = entry(0, "full", (0.80, 0.81, 0.82))
        (sentence,) = about(said(lost, PROBE, alone("mha", 3, (0.92, 0.92, 0.92)), plasticity=P), "most plastic")
        assert sentence.endswith(
            "and, trained alone, reaches 92.0 ± 0.0 % on the ID test; full fine-tuning itself gains nothing over "
            "linear probing (81.0 ± 2.5 % against 90.0 ± 0.0 %), so that there is no share of a gain to tell."
        )

    def test_less_than_linear_probing_is_no_share_either(self) -> None:
        worse = alone("mha", 3, (0.85, 0.85, 0.85))
        (sentence,) = about(said(FULL, PROBE, worse, plasticity=P), "most plastic")
        assert sentence.endswith(
            "and, trained alone, gains nothing over linear probing (ID test 85.0 ± 0.0 % against 90.0 ± 0.0 %)."
        )

    def test_without_full_or_probe_the_accuracy_is_said(self) -> None:
        (sentence,) = about(said(alone("mha", 3, 0.9), plasticity=P), "most plastic")
        assert sentence.endswith("and, trained alone, reaches 90.0 % on the ID test.")

    def test_plasticity_and_accuracy_may_agree_or_not(self) -> None:
        mha, fc1 = alone("mha", 3, (0.95, 0.95, 0.95)), alone("fc1", 4, (0.96, 0.96, 0.96))
        assert about(said(mha, fc1, plasticity=P), "Of the components") == [
            "Of the components trained alone, FC1 is the best on the ID test (96.0 ± 0.0 %), not the most plastic one, "
            "MHA (95.0 ± 0.0 %); over seeds alone: no per-sample results, so that the order may be chance."
        ]
        near = alone("fc1", 4, (0.93, 0.945, 0.96))
        assert about(said(mha, near, plasticity=P), "Of the components") == [
            "Of the components trained alone, the most plastic one is also the best on the ID test: MHA (95.0 ± 0.0 "
            "%), then FC1 (94.5 ± 3.7 %); over seeds alone: no per-sample results, so that the order may be chance."
        ]

    def test_entries_that_train_several_components_do_not_count(self) -> None:
        both = entry(3, "two", 0.9, strategy="components", components__selected=2.0, components__mha=1.0)
        assert about(said(both, plasticity=P), "trained alone") == []


def sweep(column: str, **rows: Sequence[float]) -> dict[str, Any]:
    columns = {column: [0.0, 1.0, 1.4], **{name.replace("__", "/"): list(values) for name, values in rows.items()}}
    return {"columns": columns, "note": ""}


LN_CURVES = [
    {"lambda": sweep("lambda", test__acc=(0.8, 0.90, 0.91), ood__mean__acc=(0.5, 0.50, 0.55))},
    {"lambda": sweep("lambda", test__acc=(0.8, 0.90, 0.90), ood__mean__acc=(0.5, 0.50, 0.56))},
    {"lambda": sweep("lambda", test__acc=(0.8, 0.90, 0.89), ood__mean__acc=(0.5, 0.50, 0.57))},
]
LN = entry(
    5, "ln", (0.9, 0.9, 0.9), strategy="layernorm", hparams={"lam_choice": "sweep"}, curves=LN_CURVES,
    layernorm__lambda=(1.4, 1.4, 1.4),
)  # fmt: skip


class TestLambda:
    def test_what_the_choice_changed(self) -> None:
        assert said(LN) == [
            "ln: best λ on validation was 1.40; against λ = 1 it changes ID test accuracy by +0.0 ± 2.5 points (within "
            "the interval) and OOD mean accuracy by +6.0 ± 2.5 points."
        ]

    def test_beside_fsr(self) -> None:
        references = shift_ratio(0.60, 0.61, 0.62)
        first, second = said(LN, references)
        assert [first] == [estimate.sentence() for estimate in estimates(references)]
        assert first.startswith("FSR 0.61")
        assert second.startswith("ln: best λ on validation was 1.40, as FSR 0.61 suggests λ > 1; against λ = 1 ")
        assert said(LN, shift_ratio(1.20, 1.21, 1.22))[1].startswith(
            "ln: best λ on validation was 1.40, while FSR 1.21 suggests λ < 1; against"
        )

    def test_an_fsr_that_may_be_one_suggests_nothing(self) -> None:
        assert "suggests" not in " ".join(said(LN, shift_ratio(0.5, 1.0, 1.5)))

    def test_an_oracle_suggests_nothing(self) -> None:
        first, second = said(LN, shift_ratio(0.60, 0.61, 0.62, "oracle:noisy"))
        assert first == "FSR against labelled OOD images (oracle, for analysis only): noisy 0.61 ± 0.02."
        assert second.startswith("ln: best λ on validation was 1.40; against")

    def test_seeds_that_differ(self) -> None:
        mixed = entry(5, "ln", (0.9, 0.9), hparams={"lam_choice": "sweep"}, layernorm__lambda=(0.8, 1.2))
        assert said(mixed) == ["ln: best λ on validation was 1.00 (0.80 to 1.20 over 2 seeds)."]

    def test_a_lambda_that_was_not_chosen_is_not_mentioned(self) -> None:
        assert said(entry(5, "ln", 0.9, hparams={"lam": 1.0}, layernorm__lambda=1.0)) == []

    def test_a_lambda_that_the_search_chose_is(self) -> None:
        records = entry(5, "ln", 0.9, hparams={"lam": 1.3}, layernorm__lambda=1.3)
        other = entry(6, "ln", 0.9, hparams={"lam": 0.7}, layernorm__lambda=0.7)[:1]
        assert said(records, other) == ["ln: best λ on validation was 1.30."]

    def test_a_cyclic_sweep_starts_from_rescaled_weights(self) -> None:
        cyclic = entry(
            5, "cyclic", (0.9, 0.9, 0.9), hparams={"lam_choice": "sweep", "cycles": 2}, curves=LN_CURVES,
            layernorm__lambda=(1.4, 1.4, 1.4),
        )  # fmt: skip
        assert said(cyclic) == ["cyclic: best λ on validation was 1.40."]


class TestWise:
    def test_alpha_and_what_it_changed(self) -> None:
        curves = [{"wise": sweep("alpha", test__acc=(0.1, 0.9, 0.8), ood__mean__acc=(0.1, 0.5, 0.7))}] * 2
        wise = entry(5, "full_wise", (0.9, 0.9), strategy="full", curves=curves, wise__alpha=(1.4, 1.4))
        assert said(wise) == [
            "full_wise: best α on validation was 1.40; against α = 1 it changes ID test accuracy by -10.0 ± 0.0 points "
            "and OOD mean accuracy by +20.0 ± 0.0 points."
        ]

    def test_a_given_alpha_was_not_chosen(self) -> None:
        assert said(entry(5, "full_wise", 0.9, strategy="full", wise__alpha=0.5)) == []


def moved(number: int, label: str, cosine: float, ood: float, accuracy: float) -> list[TrialRecord]:
    names = {"distortion__test__cosine": cosine, "distortion__ood__a__cosine": ood, "distortion__ood__b__cosine": ood}
    return entry(number, label, 0.9, accuracy, **names)


class TestDistortion:
    def test_who_moved_the_features(self) -> None:
        frozen = moved(9, "linear_probe", 1.0, 1.0, 0.5)
        assert about(said(moved(0, "full", 0.71, 0.62, 0.4), moved(1, "lora", 0.98, 0.95, 0.5), frozen), "cosine") == [
            "full moved the features most: mean cosine 0.710 on the ID test and 0.620 on OOD before and after; lora "
            "least of those that move them: 0.980 on the ID test and 0.950 on OOD."
        ]

    def test_alone_it_is_no_comparison(self) -> None:
        assert about(said(moved(0, "full", 0.71, 0.62, 0.4), moved(9, "linear_probe", 1.0, 1.0, 0.5)), "cosine") == []

    def test_less_distortion_with_better_accuracy(self) -> None:
        entries = [moved(n, f"e{n}", 0.5 + 0.1 * n, 0.5 + 0.1 * n, 0.3 + 0.1 * n) for n in range(5)]
        assert about(said(*entries), "Over") == [
            "Over 5 entries, less distortion of OOD features goes with better OOD accuracy (Kendall's τ +1.00, p 0.02)."
        ]

    def test_no_clear_relation(self) -> None:
        accuracies = (0.5, 0.3, 0.6, 0.2, 0.4)
        entries = [moved(n, f"e{n}", 0.5, 0.5 + 0.1 * n, accuracy) for n, accuracy in enumerate(accuracies)]
        assert about(said(*entries), "Over") == [
            "Over 5 entries, distortion of OOD features and OOD accuracy show no clear relation (Kendall's τ -0.20, p "
            "0.82)."
        ]

    def test_four_entries_are_too_few(self) -> None:
        assert about(said(*(moved(n, f"e{n}", 0.5, 0.5 + 0.1 * n, 0.3 + 0.1 * n) for n in range(4))), "Over") == []


class TestWords:
    def test_lists(self) -> None:
        assert [listed(list(word)) for word in ("a", "ab", "abc", "abcd")] == [
            "a", "a and b", "a, b and c", "a, b and 2 others",
        ]  # fmt: skip


def test_findings_are_everywhere_that_results_are() -> None:
    results = Results(FULL + PROBE + CLOSE, {"name": "pets"}, measurements={"plasticity": {"metrics": {}}})
    findings = results.findings()
    assert len(findings) == 3
    assert results.to_dict()["findings"] == findings
    assert results.to_dict()["measurements"] == {"plasticity": {"metrics": {}}}
    assert all(f"- {sentence}\n" in results.markdown() for sentence in findings)
    console = Console(file=io.StringIO(), width=400)
    results.render(console)
    assert all(f"- {sentence}\n" in console.file.getvalue() for sentence in findings)  # type: ignore[attr-defined]


CHOICE = {
    "linear_probe__C": 0.0231, "linear_probe__C_low": 0.003, "linear_probe__C_high": 10.0,
    "linear_probe__within_se": 40.0, "linear_probe__path": 100.0,
}  # fmt: skip


def test_the_linear_probe_states_its_c_and_how_flat_the_curve_was() -> None:
    probe = entry(1, "linear_probe", 0.9, **CHOICE)
    started_there = entry(2, "lp_ft", 0.9, **CHOICE)
    assert about(said(probe, started_there), "C = ") == [
        "linear_probe: C = 0.0231 by validation; of 100 values, 40 from 0.003 to 10 are within one standard error of "
        "the best."
    ]
    assert not about(said(PROBE), "C = ")


def test_the_rows_of_the_leaderboard_have_c_beside_the_hyperparameters() -> None:
    records = [
        *entry(0, "lp_ft", 0.9, hparams={"lr_backbone": 0.003}, **CHOICE),
        *entry(1, "linear_probe", 0.9, **CHOICE),
        *entry(2, "earlier", 0.9, strategy="linear_probe", linear_probe__C=1.0),
        *entry(3, "given", 0.9, strategy="linear_probe", hparams={"C": 2.0}, linear_probe__C=2.0),
        *FULL,
    ]
    table = leaderboard(records).set_index("label")
    assert table.loc["linear_probe", "linear_probe/within_se"] == 40
    assert np.isnan(table.loc["full", "linear_probe/C"])
    flat = "C=0.0231 (40 of 100 values, 0.003 to 10, within one SE of the best on validation)"
    assert {label: configuration(row) for label, row in table.iterrows()} == {
        "lp_ft": f"lr_backbone=0.003 {flat}", "linear_probe": flat, "earlier": "C=1", "given": "C=2", "full": "-",
    }  # fmt: skip
