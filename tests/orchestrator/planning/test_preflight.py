"""What could not run is refused before anything is spent, word for word, and all of it at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from orchestrator.errors import PreflightError
from orchestrator.planning.preflight import layer_kinds, preflight
from orchestrator.study_file.schema import StudySpec
from tests.support.images import write_plain_images
from trainables import strategy_class

PETS = {f"{d}/{c}": 4 for d in ("photo", "sketch") for c in ("cat", "dog")}
Problems = Callable[..., list[str]]


@pytest.fixture
def problems(tmp_path: Path, network: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Problems:
    """The problems of a sound study with some of its parts changed."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def found(images: dict[str, int] | None = None, **sections: Any) -> list[str]:
        root = write_plain_images(tmp_path / "pets", PETS if images is None else images)
        fields: dict[str, Any] = {
            "name": "pets",
            "data": {"root": str(root), "id": ["photo"], "ood": ["sketch"]},
            "model": {"name": network("vit")},
            "strategies": ["linear_probe", "full"],
            "storage": str(tmp_path / "studies"),
        }
        for key, value in sections.items():
            fields[key] = {**fields[key], **value} if isinstance(fields.get(key), dict) else value
        try:
            preflight(StudySpec.from_fields(fields))
        except PreflightError as error:
            return [str(problem) for problem in error.problems]
        return []

    return found


def test_a_sound_study_passes(problems: Problems) -> None:
    assert problems() == []


class TestData:
    """The words are asserted where they are written (tests/orchestrator/ingest); here, that they come in time."""

    def test_a_missing_folder(self, problems: Problems, tmp_path: Path) -> None:
        (message,) = problems(data={"root": str(tmp_path / "pest")})
        assert message.startswith("data: ")
        assert f"{tmp_path}/pest" in message

    def test_a_class_only_in_ood(self, problems: Problems) -> None:
        (message,) = problems(images={**PETS, "sketch/fox": 2})
        assert message.startswith("data: ")
        assert "'fox'" in message
        assert "sketch" in message

    def test_an_empty_domain(self, problems: Problems, tmp_path: Path) -> None:
        (tmp_path / "pets/painting").mkdir(parents=True)
        (message,) = problems(data={"ood": ["painting"]})
        assert message.startswith("data: ")
        assert "there is none in painting" in message

    def test_a_domain_that_is_not_there(self, problems: Problems) -> None:
        (message,) = problems(data={"ood": ["painting"]})
        assert message.startswith("data: ")
        assert "'painting'" in message
        assert "photo, sketch" in message

    def test_one_domain_that_leave_one_domain_out_finds_only_when_it_looks(self, problems: Problems) -> None:
        one = {"id": [], "ood": ["sketch"]}
        assert problems(data=one, search={"objective": "leave_one_domain_out"}) == [
            "search.objective: leave_one_domain_out needs at least 2 ID domains, but the data have 1: photo. Use "
            "id_val."
        ]


