"""Checks of a study before any compute is spent.

No cluster is started and no image is decoded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import timm
import torch

from orchestrator.cluster.resources import check_resources
from orchestrator.errors import PreflightError, Problem
from orchestrator.planning.build import loss_of, model_of
from orchestrator.planning.configurations import points, structure
from orchestrator.planning.estimates import examine, space_of
from orchestrator.planning.fsr import hint_problems
from orchestrator.planning.objectives import cost_problems
from orchestrator.planning.warm_start import warm_start_problems
from orchestrator.study_file.rules import BUILT_IN_DOMAINS, domain_problems, network_problems
from orchestrator.study_file.schema import StrategyEntry, StudySpec
from orchestrator.tracking.client import access_problems
from trainables import strategy_class
from trainables.data.corruption_files import CorruptedFiles, corruptions_in
from trainables.demo.backbones import NETWORKS, architecture
from trainables.diagnostics.norm_shift import batch_norms, layer_norms
from trainables.engine.budget import BudgetPlan
from trainables.engine.contract import check_loss, check_task
from trainables.models.backbone import backbone_data_config, check_model
from trainables.models.batch_norm import BATCH_NORMS
from trainables.models.task_model import TaskModel
from trainables.models.transformer_blocks import find_blocks
from trainables.tasks.registry import task_class


def preflight(spec: StudySpec) -> None:
    """Check that a study can run here, and report all problems at once.

    Raises:
        PreflightError: unknown model or augmentation; missing weights or data; a strategy or diagnostic without the
            layers, domains or packages that it needs; a cost that is the same for every trial; a budget too small for
            the strategies or their phases; an earlier study that this one cannot start from; settings of the loss that
            a strategy cannot honour; a decoder that does not fit the network; a storage folder that cannot be written;
            a tracking server that rejects the credentials; more CPUs or GPUs than this machine has (unless RAY_ADDRESS
            names a cluster).
    """
    checks: tuple[Callable[[StudySpec], Iterator[Problem]], ...] = (
        _data_problems,
        _model_problems,
        _corruption_problems,
        _package_problems,
        _budget_problems,
        _phase_problems,
        _loss_problems,
        _decoder_problems,
        hint_problems,
        warm_start_problems,
        cost_problems,
        _machine_problems,
        _storage_problems,
        _tracking_problems,
    )
    problems = [problem for check in checks for problem in check(spec)]
    if problems:
        raise PreflightError(problems, f"The study {spec.name!r}")


def _data_problems(spec: StudySpec) -> Iterator[Problem]:
    data = spec.data
    ood: Collection[str] = data.ood or BUILT_IN_DOMAINS.get(data.source, ())
    if data.source != "digits":
        try:
            inside = examine(spec)[1]
        except ValueError as error:
            yield Problem(("data",), str(error))
            return
        ood = inside.ood_domains
        if spec.search.objective == "leave_one_domain_out" and len(inside.id_domains) < 2:
            rule = f"leave_one_domain_out needs at least 2 ID domains, but the data have 1: {inside.id_domains[0]}."
            yield Problem(("search", "objective"), f"{rule} Use id_val.")
    diagnostics = spec.diagnostics
    for path, message in domain_problems(diagnostics.plasticity_source, diagnostics.fsr, ood):
        yield Problem(path, message)


def _corruption_problems(spec: StudySpec) -> Iterator[Problem]:
    """A folder of corrupted pictures that cannot be used."""
    folder = spec.evaluate.corruption_folder
    if folder is None:
        return
    try:
        classes = len(examine(spec)[1].classes)
    except ValueError:  # reported by `_data_problems`
        return
    try:
        CorruptedFiles(folder, corruptions_in(folder), classes)
    except ValueError as error:
        yield Problem(("evaluate", "corruptions"), str(error))


def _model_problems(spec: StudySpec) -> Iterator[Problem]:
    try:
        check_model(model_of(spec))
    except ValueError as error:
        yield Problem(("model",), str(error))
        return
    needed = {s.name: strategy_class(s.name).needs for s in spec.strategies}
    # A network is not built, which takes seconds, where nothing depends on its layers.
    if not any(needed.values()) and not spec.diagnostics.fsr:
        return
    kinds = layer_kinds(spec.model.name)
    for index, entry in enumerate(spec.strategies):
        for kind in sorted(needed[entry.name] - kinds):
            rule = f"{entry.name} needs a network with {kind} layers, but {spec.model.name} has none."
            adapts = kind == "layer_norm" and "batch_norm" in kinds
            way = "Leave it out, or use daft, which adapts BatchNorm to the target data." if adapts else "Leave it out."
            yield Problem(("strategies", index), f"{rule} {way}")
    for path, message in network_problems(spec.diagnostics.fsr, spec.model.name, kinds):
        yield Problem(path, message)


def _package_problems(spec: StudySpec) -> Iterator[Problem]:
    """Optional packages that a strategy needs and this machine lacks."""
    for index, entry in enumerate(spec.strategies):
        for package, extra in strategy_class(entry.name).packages.items():
            # Looked up, not imported, which may take seconds.
            if find_spec(package) is None:
                rule = f"{entry.name} needs the package {package}, which is not installed here."
                way = f'Install it: pip install "luthier[{extra}]", or leave {entry.name} out.'
                yield Problem(("strategies", index), f"{rule} {way}")


def layer_kinds(model: str) -> frozenset[str]:
    """The kinds of layers of a network: any of `layer_norm`, `batch_norm`, `attention` and `transformer_block`.

    A transformer block counts if its components are defined (`trainables.models.transformer_blocks`). No weights are
    allocated or read.

    Args:
        model: a name that `trainables.models.backbone.check_model` accepts.
    """
    with torch.device("meta"):
        network = architecture(model) if model in NETWORKS else timm.create_model(model, pretrained=False)
    norms = {"layer_norm": layer_norms(network), "batch_norm": batch_norms(network)}
    kinds = {kind for kind, layers in norms.items() if layers}
    if any("attention" in type(module).__name__.lower() for module in network.modules()):
        kinds.add("attention")
    with suppress(ValueError):
        find_blocks(network)
        kinds.add("transformer_block")
    return frozenset(kinds)


def _budget_problems(spec: StudySpec) -> Iterator[Problem]:
    try:
        space_of(spec)
    except ValueError as error:
        yield Problem(("search", "trials"), str(error))


def _phase_problems(spec: StudySpec) -> Iterator[Problem]:
    """Budgets that a strategy rejects.

    At its default point, or at a choice of the search.
    """
    for index, entry in enumerate(spec.strategies):
        for hparams in points(entry, spec.task):
            try:
                BudgetPlan.of(strategy_class(entry.name, spec.task).from_hparams(hparams), spec.search.epochs, 1)
            except ValueError as error:
                yield Problem(("strategies", index), str(error))
                break


def _loss_problems(spec: StudySpec) -> Iterator[Problem]:
    """Settings of loss, decoder, batches and schedule that the task or a strategy cannot honour."""
    loss = loss_of(spec)
    for index, entry in enumerate(spec.strategies):
        for hparams in points(entry, spec.task):
            try:
                strategy = strategy_class(entry.name, spec.task).from_hparams(hparams)
            except ValueError:  # reported by `_phase_problems`
                continue
            try:
                check_task(strategy, task_class(spec.task), loss, spec.model.decoder)
                check_loss(strategy, loss, spec.data.sampling, spec.search.schedule)
            except ValueError as error:
                yield Problem(("strategies", index), str(error))
                break


def _decoder_problems(spec: StudySpec) -> Iterator[Problem]:
    """A decoder that reads feature maps which the network does not have."""
    if not task_class(spec.task).decoders:
        return
    try:
        check_model(model_of(spec))
    except ValueError:  # reported by `_model_problems`
        return
    try:
        model = structure(spec, classes=2)
    except ValueError as error:
        yield Problem(("model", "decoder" if spec.model.decoder else "name"), str(error))
        return
    if spec.search.batch_size == 1 and any(_trains_batch_norm(entry, spec.task) for entry in spec.strategies):
        yield from _single_picture_problems(spec, model)


def _trains_batch_norm(entry: StrategyEntry, task: str) -> bool:
    """Whether some configuration has the network's BatchNorm in train mode."""
    for hparams in points(entry, task):
        try:
            config = strategy_class(entry.name, task).from_hparams(hparams).config
        except ValueError:  # reported by `_phase_problems`
            continue
        if getattr(config, "bn_mode", "eval") == "train":
            return True
    return False


