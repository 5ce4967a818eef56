"""Fixtures and options that several packages share. Tests get a cache of their own, never the user's."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.trials import MakeTrial

NOT_FOR_TRAINING = ("ray", "mlflow", "optuna", "pydantic", "pydantic_core")
"""Packages that the orchestrator needs and a machine for training alone may lack."""
_MISSING = re.compile(rf"No module named '(?:{'|'.join(NOT_FOR_TRAINING)})[.']")

THOROUGH = (
    "tests/orchestrator/commands/test_check.py",
    "tests/orchestrator/commands/test_cli.py::test_submit_runs_the_module",
    "tests/orchestrator/commands/test_prune.py::test_s12",
    "tests/orchestrator/commands/test_submit.py",
    "tests/orchestrator/commands/test_sync.py",
    "tests/orchestrator/export/test_predictions.py",
    "tests/orchestrator/export/test_timm_folder.py",
    "tests/orchestrator/ingest/test_decoding.py",
    "tests/orchestrator/ingest/test_hostile_data.py",
    "tests/orchestrator/ingest/test_mask_check.py::TestBinary",
    "tests/orchestrator/ingest/test_mask_check.py::TestColours",
    "tests/orchestrator/ingest/test_mask_check.py::TestCommand",
    "tests/orchestrator/ingest/test_mask_check.py::TestLossy",
    "tests/orchestrator/ingest/test_mask_check.py::TestNames::test_m07_other_names",
    "tests/orchestrator/ingest/test_mask_check.py::TestSizes",
    "tests/orchestrator/ingest/test_mask_check.py::TestSplitsAndDomains",
    "tests/orchestrator/ingest/test_mask_store.py",
    "tests/orchestrator/ingest/test_mask_tables.py",
    "tests/orchestrator/ingest/test_pipeline.py",
    "tests/orchestrator/planning/test_fsr.py::TestSearch",
    "tests/orchestrator/planning/test_kept_size.py",
    "tests/orchestrator/planning/test_mask_plan.py",
    "tests/orchestrator/report/test_page.py",
    "tests/orchestrator/results/test_curves.py",
    "tests/orchestrator/results/test_front.py::TestShown",
    "tests/orchestrator/results/test_shift_limit.py::TestInterval::test_it_covers_the_truth_as_often_as_it_states",
    "tests/orchestrator/running/test_circuit_breaker.py::test_p20_a_study_without_one_good_trial_has_failed",
    "tests/orchestrator/running/test_watchdog.py",
    "tests/orchestrator/search/test_allocation.py::TestSearch",
    "tests/orchestrator/search/test_allocation.py::test_an_entry",
    "tests/orchestrator/search/test_allocation.py::test_parallel",
    "tests/orchestrator/search/test_objectives.py",
    "tests/orchestrator/search/test_paper_sweep.py",
    "tests/orchestrator/search/test_promotion_replay.py",
    "tests/orchestrator/search/test_replay.py",
    "tests/orchestrator/search/test_searcher.py",
    "tests/orchestrator/search/test_stages.py",
    "tests/orchestrator/search/test_warm_start.py::TestSampler",
    "tests/orchestrator/search/test_warm_start.py::TestSearch",
    "tests/orchestrator/tracking/test_client.py",
    "tests/orchestrator/tracking/test_follower.py",
    "tests/orchestrator/tracking/test_kept_artifacts.py",
    "tests/orchestrator/tracking/test_local_database.py",
    "tests/orchestrator/tracking/test_mlflow_internals.py",
    "tests/orchestrator/tracking/test_process.py",
    "tests/orchestrator/tracking/test_registered_model.py",
    "tests/orchestrator/tracking/test_tracking_",
    "tests/test_full_fine_tuning.py",
    "tests/test_search_replay.py",
    "tests/test_security.py::TestRecords::test_s7_optunas_database",
    "tests/test_task_seam.py",
    "tests/trainables/diagnostics/test_change.py",
    "tests/trainables/diagnostics/test_distortion.py",
    "tests/trainables/diagnostics/test_gradients.py",
    "tests/trainables/diagnostics/test_plasticity.py::test_it_does_not_depend_on_the_batch_size",
    "tests/trainables/diagnostics/test_plasticity.py::test_memory_does_not_grow_with_the_number_of_pairs",
    "tests/trainables/engine/test_final_evaluation.py::test_a_rung_leaves",
    "tests/trainables/engine/test_keeping.py",
    "tests/trainables/engine/test_loop.py::test_a_step_needs_torch_and_timm_only",
    "tests/trainables/engine/test_refit.py",
    "tests/trainables/engine/test_resume.py",
    "tests/trainables/engine/test_resume_anywhere.py",
    "tests/trainables/engine/test_selection_metric.py",
    "tests/trainables/engine/test_trial.py::test_a_resumed_run_continues_bit_for_bit",
    "tests/trainables/engine/test_trial.py::test_runs_side_by_side",
    "tests/trainables/engine/test_tune_trainable.py",
    "tests/trainables/engine/test_tuned_network.py",
    "tests/trainables/engine/test_weight_interpolation.py::test_a_resumed_trial_restores_its_start",
    "tests/trainables/engine/test_weight_interpolation.py::test_alpha_1_is_the_tuned_network",
    "tests/trainables/engine/test_weight_interpolation.py::test_the_sweep_is_that_of_networks_made_by_hand",
    "tests/trainables/models/test_backbone.py::test_s11_weights_that_the_hub_cannot_give",
    "tests/trainables/models/test_layer_types.py::test_kinds_of_other_families",
    "tests/trainables/models/test_transformer_blocks.py",
    "tests/trainables/storage/test_checkpoint_store.py::test_p3_a_process_killed",
    "tests/trainables/storage/test_kept_weights.py::test_s12",
    "tests/trainables/tasks/test_segmentation_conformance.py",
    "tests/trainables/tasks/test_segmentation_trials.py",
    "tests/trainables/tasks/test_toy_tasks.py",
    "tests/trainables/test_bitfit.py::TestConformance",
    "tests/trainables/test_components.py::TestConformance",
    "tests/trainables/test_daft.py::TestConformance",
    "tests/trainables/test_daft.py::TestNetworks",
    "tests/trainables/test_layernorm.py::TestConformanceOf",
    "tests/trainables/test_layernorm.py::TestSweep",
    "tests/trainables/test_linear_probe.py::test_features_far_from_zero",
    "tests/trainables/test_linear_probe.py::test_it_agrees_with_scikit_learn",
    "tests/trainables/test_lora.py::TestConformanceOf",
    "tests/trainables/test_lp_ft.py::TestConformance",
    "tests/trainables/test_lp_ft.py::test_its_first_loss",
)
"""Beginnings of the names of tests that take seconds each, or many together: marked `thorough`; not in the fast run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("luthier")
    group.addoption(
        "--skip-missing", action="store_true",
        help=f"skip test modules that need {', '.join(NOT_FOR_TRAINING)} where these are not installed",
    )  # fmt: skip
    group.addoption(
        "--pretend-gpu", action="store_true",
        help="let torch report a GPU: a test that leaves its device to the machine then fails here as on a GPU box",
    )  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that take long come first: at the end no worker is left alone with one."""
    for item in items:
        if item.nodeid.startswith(THOROUGH):
            item.add_marker("thorough")
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """With `--skip-missing`, a module that cannot be imported for want of an orchestrator's package is skipped."""
    report: pytest.CollectReport = yield  # type: ignore[assignment, misc]
    if report.outcome == "failed" and collector.config.getoption("skip_missing"):
        missing = _MISSING.search(str(report.longrepr))
        if missing is not None:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: {missing.group()} on this machine")
    return report  # type: ignore[return-value]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`$LUTHIER_CACHE` for the whole session."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def pretended_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--pretend-gpu`, `torch.cuda.is_available()` is true where Luthier's own modules ask.

    Not where torch itself asks: its optimisers would look for the GPU's streams.
    """
    if not request.config.getoption("pretend_gpu"):
        yield
        return
    import torch

    def is_available() -> bool:
        package = str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0]
        return package in ("trainables", "orchestrator", "benchmarks")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", is_available)
        yield


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU in sight, in this process and those that it starts: for code that chooses its device by itself."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`network("vit")` and `network("cnn")`: timm names of tiny local networks."""
    from benchmarks.support.synthetic import write_network

    root = tmp_path_factory.mktemp("networks")
    made: dict[str, str] = {}

    def name(kind: str) -> str:
        if kind not in made:
            made[kind] = f"local-dir:{write_network(kind, root / kind)}"
        return made[kind]

    return name


@pytest.fixture
def make_trial(network: Callable[[str], str], one_thread: None, tmp_path: Path) -> MakeTrial:
    """Short trials of the tiny networks: `make_trial("full", "cnn", lr_backbone=0.01)`."""
    from tests.support.trials import trial_maker

    return trial_maker(network, tmp_path)


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """One torch thread, where speed does not matter and the machine is shared."""
    from trainables.specs.torch_threads import torch_threads

    with torch_threads(1):
        yield