class TestModel:
    def test_c4_an_unknown_name_with_near_misses(self, problems: Problems) -> None:
        (message,) = problems(model={"name": "resnet81"})
        assert message.startswith("model: ")
        assert "'resnet81'" in message
        assert "'resnet18'" in message

    def test_weights_that_are_not_there(self, problems: Problems) -> None:
        (message,) = problems(model={"name": "resnet18", "weights": "none.safetensors"})
        assert message.startswith("model: ")
        assert "none.safetensors" in message

    @pytest.mark.parametrize(
        ("model", "kinds"),
        [
            ("digits_vit", {"layer_norm", "attention", "transformer_block"}),
            ("levit_128s", {"batch_norm", "attention"}),
            ("digits_cnn", {"batch_norm"}),
            ("resnet18", {"batch_norm"}),
            ("convnext_atto", {"layer_norm"}),
            ("convnext_atto_rms", {"layer_norm"}),
        ],
    )
    def test_layers_of_a_network(self, model: str, kinds: set[str]) -> None:
        assert layer_kinds(model) == kinds

    def test_c4_a_strategy_that_the_network_cannot_serve(
        self, problems: Problems, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(strategy_class("full"), "needs", frozenset({"layer_norm"}))
        assert problems(model={"name": "resnet18"}) == [
            "strategies[1]: full needs a network with layer_norm layers, but resnet18 has none. Leave it out, or use "
            "daft, which adapts BatchNorm to the target data."
        ]
        monkeypatch.setattr(strategy_class("full"), "needs", frozenset({"transformer_block"}))
        assert problems(model={"name": "resnet18"}) == [
            "strategies[1]: full needs a network with transformer_block layers, but resnet18 has none. Leave it out."
        ]


class TestMachines:
    def test_c5_more_cpus_than_there_are(self, problems: Problems) -> None:
        here = os.cpu_count() or 1
        (message,) = problems(resources={"cpus": 4096.0})
        assert message.startswith("resources: A trial asks for 4096 CPUs and 0 GPUs, but the largest machine has ")
        assert f" {here} CPU" in message
        assert message.endswith(
            "it would wait for ever. Lower `resources.cpus` or `resources.gpus` in the study, or add a machine of "
            "that size to the cluster."
        )

    def test_c5_more_gpus_than_there_are(self, problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        (message,) = problems(resources={"gpus": 1})
        assert message.startswith("resources: A trial asks for 1 CPU and 1 GPU, but the largest machine has ")

    def test_a_cluster_is_asked_later(self, problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
        assert problems(resources={"cpus": 4096.0}) == []


class TestBudgetAndStorage:
    def test_a_budget_below_the_default_points(self, problems: Problems) -> None:
        assert problems(strategies=["linear_probe", {"name": "daft", "preset": "paper"}], search={"trials": 9}) == [
            "search.trials: The default points and sweeps of linear_probe, daft take 15 trials, but search.trials is "
            "9. Raise it to 15 or more, or leave entries out."
        ]

    @pytest.mark.parametrize(
        "entry",
        [{"name": "layernorm", "fixed": {"cycles": 2}}, {"name": "layernorm", "preset": "cyclic"}],
    )
    def test_a_budget_below_the_phases_that_a_trial_may_have(self, problems: Problems, entry: Any) -> None:
        assert problems(strategies=[entry], search={"epochs": 3}) == [
            "strategies[0]: 2 cycles of head and norms take at least 4 units, but the trial has 3. Give it more "
            "epochs, or fewer cycles."
        ]
        assert problems(strategies=["full", "linear_probe", "lp_ft", "layernorm"], search={"epochs": 1}) == []

    def test_s3_storage_that_is_a_file(self, problems: Problems, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert problems(storage=str(tmp_path / "file/studies")) == [
            f"storage: storage is a folder, but {tmp_path}/file is a file. Choose another path."
        ]


def test_everything_at_once(problems: Problems, tmp_path: Path) -> None:
    messages = problems(
        data={"root": str(tmp_path / "none")},
        model={"name": "resnet81"},
        resources={"cpus": 4096},
        search={"trials": 1},
    )
    assert [message.partition(":")[0] for message in messages] == ["data", "model", "search.trials", "resources"]


class TestObjectives:
    SEARCH: ClassVar = {"objectives": ["id_val", "trainable_parameters"], "scheduler": "none"}

    @pytest.mark.parametrize("strategies", [
        ["linear_probe", "full"], ["lora"], ["components"], ["full", "bitfit"],
        [{"name": "components", "fixed": {"kinds": "auto"}}],
    ])  # fmt: skip
    def test_entries_that_differ_in_their_parameters(self, problems: Problems, strategies: list[Any]) -> None:
        assert problems(strategies=strategies, search=self.SEARCH) == []

    @pytest.mark.parametrize(("strategies", "labels"), [
        (["full"], "full"),
        (["full", "lp_ft"], "full, lp_ft"),
        (["layernorm"], "layernorm"),
        ([{"name": "lora", "fixed": {"rank": 4}}], "lora"),
    ])  # fmt: skip
    def test_entries_that_do_not(self, problems: Problems, strategies: list[Any], labels: str) -> None:
        assert problems(strategies=strategies, search=self.SEARCH) == [
            "search.objectives[1]: the number of trained parameters is an objective where configurations differ in it, "
            f"but it is the same for all of {labels}. Add an entry that trains fewer or more, free a hyperparameter "
            "that changes it (such as lora's rank), or leave trainable_parameters out."
        ]
        assert problems(strategies=strategies) == []

    def test_memory_on_a_machine_that_does_not_report_it(
        self, problems: Problems, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        search = {"objectives": ["id_val", "peak_memory"], "scheduler": "none"}
        assert problems(search=search) == []
        monkeypatch.setattr("orchestrator.planning.objectives._HOST_MEMORY", tmp_path / "none")
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        (message,) = problems(search=search)
        assert message.startswith("search.objectives[1]: peak_memory is that of the GPU, or of the host")
        assert message.endswith("Run the study elsewhere, or leave peak_memory out.")
        monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
        assert problems(search=search) == []
