"""The study file's section `diagnostics`: what is measured beside accuracy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.study_file.section import Section


class DiagnosticsSpec(Section):
    """What is measured beside accuracy: of each trial, of the pretrained network, and by reference trials."""

    measure: list[Literal["shift", "distortion", "cka", "plasticity", "gradients"]] = ["shift", "distortion", "cka"]
    """Of each trial: `shift` of the norm layers' γ and β, `distortion` of features and change of parameters, `cka` per
    block, `plasticity` after tuning, `gradients`: gradient norms per kind of layer."""
    plasticity: bool = True
    """Measure the plasticity of the pretrained network's components at the start of the study (transformers only)."""
    plasticity_probe: Literal["embedding", "in_situ"] = "embedding"
    """embedding: every component is applied to the token embeddings, as the paper measures; in_situ: to what really
    enters it."""
    plasticity_source: str | None = None
    """Domain of images like those of the pretraining, for one half of each pair. null = pairs of training images."""
    plasticity_pairs: Annotated[int, Field(ge=2)] = 256
    """Pairs of images that plasticity is the mean over."""
    fsr: list[Literal["full", "extrapolated", "oracle"]] = []
    """References for the fine-tuning shift ratio (FSR), each at the price of extra trials of LayerNorm tuning: `full`
    (all training images, where `data.train_fraction` is below 1), `extrapolated` (from nested shares of the training
    images), `oracle` (labelled images of each OOD domain: analysis only)."""
    fsr_fractions: list[Annotated[float, Field(gt=0, lt=1)]] = [0.25, 0.5]
    """Shares of the training images for the extrapolation, beside the whole."""
    fsr_seeds: Annotated[int, Field(ge=1)] = 3
    """Seeds per reference."""
    fsr_from: Annotated[str, Field(min_length=1)] | None = None
    """Name of a study in the same storage, on the same network and training sample, whose FSR gives an early trial of
    each LayerNorm entry its λ ≈ 1/FSR. null = this study's own FSR, where it was measured before (`luthier fsr`)."""
