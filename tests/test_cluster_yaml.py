"""cluster.yaml against Ray's own schema and defaults (no cloud is asked), and the recipes of docs/cluster.md."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cluster.auth import ClusterError
from orchestrator.cluster.machines import Cluster, MachineKind, autoscaled_kinds
from orchestrator.cluster.resources import ResourceError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def merged(raw: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` works with: our file over Ray's AWS defaults."""
    from ray.autoscaler._private.util import prepare_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(raw))
    return prepared


def _validate(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(config)


def _ray_requirement() -> str:
    """`ray[tune,default]>=a,<b` as pyproject.toml declares it."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(str(line) for line in declared if re.match(r"ray\b", line))


def test_ray_accepts_the_file(merged: dict[str, Any]) -> None:
    """Ray's own validation raises nothing; the next test shows what it does raise."""
    _validate(merged)


def test_ray_would_notice_a_wrong_key_and_a_wrong_amount(merged: dict[str, Any]) -> None:
    wrong_key = {**copy.deepcopy(merged), "idle_timeout_hours": 1}
    with pytest.raises(BaseException, match="idle_timeout_hours"):
        _validate(wrong_key)
    wrong_amount = copy.deepcopy(merged)
    wrong_amount["available_node_types"]["gpu_spot"]["resources"]["GPU"] = 0.5
    with pytest.raises(BaseException, match=r"0\.5"):
        _validate(wrong_amount)


def test_none_of_rays_open_or_nightly_defaults_survives(merged: dict[str, Any]) -> None:
    everything = yaml.safe_dump(merged)
    assert "0.0.0.0" not in everything
    assert "dev0" not in everything
    assert "latest/ray" not in everything
    starts = [line for line in merged["head_start_ray_commands"] if "--head" in line]
    assert len(starts) == 1
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_every_ray_that_is_started_asks_for_the_token(merged: dict[str, Any]) -> None:
    starts = [
        line for line in merged["head_start_ray_commands"] + merged["worker_start_ray_commands"] if "ray start" in line
    ]
    assert len(starts) == 2
    for line in starts:
        assert "RAY_AUTH_MODE=token" in line.partition("ray start")[0]
    assert merged["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_installed_ray_is_pinned_to_what_pyproject_asks() -> None:
    import ray
    from packaging.requirements import Requirement

    pins = re.findall(r"ray\[[a-z,]+\]==([0-9.]+)", (ROOT / "cluster.yaml").read_text())
    assert pins == [ray.__version__]
    assert Requirement(_ray_requirement()).specifier.contains(pins[0])


def test_head_runs_no_trials_and_workers_are_spot_machines_that_go_when_idle(merged: dict[str, Any]) -> None:
    kinds = merged["available_node_types"]
    head = kinds[merged["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "GPU" not in head["resources"]
    worker = kinds["gpu_spot"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert worker["min_workers"] == 0
    assert worker["max_workers"] == merged["max_workers"] == 8
    assert worker["resources"] == {"CPU": 8, "GPU": 1}
    assert merged["idle_timeout_minutes"] == 10
    assert merged["provider"]["cache_stopped_nodes"] is False


def test_trials_are_planned_for_the_machines_that_the_file_may_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the head of a fresh `ray up` cluster, where not one GPU machine is there yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert autoscaled_kinds() == []
    (tmp_path / "ray_bootstrap_config.yaml").write_text((ROOT / "cluster.yaml").read_text())
    assert autoscaled_kinds() == [MachineKind(resources={"CPU": 8.0, "GPU": 1.0}, max_count=8)]
    monkeypatch.setattr(Cluster, "_alive_nodes", lambda self: [{"memory": 1e9}])
    cluster = Cluster(address="10.0.0.7:6379", dashboard=None, started=False)
    assert cluster.trial_resources(2, "auto") == {"cpu": 2.0, "gpu": 1.0}
    assert cluster.concurrency(None, 2, 1) == 8
    assert cluster.concurrency(None, 2, 0.25) == 32
    assert cluster.concurrency(3, 2, 1) == 3
    assert cluster.concurrency(100, 2, 1) == 8
    with pytest.raises(ResourceError, match="largest machine has 8 CPUs and 1 GPU"):
        cluster.trial_resources(16, 1)
    # Another cluster, started here: the file does not mention it.
    with pytest.raises(ResourceError, match="largest machine has 0 CPUs and 0 GPUs"):
        Cluster(address="127.0.0.1:1", dashboard=None, started=True).trial_resources(2, 1)


def test_on_kubernetes_requests_are_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_USAGE_STATS_KUBERAY_IN_USE", "1")
    monkeypatch.setattr(Cluster, "_alive_nodes", lambda self: [{"CPU": 4.0}])
    cluster = Cluster(address="10.0.0.7:6379", dashboard=None, started=False)
    assert cluster.trial_resources(16, 1) == {"cpu": 16.0, "gpu": 1.0}
    assert cluster.concurrency(6, 16, 1) == 6
    assert cluster.concurrency(None, 16, 1) == 1


def test_paths_that_a_machine_does_not_see_are_refused_with_advice_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """URLs are refused by the study file, so that no advice may name them."""
    monkeypatch.setattr("orchestrator.cluster.machines._unseen", lambda paths: [("10.0.0.7", path) for path in paths])
    cluster = Cluster(address="10.0.0.7:6379", dashboard=None, started=False)
    with pytest.raises(ClusterError) as caught:
        cluster.check_shared("/data/pets", Path("/studies"))
    assert str(caught.value) == (
        "Data and storage must be visible to every machine of the cluster, but 10.0.0.7 does not see /data/pets, "
        "10.0.0.7 does not see /studies. Give paths on storage that every machine mounts at the same place (such as "
        "NFS, EFS or FSx)."
    )
    Cluster(address="127.0.0.1:1", dashboard=None, started=True).check_shared("/data/pets")


@pytest.mark.parametrize("document", ["cluster.yaml", "docs/cluster.md", "README.md"])
def test_no_document_offers_object_stores_for_data(document: str) -> None:
    text = (ROOT / document).read_text()
    assert re.findall(r"s3://|gs://|\bbucket\b|by URL", text) == []


def _blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "cluster.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_kubernetes_recipes_ask_for_the_token_and_the_same_ray() -> None:
    import ray

    documents = [document for block in _blocks("yaml") for document in yaml.safe_load_all(block)]
    by_kind = {document["kind"]: document for document in documents if document.get("apiVersion") == "ray.io/v1"}
    assert set(by_kind) == {"RayCluster", "RayJob"}
    clusters = [by_kind["RayCluster"]["spec"], by_kind["RayJob"]["spec"]["rayClusterSpec"]]
    for spec in clusters:
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["rayVersion"] == ray.__version__
    variables = yaml.safe_load(by_kind["RayJob"]["spec"]["runtimeEnvYAML"])["env_vars"]
    assert variables == {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30"}


def test_no_recipe_of_the_docs_opens_the_dashboard_or_forgets_the_token() -> None:
    shell = "\n".join(_blocks("bash") + _blocks("ini")).replace("\\\n", " ")
    starts = [line for line in shell.splitlines() if "ray start" in line and not line.lstrip().startswith("#")]
    assert len(starts) >= 2
    assert "0.0.0.0" not in shell
    for line in starts:
        assert "--head" not in line or "--dashboard-host=127.0.0.1" in line
    assert shell.count("RAY_AUTH_MODE=token") >= 2
