"""The largest batch and the largest resolution that fit on a card, by the plan's memory model.

What a pass holds is a constant and a part in proportion to the pixels of its batch: attention is
fused, so no tensor grows faster. The constant is the copies of trainable float32 weights that
autocast makes. Every size is then asked of the same model as the plan's own, by bisection, without
another pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastpo.plan.measure import Pass, Shapes
from fastpo.plan.memory import Measured, step_memory
from fastpo.plan.recipes import Recipe
from fastpo.plan.schema import Largest, Memory
from fastpo.train.sharding import Sharding

MOST_PAIRS = 4096
MOST_SIDE = 4096


def scaled(measured: Measured, factor: float) -> Measured:
    """What a batch of `factor` times as many pixels costs; of what is computed once, nothing."""

    def grown(one: Pass, constant: int = 0) -> Pass:
        constant = min(constant, one.peak)
        peak = constant + round((one.peak - constant) * factor)
        return replace(one, peak=peak, host=round(one.host * factor))

    return replace(
        measured,
        training=grown(measured.training, measured.constant),
        reference=grown(measured.reference),
        batch_bytes=round(measured.batch_bytes * factor),
        prediction_bytes=round(measured.prediction_bytes * factor),
    )


def find_largest(
    measured: Measured,
    recipe: Recipe,
    sharding: Sharding,
    *,
    room: float,
    shapes: Shapes,
    step: int,
) -> Largest:
    """Looks for both by bisection.

    Args:
        measured: What a batch costs.
        recipe: What is run on it.
        sharding: How processes share what they hold.
        room: Bytes of the card.
        shapes: The measured batch, of a square resolution.
        step: What resolutions are multiples of.
    """
    pairs, side = shapes.pairs, shapes.height * shapes.vae_factor

    def peak(factor: float) -> Memory:
        return step_memory(recipe, scaled(measured, factor), sharding)

    return Largest(
        pairs=last_true(lambda n: peak(n / pairs).total <= room, MOST_PAIRS),
        resolution=step
        * last_true(lambda n: peak((n * step / side) ** 2).total <= room, MOST_SIDE // step),
    )


def last_true(holds: Callable[[int], bool], most: int) -> int:
    """Returns the largest number from 1 to `most` of which something holds, 0 if it never does.

    What holds of a number must hold of every smaller one.
    """
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