def _single_picture_problems(spec: StudySpec, model: TaskModel) -> Iterator[Problem]:
    """Batches of one picture for a network whose BatchNorm has one element per channel."""
    side = spec.data.image_size or backbone_data_config(model_of(spec)).image_size
    if not any(isinstance(module, BATCH_NORMS) for module in model.backbone.modules()):
        return
    try:
        model.train()(torch.zeros(1, 3, side, side, device="meta"))
    except ValueError as error:  # torch refuses to normalise a single element
        yield Problem(
            ("search", "batch_size"),
            f"batches of one picture leave one element per channel to a BatchNorm of {spec.model.name} at {side} px "
            f"({error}). Raise search.batch_size or data.image_size.",
        )


def _machine_problems(spec: StudySpec) -> Iterator[Problem]:
    # The machines of a cluster are known once it is joined.
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        return
    gpus = 0.0 if spec.resources.gpus == "auto" else float(spec.resources.gpus)
    here = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    try:
        check_resources(spec.resources.cpus, gpus, [here])
    except ValueError as error:
        yield Problem(("resources",), str(error))


def _storage_problems(spec: StudySpec) -> Iterator[Problem]:
    folder = Path(spec.storage).expanduser().absolute() / spec.name
    # Nothing is created here: the nearest folder that exists decides whether the run can create the others.
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not nearest.is_dir():
        yield Problem(("storage",), f"storage is a folder, but {nearest} is a file. Choose another path.")
    elif not os.access(nearest, os.W_OK):
        yield Problem(("storage",), f"nothing can be written to {nearest} by this user. Choose another path.")
    for file in (folder / "journal.jsonl", folder / "optuna.db"):
        if file.exists() and not (file.is_file() and os.access(file, os.R_OK | os.W_OK)):
            rule = f"the study goes on in {file}, which this user cannot read and write."
            yield Problem(("storage",), f"{rule} Mend its permissions, or choose another name.")


def _tracking_problems(spec: StudySpec) -> Iterator[Problem]:
    yield from access_problems(spec.tracking_uri, spec.experiment)
