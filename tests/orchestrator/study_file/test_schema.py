"""The study file: what it accepts, and every message word for word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import Problem, StudyError, dotted, redact
from orchestrator.ingest.digits import OOD_DOMAINS
from orchestrator.search.allocation import ALLOCATIONS
from orchestrator.search.sampling import SAMPLERS
from orchestrator.study_file.load import load_study
from orchestrator.study_file.rules import DIGITS_DOMAINS
from orchestrator.study_file.schema import SearchSpec, StudySpec
from trainables import strategies

FIELDS: dict[str, Any] = {
    "name": "pets",
    "data": {"root": "pets", "id": ["photo"], "ood": ["sketch", "painting"]},
    "model": {"name": "resnet18"},
    "strategies": ["linear_probe", "full"],
}
KNOWN = ", ".join(strategies())


def study(**sections: Any) -> StudySpec:
    """The example with parts replaced, or, where both are mappings, extended."""
    fields = {**FIELDS}
    for key, value in sections.items():
        both = isinstance(value, dict) and isinstance(fields.get(key), dict)
        fields[key] = {**fields[key], **value} if both else value
    return StudySpec.from_fields(fields)


def problems(**sections: Any) -> list[str]:
    with pytest.raises(StudyError) as caught:
        study(**sections)
    return [str(problem) for problem in caught.value.problems]


class TestAccepted:
    def test_the_smallest_study_has_defaults(self) -> None:
        spec = study()
        assert (spec.search.trials, spec.search.sampler, spec.search.objective) == (40, "tpe", "id_val")
        assert spec.data.image_size is None
        assert [(entry.name, entry.label) for entry in spec.strategies] == [
            ("linear_probe", "linear_probe"),
            ("full", "full"),
        ]
        assert spec.experiment == "pets"
        assert spec.tracking_uri == f"sqlite:///{Path('studies').absolute()}/mlflow.db"

    def test_the_example_of_the_design(self, tmp_path: Path) -> None:
        file = tmp_path / "study.yaml"
        file.write_text(
            "name: pets\n"
            "data:     {source: folder, root: /data/pets, id: [photo], ood: [sketch, painting], image_size: 224}\n"
            "model:    {name: vit_base_patch16_224.augreg_in21k, pretrained: true}\n"
            "strategies: [linear_probe, full, lp_ft, daft]\n"
            "search:   {trials: 60, epochs: 20, sampler: tpe, scheduler: asha, objective: id_val, seed: 0}\n"
            "confirm:  {top_k: 3, seeds: 3}\n"
            "resources: {cpus: 2, gpus: auto}\n"
            "tracking: {uri: http://mlflow:5000, experiment: pets}\n"
            "storage:  /shared/luthier\n"
        )
        spec = load_study(file)
        assert spec.resources.cpus == 2
        assert spec.tracking_uri == "http://mlflow:5000"
        assert [entry.name for entry in spec.strategies] == ["linear_probe", "full", "lp_ft", "daft"]

    def test_c2_numbers_in_scientific_notation(self, tmp_path: Path) -> None:
        file = tmp_path / "study.yaml"
        file.write_text(
            "name: a\ndata: {source: digits}\nmodel: {name: digits_vit}\n"
            "strategies: [{name: daft, fixed: {lr_backbone: 1e-3}}]\n"
        )
        assert load_study(file).strategies[0].fixed == {"lr_backbone": 0.001}

    def test_paths_count_from_the_folder_of_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "study.yaml"
        file.write_text(
            "name: a\ndata: {root: images}\nmodel: {name: local-dir:net, weights: w.safetensors}\nstrategies: [full]\n"
            "tracking: {uri: sqlite:///runs.db}\n"
        )
        spec = load_study(file)
        assert spec.data.root == str(tmp_path / "images")
        assert spec.model.name == f"local-dir:{tmp_path}/net"
        assert spec.model.weights == str(tmp_path / "w.safetensors")
        assert spec.storage == str(tmp_path / "studies")
        assert spec.tracking_uri == f"sqlite:///{tmp_path}/runs.db"

    def test_what_a_study_dumps_is_the_same_study(self, tmp_path: Path) -> None:
        spec = study(
            strategies=["full", {"name": "daft", "label": "ablation", "fixed": {"bn_conversion": False}}],
            resources={"gpus": 0.25},
            search={"objective": "val_domain:sketch"},
        )
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
        again = load_study(file)
        assert again.strategies == spec.strategies
        assert again.search == spec.search
        assert again.resources == spec.resources

    def test_a_validation_domain(self) -> None:
        assert study(search={"objective": "val_domain:sketch"}).search.validation_domain == "sketch"
        assert study().search.validation_domain is None

    def test_domains_of_the_built_in_data(self) -> None:
        assert set(DIGITS_DOMAINS) == set(OOD_DOMAINS)

    def test_objectives(self) -> None:
        costs = ["trainable_parameters", "device_seconds", "peak_memory"]
        spec = study(search={"objectives": ["id_val", *costs], "scheduler": "none"})
        assert spec.search.costs == tuple(costs)
        assert spec.confirm.count(3, bool(spec.search.costs)) == 6
        assert study(confirm={"top_k": 2}).confirm.count(3, True) == 2
        assert study().search.costs == ()
        domain = {"objective": "val_domain:sketch", "objectives": ["val_domain:sketch", "peak_memory"]}
        assert study(search={**domain, "scheduler": "none", "sampler": "gp"}).search.costs == ("peak_memory",)

    def test_samplers_are_those_of_the_search(self) -> None:
        choices = SearchSpec.model_json_schema()["properties"]["sampler"]["enum"]
        assert set(choices) == set(SAMPLERS)

    def test_allocations_are_those_of_the_search(self) -> None:
        assert set(SearchSpec.model_json_schema()["properties"]["allocation"]["enum"]) == set(ALLOCATIONS)

    def test_sweeps_cannot_be_allocated(self) -> None:
        with pytest.raises(ValueError, match=r"the papers' sweeps have .* 'equal' with sampler paper"):
            study(search={"sampler": "paper", "allocation": "equal"})

    def test_halving_has_one_objective(self) -> None:
        objectives = {"objectives": ["id_val", "trainable_parameters"], "scheduler": "none"}
        with pytest.raises(ValueError, match=r"halving drops entries by the first objective"):
            study(search={**objectives, "allocation": "halving"})
        assert study(search={**objectives, "allocation": "equal"}).search.allocation == "equal"

    @pytest.mark.parametrize("gpus", ["auto", 0, 0.25, 1])
    def test_gpus(self, gpus: Any) -> None:
        assert study(resources={"gpus": gpus}).resources.gpus == gpus

    def test_a_study_cannot_be_changed(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            study().name = "other"


class TestAllAtOnce:
    def test_c1_every_problem_with_its_line(self, tmp_path: Path) -> None:
        file = tmp_path / "study.yaml"
        file.write_text(
            "name: pets\n"
            "data: {rot: /data/pets, id: photo}\n"
            "model: {name: resnet18, pretrained: no}\n"
            "strategies: [ful]\n"
            "search:\n"
            "  trials: '60'\n"
            "  seed: -1\n"
        )
        with pytest.raises(StudyError) as caught:
            load_study(file)
        keys = "source, root, id, ood, image_size, crop_pct, interpolation, mean, std, val_fraction, test_fraction, "
        keys += (
            "train_fraction, seed, on_bad, on_leak, copies, label, labels, ignore, mask, augment, evaluation, sampling"
        )
        assert str(caught.value) == "\n".join(
            [
                f"{file} is not valid, 6 problems:",
                "  line 2, data.id: must be a list, but got the string 'photo'. Write [photo].",
                f"  line 2, data.rot: unknown key. Did you mean 'root'? Known here: {keys}.",
                "  line 3, model.pretrained: must be a boolean, but got the string 'no'. Write true or false without "
                "quotes: YAML 1.2 has no other booleans.",
                f"  line 4, strategies[0]: a strategy is one of {KNOWN}, but got 'ful'. Did you mean 'full'?",
                "  line 6, search.trials: must be an integer, but got the string '60'. Remove the quotes.",
                "  line 7, search.seed: must be at least 0, but got -1.",
            ]
        )

    def test_an_empty_study(self) -> None:
        with pytest.raises(StudyError) as caught:
            StudySpec.from_fields({})
        assert str(caught.value) == (
            "The study is not valid, 4 problems:\n"
            "  name: is required, but missing. Give the study (or model, or strategy) a name.\n"
            "  data: is required, but missing. Say where your images are: data: {root: /path/to/images}, or "
            "data: {source: digits}.\n"
            "  model: is required, but missing. Name a pretrained network: model: {name: resnet18}.\n"
            "  strategies: is required, but missing. List what should compete: strategies: [linear_probe, full]."
        )


class TestRefused:
    @pytest.mark.parametrize(
        ("sections", "message"),
        [
            (
                {"modle": {}},
                "modle: unknown key. Did you mean 'model'? Known here: name, task, data, model, strategies, search, "
                "warm_start, loss, confirm, diagnostics, evaluate, resources, failures, tracking, keep, storage.",
            ),
            ({"search": {"trials": 2.5}}, "search.trials: must be an integer, but got the number 2.5."),
            ({"search": {"trials": True}}, "search.trials: must be an integer, but got true."),
            (
                {"search": {"reduction": "1e1"}},
                "search.reduction: must be a number, but got the string '1e1'. Remove the quotes. (YAML 1.1 parsers "
                "read 1e-3 as a string even without quotes: write 1.0e-3 there.)",
            ),
            (
                {"search": {"reduction": float("nan")}},
                "search.reduction: must be a finite number, but got the number nan.",
            ),
            ({"search": {"reduction": 1}}, "search.reduction: must be greater than 1, but got 1."),
            ({"search": {"trials": None}}, "search.trials: must be an integer, but got null."),
            (
                {"model": "resnet18"},
                "model: must be a mapping of keys to values, but got the string 'resnet18'. Write {name: resnet18}.",
            ),
            (
                {"search": {"epochs": 1e1}},
                "search.epochs: must be an integer, but got the number 10.0. Write 10.",
            ),
            (
                {"data": {"ood": []}, "search": {"objective": "val_domain:art"}},
                "search.objective: val_domain names one of the OOD domains, but got 'art' and data.ood lists nothing. "
                "List it there.",
            ),
            ({"search": []}, "search: must be a mapping of keys to values, but got the list []."),
            (
                {"search": {"sampler": "TPE"}},
                "search.sampler: must be one of tpe, gp, random, paper, but got the string 'TPE'. Did you mean 'tpe'?",
            ),
            (
                {"search": {"grace": 21}},
                "search.grace: 1 <= grace <= epochs must hold, but got grace 21 and epochs 20.",
            ),
            (
                {"search": {"objective": "oracle"}},
                "search.objective: oracle selects on test data and is only reported as an upper bound. Use id_val, "
                "leave_one_domain_out, or val_domain:<name> with a domain that is then no longer a test.",
            ),
            (
                {"search": {"objective": "id_vall"}},
                "search.objective: must be one of id_val, leave_one_domain_out, val_domain:<name>, but got 'id_vall'. "
                "Did you mean 'id_val'?",
            ),
            (
                {"search": {"objective": "val_domain:scetch"}},
                "search.objective: val_domain names one of the OOD domains, but got 'scetch' and data.ood lists "
                "sketch, "
                "painting. Did you mean 'sketch'?",
            ),
            (
                {"search": {"objective": "leave_one_domain_out"}},
                "search.objective: leave_one_domain_out needs at least 2 ID domains, but data.id has 1: photo. List "
                "more "
                "domains there, or use id_val.",
            ),
            (
                {"search": {"objectives": ["id_val", "trainable_parameter"], "scheduler": "none"}},
                "search.objectives[1]: a cost is one of trainable_parameters, device_seconds, peak_memory, but got "
                "'trainable_parameter'. Did you mean 'trainable_parameters'?",
            ),
            (
                {"search": {"objectives": ["id_val", "peak_memory", "peak_memory"], "scheduler": "none"}},
                "search.objectives[2]: the cost 'peak_memory' is listed twice.",
            ),
            (
                {"search": {"objectives": ["device_seconds", "peak_memory"], "scheduler": "none"}},
                "search.objectives[0]: the first objective is that of search.objective, id_val, but got "
                "'device_seconds'. Write [id_val, …] with costs after it.",
            ),
            (
                {"search": {"objectives": ["id_val"], "scheduler": "none"}},
                "search.objectives: objectives are search.objective and one or more of trainable_parameters, "
                "device_seconds, peak_memory, but got [id_val]. Add a cost, or leave objectives out.",
            ),
            (
                {"search": {"objectives": ["id_val", "device_seconds"]}},
                "search.scheduler: asha stops trials by id_val alone, cheap ones before their cost could count, but "
                "got objectives [id_val, device_seconds]. Set scheduler: none, or leave objectives out.",
            ),
            (
                {"search": {"objectives": ["id_val", "device_seconds"], "scheduler": "promote"}},
                "search.scheduler: promote stops trials by id_val alone, cheap ones before their cost could count, but "
                "got objectives [id_val, device_seconds]. Set scheduler: none, or leave objectives out.",
            ),
            (
                {"search": {"objectives": ["id_val", "device_seconds"], "scheduler": "none", "sampler": "random"}},
                "search.sampler: objectives steer a sampler that learns from results, but random proposes the same "
                "without them. Use tpe or gp, or leave objectives out: the costs of every configuration are recorded "
                "anyway.",
            ),
            (
                {
                    "data": {"id": ["photo", "art"]},
                    "search": {
                        "objective": "leave_one_domain_out",
                        "objectives": ["id_val", "device_seconds"],
                        "scheduler": "none",
                    },
                },
                "search.objective: leave_one_domain_out compares a few configurations that are best on ID validation, "
                "so that cheap ones would get no folds, but got objectives [id_val, device_seconds]. Use id_val, or "
                "leave objectives out.",
            ),
            (
                {"data": {"ood": ["photo"]}},
                "data.ood[0]: the domain 'photo' is both ID and OOD. Remove it from one of the two lists.",
            ),
            ({"data": {"id": ["photo", "photo"]}}, "data.id[1]: the domain 'photo' is listed twice."),
            ({"data": {"id": [1]}}, "data.id[0]: must be a string, but got the number 1. Put quotes around it."),
            ({"data": {"root": None}}, "data.root: the source 'folder' needs a root: the path of your images."),
            (
                {"data": {"source": "digits", "id": [], "ood": []}},
                "data.root: the source 'digits' is built in and has no root. Remove one of the two.",
            ),
            (
                {"data": {"source": "digits", "root": None, "id": [], "ood": ["noise"]}},
                "data.ood[0]: digits has the OOD domains inverted, rotated, noisy, blurred, printed, but got "
                "'noise'. Did "
                "you mean 'noisy'?",
            ),
            (
                {"data": {"label": "label_clean"}},
                "data.label: only Parquet files and manifests have a label column to choose, but the source is "
                "'folder'. Remove one of the two.",
            ),
            (
                {"data": {"root": "pets", "source": "folder", "ignore": [254]}},
                "data.ignore: only segmentation has ignore, but the task is classification. Set task: segmentation, or "
                "remove it.",
            ),
            (
                {"task": "segmentation", "data": {"source": "npz", "root": "x.npz"}},
                "data.source: pictures with masks come from folder or parquet or manifest or digits_scenes, but got "
                "'npz'.",
            ),
            (
                {"task": "segmentation", "data": {"root": "x", "mask": "trimap"}},
                "data.mask: only tables have a mask column, but the source is 'folder'. Remove one of the two.",
            ),
            (
                {"task": "segmentation", "data": {"source": "parquet", "root": "x", "label": "y"}},
                "data.label: the classes of segmentation are in the masks, but a label column is given: 'y'. Remove "
                "it; data.mask names the column with the masks.",
            ),
            (
                {"data": {"root": "s3://bucket/pets"}},
                "data.root: root is a path on this machine, but got the URL 's3://bucket/pets'. Copy the data to a "
                "folder "
                "that all machines can read.",
            ),
            (
                {"data": {"val_fraction": 0.6, "test_fraction": 0.5}},
                "data.test_fraction: val_fraction + test_fraction must be less than 1, but got 0.6 + 0.5: nothing "
                "would be "
                "left to train on.",
            ),
            (
                {"name": "a/b"},
                "name: a study's name has 1 to 100 letters, digits, '.', '_' or '-' and starts with a "
                "letter or digit, but got 'a/b'.",
            ),
            ({"name": "data"}, "name: 'data' is reserved for a folder beside the studies. Choose another name."),
            ({"strategies": []}, "strategies: must list at least one, but got an empty list."),
            ({"strategies": "full"}, "strategies: must be a list, but got the string 'full'. Write [full]."),
            ({"strategies": [3]}, "strategies[0]: must be a mapping of keys to values, but got the number 3."),
            (
                {"strategies": ["full", "full"]},
                "strategies[1]: the label 'full' is taken by strategies[0]. Give each its own: {name: …, label: …}.",
            ),
            (
                {"strategies": [{"name": "full", "label": "a.b"}]},
                "strategies[0].label: a label has 1 to 50 letters, digits, '_' or '-' and starts with a letter or "
                "digit, "
                "but got 'a.b'.",
            ),
            (
                {"strategies": [{"name": "daft", "preset": "papr"}]},
                "strategies[0].preset: daft has no preset 'papr'. Did you mean 'paper'? It has: paper.",
            ),
            (
                {"strategies": [{"name": "daft", "preset": "paper", "fixed": {"lr_head": 1.0}}]},
                "strategies[0].fixed.lr_head: the preset 'paper' sweeps lr_head, so it cannot be fixed. Remove "
                "one "
                "of the two.",
            ),
            (
                {"strategies": [{"name": "full", "fixed": {"lr_backbone": "1e-3"}}]},
                "strategies[0].fixed.lr_backbone: must be a number, but got the string '1e-3'. Remove the quotes. "
                "(YAML 1.1 "
                "parsers read 1e-3 as a string even without quotes: write 1.0e-3 there.)",
            ),
            (
                {"strategies": [{"name": "full", "fixed": {"lr_backbone": -1.0}}]},
                "strategies[0].fixed: lr_backbone must be positive, but got -1.0.",
            ),
            (
                {"strategies": [{"name": "full", "fixed": {"optimizer": "adam"}}]},
                "strategies[0].fixed.optimizer: must be one of sgd, adamw, but got the string 'adam'.",
            ),
            (
                {"resources": {"gpus": "all"}},
                "resources.gpus: must be auto, 0, 1, or a share of one GPU between 0 and 1, but got 'all'.",
            ),
            *(
                (
                    {"resources": {"gpus": gpus}},
                    f"resources.gpus: must be auto, 0, 1, or a share of one GPU between 0 and 1, but got {gpus}. A "
                    "trial trains on one GPU: write 1; resources.concurrent sets how many run at a time.",
                )
                for gpus in (1.5, 2)
            ),
            ({"resources": {"cpus": 0}}, "resources.cpus: must be greater than 0, but got 0."),
            (
                {"tracking": {"uri": "mlruns"}},
                "tracking.uri: a tracking URI is a server (http://host:5000) or a database (sqlite:///mlflow.db), "
                "but got "
                "'mlruns'. Leave it out for a SQLite file in the storage folder.",
            ),
            (
                {"storage": "s3://key:secret@bucket/luthier"},
                "storage: storage is a folder, but got the URL 's3://***@bucket/luthier'. Give a path that all "
                "machines "
                "share (such as an NFS or EFS mount), and copy the finished study's folder to the object store "
                "afterwards.",
            ),
        ],
    )
    def test_message(self, sections: dict[str, Any], message: str) -> None:
        assert problems(**sections) == [message]

    def test_a_fixed_hyperparameter_that_does_not_exist(self) -> None:
        (message,) = problems(strategies=[{"name": "full", "fixed": {"lr_backbon": 0.1}}])
        assert message.startswith(
            "strategies[0].fixed.lr_backbon: full has no hyperparameter 'lr_backbon'. Did you mean 'lr_backbone'? It "
            "has "
        )
        assert "lr_head" in message


class TestSecrets:
    @pytest.mark.parametrize(
        ("text", "redacted"),
        [
            ("http://me:secret@host:5000/x", "http://***@host:5000/x"),
            ("postgresql+psycopg2://u:p@ss@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
            ("https://ghp_token@host", "https://***@host"),
            ("http://host:5000/a?token=abc&x=1", "http://host:5000/a?token=***&x=1"),
            ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
            ("http://host:8265 and me@example.org", "http://host:8265 and me@example.org"),
        ],
    )
    def test_c9_credentials_are_hidden(self, text: str, redacted: str) -> None:
        assert redact(text) == redacted

    def test_c9_errors_hide_them(self) -> None:
        error = StudyError([Problem(("tracking", "uri"), "cannot reach http://me:secret@host.")])
        assert "secret" not in str(error)
        assert "secret" not in str(error.problems[0])


def test_paths_in_words() -> None:
    assert dotted(("strategies", 2, "fixed", "lr_head")) == "strategies[2].fixed.lr_head"
