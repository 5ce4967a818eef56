"""Plasticity-guided tuning: what moves, what `auto` chooses, and the recipe of Odonnat et al. (2026)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import yaml

import search_spaces
from tests.conformance import StrategyConformance
from tests.support.trials import MakeTrial
from trainables.components import Components
from trainables.diagnostics.plasticity import plasticity_of
from trainables.engine.trial import Trial
from trainables.models.transformer_blocks import COMPONENTS, component_kinds


class TestConformance(StrategyConformance):
    strategy = "components"
    networks = ("vit",)
    learning: ClassVar[Mapping[str, Any]] = {"lr_backbone": 0.03, "lr_head": 1.0}
    reports = frozenset(["components/*"])


@pytest.fixture
def trial(make_trial: MakeTrial) -> Callable[..., Trial]:
    return partial(make_trial, "components", task={"epochs": 1})


def moved(run: Trial) -> set[str]:
    """Kinds of the parameters that the trial's training changed; all others are equal bit for bit."""
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    owners = component_kinds(run.model)
    run.step()
    return {owners[name] for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("kinds", [*COMPONENTS, "mha+fc1", "ln1+mha+ln2+fc1+fc2"])
def test_exactly_the_chosen_components_the_final_norm_and_the_head_move(
    trial: Callable[..., Trial], kinds: str
) -> None:
    run = trial(kinds=kinds, lr_backbone=0.03)
    chosen = set(kinds.split("+"))
    assert moved(run) == chosen | {"final_norm", "head"}
    owners = component_kinds(run.model)
    moving = [n for n, p in run.model.named_parameters() if owners[n] in chosen | {"final_norm", "head"}]
    groups = {group.name: len(group.parameters) for group in run.param_groups()}
    assert sum(groups.values()) == len(moving)
    assert groups["head"] == 2


def test_the_embedding_never_moves(trial: Callable[..., Trial]) -> None:
    run = trial(kinds=list(COMPONENTS), lr_backbone=0.03)
    names = ("pos_embed", "cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias")
    before = {name: run.model.backbone.state_dict()[name].clone() for name in names}
    run.step()
    after = run.model.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in names)


def test_auto_takes_the_most_plastic_components_of_the_pretrained_network(trial: Callable[..., Trial]) -> None:
    rank = plasticity_of(trial().data).rank
    for k in (1, 3):
        run = trial(kinds="auto", k=k)
        metrics = run.step()
        chosen = {kind for kind in COMPONENTS if metrics[f"components/{kind}"]}
        assert chosen == set(rank[:k])
        assert metrics["components/selected"] == k
    assert trial().step()["components/selected"] == 2


def test_auto_follows_the_measurement(trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = plasticity_of(trial().data)
    for rank in (["ln2", "mha", "fc1", "fc2", "ln1"], ["fc2", "ln1", "mha", "fc1", "ln2"]):
        report = dataclasses.replace(measured, rank=rank)
        monkeypatch.setattr("trainables.components.plasticity_of", lambda data, r=report: r)
        assert moved(trial(kinds="auto", k=1, lr_backbone=0.03)) == {rank[0], "final_norm", "head"}


def test_the_choice_is_recorded(trial: Callable[..., Trial]) -> None:
    metrics = trial(kinds=["fc2", "ln1"]).step()
    chosen = {name: value for name, value in metrics.items() if name.startswith("components/")}
    assert chosen == {
        "components/selected": 2.0,
        **{f"components/{kind}": float(kind in ("ln1", "fc2")) for kind in COMPONENTS},
    }


def test_kinds_come_as_a_choice_of_a_search_or_as_a_list_of_a_study_file() -> None:
    for text in ("auto", "mha", "fc1 + mha", "[mha, fc1]", "[fc1, mha]", "[auto]"):
        kinds = yaml.safe_load(text)
        config = Components.Config(kinds=kinds)
        assert config.kinds == ("auto" if "auto" in text else "mha" if text == "mha" else "mha+fc1")
        json.dumps(config.kinds)
    for choice in search_spaces.space("components")["kinds"].distribution.choices:  # type: ignore[attr-defined]
        assert Components.Config(kinds=choice).kinds == choice


@pytest.mark.parametrize("kinds", ["attention", "mha+mha", "", [], ["mha", "auto"], 3, None])
def test_other_kinds_are_refused(kinds: Any) -> None:
    with pytest.raises(ValueError) as error:
        Components.Config(kinds=kinds)
    assert str(error.value) == (
        "kinds must be 'auto' or some of ln1, mha, ln2, fc1, fc2, each once, as a list or such as 'mha+fc1', but got "
        f"{kinds!r}."
    )


def test_k_belongs_to_auto() -> None:
    with pytest.raises(ValueError) as error:
        Components.Config(kinds="mha", k=2)
    assert str(error.value) == (
        "k is how many components kinds='auto' takes, but got k=2 beside kinds='mha'. Leave k out, or set kinds to "
        "'auto'."
    )
    for k in (0, 6, 1.5, True):
        with pytest.raises(ValueError) as error:
            Components.Config(k=k)
        assert str(error.value) == f"k must be a whole number from 1 to 5, but got {k!r}."


def test_a_network_without_transformer_blocks_is_refused(trial: Callable[..., Trial]) -> None:
    with pytest.raises(ValueError, match=r"^The components ln1, mha, ln2, fc1 and fc2 need transformer blocks of .*"):
        trial("cnn", kinds="mha").step()


def test_a_component_without_parameters_is_refused(
    trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_ln1(model: torch.nn.Module) -> dict[str, str]:
        return {name: "other" if kind == "ln1" else kind for name, kind in component_kinds(model).items()}

    monkeypatch.setattr("trainables.components.component_kinds", without_ln1)
    with pytest.raises(ValueError) as error:
        trial(kinds="ln1").step()
    assert str(error.value) == "A component to be trained must have parameters, but ln1 has none in this network."


def test_the_recipe_is_that_of_the_paper() -> None:
    config = Components.Config()
    assert (config.optimizer, config.momentum, config.clip_norm, config.schedule) == ("sgd", 0.9, 1.0, "cosine")
    assert (config.weight_decay, config.lr_head) == (0.0, None)
    paper = search_spaces.preset("components", "paper")
    assert paper.steps == ({"lr_backbone": (1e-3, 3e-3, 1e-2, 3e-2)},)
    assert paper.fixed == {"lr_head": None}
    each = search_spaces.preset("components", "paper_each")
    assert each.size == 20
    assert each.steps[0]["kinds"] == COMPONENTS
    for preset in (paper, each):
        for point in preset.points(0):
            Components.Config(**preset.fixed, **point)


def test_k_is_searched_only_beside_auto() -> None:
    assert search_spaces.searched("components") == ["kinds", "k", "lr_backbone", "lr_head"]
    assert search_spaces.searched("components", {"kinds": "mha"}) == ["lr_backbone", "lr_head"]
    assert search_spaces.searched("components", {"kinds": ["mha", "fc1"]}) == ["lr_backbone", "lr_head"]
    assert "k" in search_spaces.searched("components", {"kinds": "auto"})
