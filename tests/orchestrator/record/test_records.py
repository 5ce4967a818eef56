"""Which numbers of a result are kept, and the properties of a record."""

from __future__ import annotations

import math
import traceback
from typing import Any

import numpy as np
import pytest

from orchestrator.record.records import TrialRecord, declared_metrics, study_header
from orchestrator.running.failure_policy import classify, error_line
from trainables import strategies
from trainables.models.weights import create


def test_only_declared_metrics_are_kept() -> None:
    result = {
        "val/acc": np.float32(0.5),
        "ood/noisy/acc": 1,
        "time_total_s": 3.0,
        "pid": 12,
        "config/lr": 0.1,
        "done": True,
        "val/name": "text",
        "info/x": 1.0,
    }
    assert declared_metrics(result) == {"val/acc": 0.5, "ood/noisy/acc": 1.0}


def test_every_strategy_may_report_under_its_own_name() -> None:
    for name in strategies():
        assert declared_metrics({f"{name}/x": 1}) == {f"{name}/x": 1.0}


def test_a_metric_that_is_not_finite_is_missing() -> None:
    record = TrialRecord(trial_id="a", number=0, strategy="full", label="full", metrics={"val/acc": math.nan})
    assert record.metric("val/acc") is None
    assert record.metric("test/acc") is None
    assert record.unit == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("trainables.engine.tune_trainable.NonFiniteError: the loss is nan", "nan"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "oom"),
        ("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.", "host_oom"),
        ("ray.exceptions.ActorDiedError: The actor died unexpectedly: killed by the OOM killer", "host_oom"),
        ("ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.", "infra"),
        (
            "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR. Some common causes "
            "include: (1) the process was killed by the OOM killer due to high memory usage, (2) ray stop --force",
            "infra",
        ),
        ("OSError: [Errno 28] No space left on device", "infra"),
        ("orchestrator.ingest.errors.DataError: class 3 has no image", "data"),
        ("StalledError: no progress for 300 s", "stalled"),
        ("ValueError: C must be positive, but got -1", "user"),
        ("TypeError: unsupported operand", "user"),
        ("  \n", "infra"),
    ],
)
def test_failures_are_classified(text: str, reason: str) -> None:
    assert classify(text) == reason


def test_p4_an_actor_that_went_with_its_machine_is_no_fault_of_the_trial() -> None:
    """Tune stores an error's message, not its type. The soak lost a trial to this."""
    from ray.exceptions import ActorUnavailableError

    why = "The actor is temporarily unavailable: RpcError: RPC error: Socket closed rpc_code: 14."
    message = str(ActorUnavailableError(why, b"0" * 16))
    assert "ActorUnavailableError" not in message
    assert classify(message) == "infra"


def test_the_error_line_is_the_last_that_names_an_error() -> None:
    text = (
        "Failure # 1\nTraceback (most recent call last):\nKeyError: 1\n\nValueError: C must be positive\n    at end\n"
    )
    assert error_line(text) == "ValueError: C must be positive"
    assert error_line("something\nelse\n") == "else"
    assert error_line("") == ""
    long = error_line("E" * 5 + "Error: " + "x" * 3000)
    assert (len(long), long[-2:]) == (2000, "x…")


def test_the_way_out_of_weights_that_are_not_there_is_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any, **fields: Any) -> None:
        raise OSError("Cannot find an appropriate cached snapshot folder for the specified revision. " * 5)

    monkeypatch.setattr("timm.create_model", missing)
    with pytest.raises(ValueError) as error:
        create("vit_base_patch16_224.augreg2_in21k_ft_in1k", pretrained=True, image_size=None)
    text = "".join(traceback.format_exception(error.value))
    assert error_line(text) == f"ValueError: {error.value}"
    assert error_line(text).endswith("or give model.weights.")


def test_the_header_has_the_changes_that_trials_came_before() -> None:
    def started(**changed: Any) -> dict[str, Any]:
        return {"kind": "study_started", "time": 1.0, "spec": {}, "changed": changed}

    def trial(number: int) -> dict[str, Any]:
        return {
            "kind": "trial_suggested",
            "time": 2.0,
            "trial_id": f"t{number}",
            "number": number,
            "strategy": "full",
        }

    events = [started(name=["a", "b"]), trial(0), trial(1), started(), trial(1), started(**{"search.epochs": [9, 4]})]
    assert study_header(events)["changes"] == [{"before": 2, "changed": {"search.epochs": [9, 4]}}]
