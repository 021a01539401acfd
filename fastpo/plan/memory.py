"""The peak of one process's memory: what is held throughout, and the largest phase of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from fastpo.models.quantized import BaseBits, quantizable, quantized_bytes
from fastpo.plan.measure import Pass
from fastpo.plan.recipes import Recipe
from fastpo.plan.schema import Memory
from fastpo.precision import DTYPES
from fastpo.train.sharding import Sharding, Trained, held

ALLOWANCE = 10**9
"""Bytes for the CUDA context, cuBLAS and cuDNN workspaces: an assumption."""


@dataclass(frozen=True)
class Measured:
    """What each part costs for one micro-batch, and what is held for it.

    Attributes:
        forward: The policy's forward pass.
        training: Its forward and backward.
        recompute: FLOPs of the backward that gradient checkpointing repeats.
        reference: An annotator's forward pass with the adapters off.
        vae: Encoding the images in float32.
        text: Encoding the prompts.
        trained: The policy's weights.
        reference_bytes: Bytes of a frozen copy, 0 where the policy without adapters serves.
        average_bytes: Bytes of a float32 average of the trainable weights.
        whole_average_bytes: Of one of all weights in half precision.
        vae_bytes: Bytes of a float32 VAE.
        text_bytes: Bytes of half-precision text encoders.
        batch_bytes: Of latents, embeddings, noise and target.
        prediction_bytes: Of one model's answer.
        dense: Bytes of the largest quantized layer's weights as they come out of their codes.
        constant: Of the peak of forward and backward, the bytes that do not grow with the batch.
    """

    forward: Pass
    training: Pass
    recompute: int
    reference: Pass
    vae: Pass
    text: Pass
    trained: Trained
    reference_bytes: int
    average_bytes: int
    whole_average_bytes: int
    vae_bytes: int
    text_bytes: int
    batch_bytes: int
    prediction_bytes: int
    constant: int = 0
    dense: int = 0


def step_memory(recipe: Recipe, m: Measured, sharding: Sharding) -> Memory:
    """A process's parts; averages of the trainable weights are shared as the weights are."""
    average = sharding.part(m.average_bytes, 3)
    annotator_bytes = m.whole_average_bytes if recipe.whole_averages else average
    step = sharding.part(m.trained.step, 1) if not sharding.offload_optimizer else 0
    share = DTYPES[recipe.vae_precision].itemsize / 4  # what was measured is float32
    encoding = max(round(share * m.vae.peak), m.text.peak if recipe.encodes_text else 0)
    encoders = round(share * m.vae_bytes) + recipe.encodes_text * m.text_bytes
    phases = {
        "policy's forward and backward": m.training.peak + m.dense,
        "optimizer's step": step,
        "annotators' forward": recipe.annotators_at_once * (m.reference.peak + m.dense),
        "VAE's encoding": encoding if recipe.encodes else 0,
    }
    answers = 1 + recipe.reference + recipe.averages
    kept = held(m.trained, sharding)
    kept["host"] = kept.get("host", 0) + m.training.host
    parts = kept | {
        "reference": m.reference_bytes if recipe.reference else 0,
        "annotators": recipe.averages * annotator_bytes,
        "averages": average if recipe.exports_average else 0,
        "encoders": encoders if recipe.encodes else 0,
        "batch": m.batch_bytes + answers * m.prediction_bytes,
    }
    return peak(parts, phases)


def peak(parts: dict[str, int], phases: dict[str, int]) -> Memory:
    """Adds the largest of the phases, which follow one another, to what is held throughout."""
    phase = max(phases, key=phases.__getitem__)
    return Memory(**parts, activations=phases[phase], phase=phase, allowance=ALLOWANCE)


def quantized(policy: nn.Module, trained: Trained, bits: BaseBits) -> tuple[Trained, int]:
    """Puts codes in the place of the frozen weights that training quantizes.

    Returns:
        The weights in numbers, and the bytes of the largest layer's weights as it computes.
    """
    layers = list(quantizable(policy).values())
    dense = [layer.weight.numel() * layer.weight.element_size() for layer in layers]
    codes = sum(quantized_bytes(layer, bits) for layer in layers)
    frozen = trained.frozen - sum(dense) + codes
    return replace(trained, frozen=frozen), max(dense, default=0)
