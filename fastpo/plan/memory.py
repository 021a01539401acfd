"""The peak of one process's memory: what is held throughout, and the largest phase of a step."""

from __future__ import annotations

from dataclasses import dataclass

from fastpo.plan.measure import Pass
from fastpo.plan.recipes import Recipe
from fastpo.plan.schema import Memory
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
        encoder_bytes: Bytes of a float32 VAE and half-precision text encoders.
        batch_bytes: Of latents, embeddings, noise and target.
        prediction_bytes: Of one model's answer.
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
    encoder_bytes: int
    batch_bytes: int
    prediction_bytes: int
    constant: int = 0


def step_memory(recipe: Recipe, m: Measured, sharding: Sharding) -> Memory:
    """A process's parts; averages of the trainable weights are shared as the weights are."""
    average = sharding.part(m.average_bytes, 3)
    annotator_bytes = m.whole_average_bytes if recipe.whole_averages else average
    step = sharding.part(m.trained.step, 1) if not sharding.offload_optimizer else 0
    phases = {
        "policy's forward and backward": m.training.peak,
        "optimizer's step": step,
        "annotators' forward": recipe.annotators_at_once * m.reference.peak,
        "VAE's encoding": max(m.vae.peak, m.text.peak) if recipe.encodes else 0,
    }
    answers = 1 + recipe.reference + recipe.averages
    parts = held(m.trained, sharding) | {
        "reference": m.reference_bytes if recipe.reference else 0,
        "annotators": recipe.averages * annotator_bytes,
        "averages": average if recipe.exports_average else 0,
        "encoders": m.encoder_bytes if recipe.encodes else 0,
        "batch": m.batch_bytes + answers * m.prediction_bytes,
    }
    return peak(parts, phases)


def peak(parts: dict[str, int], phases: dict[str, int]) -> Memory:
    """Adds the largest of the phases, which follow one another, to what is held throughout."""
    phase = max(phases, key=phases.__getitem__)
    return Memory(**parts, activations=phases[phase], phase=phase, allowance=ALLOWANCE)
