"""Plasticity on a trial's data: which images make pairs, and that the pretrained network is measured once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.support.synthetic import shapes
from trainables.data.trial_data import TrialData
from trainables.diagnostics import plasticity
from trainables.diagnostics.plasticity import image_pairs, measure_plasticity, plasticity_after, plasticity_of
from trainables.models.backbone import load_pretrained
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec

Make = Callable[..., TrialData]


@pytest.fixture
def make(network: Callable[[str], str], tmp_path: Path, one_thread: None) -> Make:
    def make(kind: str = "vit", **fields: Any) -> TrialData:
        model = ModelSpec(name=network(kind))
        task = SharedTrialSettings(store="memory", model=model, cache=str(tmp_path / "cache"), **fields)
        return TrialData(TrialSpec(shared=task, strategy="full"), shapes(), load_pretrained(model), "cpu")

    return make


def whole(data: TrialData) -> tuple[Tensor, Tensor]:
    x, y = zip(*image_pairs(data), strict=True)
    return torch.cat(x), torch.cat(y)


def split(data: TrialData, name: str) -> Tensor:
    return torch.cat([images for images, _ in data.batches(name)])


def test_pairs_of_training_images_hold_each_image_once(make: Make) -> None:
    data = make()
    x, y = whole(data)
    assert len(x) == len(y) == 32
    both = torch.cat([x, y]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 64
    assert torch.equal(both.sort(0).values, split(data, "train").flatten(1).sort(0).values)


def test_pairs_with_a_source_domain(make: Make) -> None:
    data = make(plasticity_source="inverted")
    x, y = whole(data)
    assert torch.equal(x, split(data, "ood/inverted"))
    assert torch.equal(y, split(data, "train")[:32])


@pytest.mark.parametrize("source", [None, "inverted"])
def test_no_more_pairs_than_asked_for_and_in_batches(
    make: Make, monkeypatch: pytest.MonkeyPatch, source: str | None
) -> None:
    monkeypatch.setattr(plasticity, "BATCH", 4)
    data = make(plasticity_source=source, plasticity_pairs=10)
    assert [(len(x), len(y)) for x, y in image_pairs(data)] == [(4, 4), (4, 4), (2, 2)]


def test_the_training_fraction_counts(make: Make) -> None:
    assert len(whole(make(train_fraction=0.25))[0]) == 8


@pytest.mark.parametrize("probe", ["embedding", "in_situ"])
def test_it_is_the_plasticity_of_the_pretrained_network_on_these_pairs(make: Make, probe: Any) -> None:
    data = make(plasticity_probe=probe, plasticity_pairs=12)
    expected = measure_plasticity(data.backbone.module, *whole(data), probe)
    measured = plasticity_of(data)
    assert (measured.probe, measured.pairs) == (probe, 12)
    assert measured.mean == pytest.approx(expected.mean, rel=1e-6)
    assert plasticity_after(data.reference, data) == measured


def test_it_is_measured_once_per_data_and_settings(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    original = plasticity.measure_pairs

    def counted(*arguments: Any) -> Any:
        measured.append(arguments[2])
        return original(*arguments)

    monkeypatch.setattr(plasticity, "measure_pairs", counted)
    first = plasticity_of(make())
    assert plasticity_of(make()) == first
    assert plasticity_of(make(epochs=7)) == first
    assert measured == ["embedding"]
    for other in ({"plasticity_probe": "in_situ"}, {"plasticity_source": "noisy"}, {"plasticity_pairs": 9}):
        assert plasticity_of(make(**other)) != first
        plasticity_of(make(**other))
    plasticity_of(make(train_fraction=0.5))
    assert len(measured) == 5


def test_a_damaged_file_is_measured_again(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    data = make()
    first = plasticity_of(data)
    (file,) = data.solution_folder.glob("plasticity-*.json")
    for damage in ("", "[1]", '{"probe": "embedding"}'):
        file.write_text(damage)
        assert plasticity_of(data) == first
        assert "is damaged" in caplog.text
        caplog.clear()
    assert plasticity_of(data) == first
    assert not caplog.text


def test_a_source_that_is_no_ood_domain_is_refused(make: Make) -> None:
    with pytest.raises(ValueError) as error:
        plasticity_of(make(plasticity_source="bright"))
    assert str(error.value) == "plasticity_source must be one of the OOD domains (inverted, noisy), but got 'bright'."


def test_a_network_without_transformer_blocks_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"^The components ln1, mha, ln2, fc1 and fc2 need transformer blocks"):
        plasticity_of(make("cnn"))
