"""What to train how on a GPU: the first way, from the best on, that fits by the plan's estimate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastpo.config import Config, flatten, parse_config, with_keys
from fastpo.errors import ConfigError
from fastpo.plan.architecture import Architecture
from fastpo.plan.fit import find_largest, scaled
from fastpo.plan.gpus import Gpu
from fastpo.plan.measure import build_parts, module_bytes
from fastpo.plan.memory import ALLOWANCE, Measured, quantized, step_memory
from fastpo.plan.planner import latent_elements, make_shapes, measure
from fastpo.plan.recipes import Recipe, own_recipe
from fastpo.plan.schema import Largest
from fastpo.train.sharding import count_trained, held, read_sharding

ROOM = 0.9
"""Share of a card's memory that is planned with: the allocator's losses are in no estimate."""
MOST_MICRO = 8
"""Pairs a pass; beyond, a GPU is busy anyway."""
WAYS: dict[str, tuple[dict[str, Any], ...]] = {
    "full": (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "optim.name": "adamw_8bit"},
        {"gradient_checkpointing": True, "optim.name": "adamw_8bit", "weights": "bf16"},
    ),
    "lora": (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "quantize_base": "4bit"},
    ),
}
"""Ways to train by method, each smaller in memory and slower, or less exact, than the last."""
UNASKED = {"full": 2, "lora": 3}
"""How many of them are tried where the user asked for no method."""


@dataclass(frozen=True)
class Choice:
    """How to train.

    Attributes:
        values: Keys and values, by their full names.
        pairs: Pairs a pass.
        bytes: What a process then holds at the peak.
        largest: What fits at most.
        passed_over: Ways that come before it, each with why it was not taken.
    """

    values: Mapping[str, Any]
    pairs: int
    bytes: int
    largest: Largest
    passed_over: tuple[str, ...]


def choose(
    raw: Mapping[str, Any],
    architecture: Architecture,
    gpu: Gpu,
    *,
    method: Literal["lora", "full"] | None,
    batch: int,
    status: Callable[[str], None],
) -> Choice:
    """Chooses method, checkpointing, optimizer and micro-batch.

    Args:
        raw: The configuration so far, as nested mappings; of a batch of one.
        architecture: Its model.
        gpu: The card.
        method: What the user asked for; None tries full fine-tuning, then LoRA.
        batch: Pairs of a step, which the micro-batch divides.
        status: Called with what is tried.

    Raises:
        ConfigError: Nothing fits.
    """
    passed: list[str] = []
    least = 0
    for one in [method] if method else ["full", "lora"]:
        for way in WAYS[one][: None if method else UNASKED[one]]:
            values = {f"train.{key}": value for key, value in ({"method": one} | way).items()}
            config = parse_config(with_keys(raw, values))
            status(f"trying {_words(values)}")
            taken = _try(config, architecture, gpu, batch)
            if isinstance(taken, int):
                least = taken
                passed.append(f"{_words(values)} needs {taken / 1e9:.1f} GB")
                continue
            pairs, size, largest = taken
            return Choice(values, pairs, size, largest, tuple(passed))
    raise ConfigError(
        f"--gpu: {gpu.name} has {gpu.memory_gb:g} GB, of which {ROOM:.0%} are planned with; the "
        f"smallest way ({_words(values)}) needs {least / 1e9:.1f} GB"
        + ("; try --lora" if method == "full" else "")
    )


def _try(
    config: Config, architecture: Architecture, gpu: Gpu, batch: int
) -> int | tuple[int, int, Largest]:
    """Pairs a pass, bytes and the most that fits; or, if nothing fits, the bytes of one pair."""
    sharding = read_sharding(config.train, 1)
    room = ROOM * gpu.memory_gb * 1e9
    least = _least(config, architecture)
    if least > room:  # known without running anything
        return least
    shapes = make_shapes(config, architecture)
    measured = measure(architecture, config, shapes)
    recipe = own_recipe(config.train, latent_elements(architecture, shapes))
    largest = find_largest(
        measured,
        recipe,
        sharding,
        room=room,
        shapes=shapes,
        step=shapes.vae_factor * architecture.denoiser_factor,
    )
    if not largest.pairs:
        return _bytes(recipe, measured, config, 1)
    pairs = max(n for n in range(1, min(largest.pairs, MOST_MICRO, batch) + 1) if batch % n == 0)
    return pairs, _bytes(recipe, measured, config, pairs), largest


def _bytes(recipe: Recipe, measured: Measured, config: Config, pairs: int) -> int:
    return step_memory(recipe, scaled(measured, pairs), read_sharding(config.train, 1)).total


def _least(config: Config, architecture: Architecture) -> int:
    """Bytes of weights, gradients and states, without any batch."""
    copied = config.train.method == "full" and config.train.runs_reference
    denoisers = build_parts(architecture, config.train, reference=copied).denoisers
    trained = count_trained(denoisers.policy.parameters(), config.train)
    if config.train.quantize_base is not None:
        trained, _ = quantized(denoisers.policy, trained, config.train.quantize_base)
    frozen = module_bytes(denoisers.frozen) if denoisers.frozen is not None else 0
    return sum(held(trained, read_sharding(config.train, 1)).values()) + frozen + ALLOWANCE


def _words(values: Mapping[str, Any]) -> str:
    """`full, gradient_checkpointing: true, ...` of the keys of a way."""
    flat = {key.removeprefix("train."): value for key, value in flatten(values).items()}
    method = flat.pop("method")
    rest = [f"{key}: {str(value).lower()}" for key, value in flat.items() if value]
    return ", ".join([str(method), *rest])
