"""Training of bfloat16 weights: updates in float32, rounded back at random, on average exactly.

A bfloat16 number has 8 significant bits, so an update smaller than 1/512 of the weight is lost when
the sum is rounded to the nearest. Rounded up with the probability of the fraction that is cut off,
the sum is right on average, and small updates add up.

The gradients of such weights are bfloat16 as well, and so are their sums over micro-batches, which
autograd rounds to the nearest; docs/measurements.md says what that costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastpo.types import pair_key

CHUNK = 2**26  # weights updated at once: float32 copies of them and of their gradients, 512 MiB


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds float32 to bfloat16, up with the probability of the fraction cut off: `E = values`.

    A bfloat16 is the upper half of a float32. Adding a uniform 16-bit integer to the whole carries
    into the upper half with just that probability, away from zero on either side of it.

    Args:
        values: Float32 of any shape; NaN and infinity stay what they are.
        generator: Of the values' device.
    """
    bits = values.view(torch.int32)
    carry = torch.randint(
        0, 2**16, values.shape, generator=generator, device=values.device, dtype=torch.int32
    )
    rounded = carry.add_(bits).bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


@dataclass(frozen=True)
class _Chunk:
    """Some weights, the float32 stand-ins that an optimizer knows, and that optimizer.

    The stand-ins hold no memory outside a step.
    """

    weights: list[nn.Parameter]
    stand_ins: list[nn.Parameter]
    optimizer: Optimizer


class RoundedOptimizer(Optimizer):
    """Runs any optimizer on bfloat16 weights as if they were float32, and rounds at random.

    The weights are taken in chunks: each chunk is copied to float32, stepped with its gradients by
    an optimizer of its own, whose states are those of float32 weights, and rounded back. Weights
    that are float32 already are stepped as they are. The bits that decide the rounding depend on
    the seed, the number of the update and of the chunk alone: a resumed run repeats them, and
    processes that hold copies of the weights keep them equal.

    Args:
        parameters: The weights; those in bfloat16 are rounded.
        build: Makes an optimizer of the parameters it is given.
        seed: The run's seed.
        chunk: Weights to update at once.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        build: Callable[[list[nn.Parameter]], Optimizer],
        *,
        seed: int,
        chunk: int = CHUNK,
    ) -> None:
        weights = list(parameters)
        low = [p for p in weights if p.dtype == torch.bfloat16]
        high = [p for p in weights if p.dtype != torch.bfloat16]
        self._seed = seed
        self._chunks = [_make_chunk(part, build) for part in _parts(low, chunk)]
        self._plain = build(high) if high else None
        super().__init__(weights, {"lr": float(self._inner()[0].param_groups[0]["lr"])})
        self.param_groups[0]["updates"] = 0

    def _inner(self) -> list[Optimizer]:
        """All optimizers, in a fixed order."""
        plain = [] if self._plain is None else [self._plain]
        return [*plain, *(c.optimizer for c in self._chunks)]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates all weights that have a gradient; no closure."""
        if closure is not None:
            raise ValueError("RoundedOptimizer takes no closure")
        group = self.param_groups[0]
        for optimizer in self._inner():
            _set_rate(optimizer, group["lr"])
        if self._plain is not None:
            self._plain.step()
        for number, chunk in enumerate(self._chunks):
            self._step_chunk(chunk, f"rounding {self._seed} {group['updates']} {number}")
        group["updates"] += 1

    def _step_chunk(self, chunk: _Chunk, key: str) -> None:
        pairs = [
            (weight, stand_in)
            for weight, stand_in in zip(chunk.weights, chunk.stand_ins, strict=True)
            if weight.grad is not None
        ]
        if not pairs:
            return
        weights = [weight for weight, _ in pairs]
        values, slopes = _flat_like(weights), _flat_like(weights)
        parts, grads = _views(values, weights), _views(slopes, weights)
        torch._foreach_copy_(parts, [w.detach() for w in weights])
        torch._foreach_copy_(grads, [w.grad for w in weights if w.grad is not None])
        for (_, stand_in), part, grad in zip(pairs, parts, grads, strict=True):
            stand_in.data, stand_in.grad = part, grad
        chunk.optimizer.step()
        for _, stand_in in pairs:
            stand_in.grad, stand_in.data = None, stand_in.data.new_empty(0)
        generator = torch.Generator(values.device).manual_seed(pair_key(key))
        rounded = round_stochastically(values, generator)
        torch._foreach_copy_([w.detach() for w in weights], _views(rounded, weights))

    def state_dict(self) -> dict[str, Any]:
        """The rate, the number of updates, and every inner optimizer's state."""
        group = {k: v for k, v in self.param_groups[0].items() if k != "params"}
        return {"group": group, "inner": [o.state_dict() for o in self._inner()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, on the weights' devices."""
        self.param_groups[0].update(state_dict["group"])
        for chunk in self._chunks:  # a state is loaded to where its stand-in is
            for weight, stand_in in zip(chunk.weights, chunk.stand_ins, strict=True):
                stand_in.data = torch.empty(0, device=weight.device)
        for optimizer, state in zip(self._inner(), state_dict["inner"], strict=True):
            optimizer.load_state_dict(state)


def _set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _parts(weights: list[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """Cuts a list into runs of at most `size` weights; a larger tensor is a run of its own."""
    parts: list[list[nn.Parameter]] = []
    room = 0
    for weight in weights:
        if not parts or weight.numel() > room:
            parts.append([])
            room = size
        parts[-1].append(weight)
        room -= weight.numel()
    return parts


def _make_chunk(
    weights: list[nn.Parameter], build: Callable[[list[nn.Parameter]], Optimizer]
) -> _Chunk:
    stand_ins = [nn.Parameter(torch.empty(0, device=w.device)) for w in weights]
    return _Chunk(weights, stand_ins, build(stand_ins))


def _flat_like(weights: list[nn.Parameter]) -> Tensor:
    return torch.empty(sum(w.numel() for w in weights), device=weights[0].device)


def _views(flat: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
    """Cuts a flat tensor into the weights' shapes, without a copy."""
    parts = flat.split([w.numel() for w in weights])
    return [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]
