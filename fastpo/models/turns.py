"""Text encoders that take turns: at most one of them is in memory.

SD3 and FLUX.1 read a prompt with CLIP and with T5, which weighs 9.5 GB in 16 bits. Prompts are
encoded by one encoder after the other, many prompts at a time, and what each gives waits on the CPU
for the others.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastpo.models.encoders import Encoders, checked

Load = Callable[[], Any]
States = dict[str, Tensor]


class Turns:
    """Text encoders of which one at a time is loaded.

    Args:
        loads: What loads each of them, in the pipeline's order.
        device: Where they run.
    """

    def __init__(self, loads: Sequence[Load], device: torch.device) -> None:
        self._loads = tuple(loads)
        self._device = device
        self._held: tuple[int, Any] | None = None

    def order(self) -> list[int]:
        """Returns the numbers of all encoders, first of the one that is in memory."""
        held = None if self._held is None else self._held[0]
        return sorted(range(len(self._loads)), key=lambda number: number != held)

    def take(self, number: int) -> Any:
        """Returns an encoder in evaluation mode, loaded unless it is in memory.

        Raises:
            ModelError: It cannot be loaded.
        """
        if self._held is None or self._held[0] != number:
            self.drop()
            encoder = self._loads[number]()
            self._held = number, encoder.to(self._device).eval().requires_grad_(False)
        return self._held[1]

    def drop(self) -> None:
        """Frees the encoder that is in memory."""
        self._held = None


@dataclass(frozen=True)
class TurnEncoders(Encoders):
    """A VAE, and text encoders that take turns; `text_encoders` is empty.

    Attributes:
        turns: The text encoders.
    """

    turns: Turns = field(kw_only=True)

    @abstractmethod
    def states_by(self, number: int, encoder: Any, prompts: Sequence[str]) -> States:
        """Returns what one encoder gives for prompts, each `(N, ...)`."""

    @abstractmethod
    def join(self, states: Sequence[States]) -> States:
        """Makes prompts' conditions of what each encoder gives, in the pipeline's order."""

    def place_texts(self, device: torch.device | str) -> None:
        """As `Encoders.place_texts`; off their device there is none."""
        if torch.device(device) != self.device:
            self.turns.drop()

    def prompt_conditions(self, prompts: Sequence[str]) -> States:
        """As `Encoders.prompt_conditions`, on the CPU."""
        return next(self.encode_batches(prompts, max(1, len(prompts))))

    @torch.no_grad()
    def encode_batches(self, prompts: Sequence[str], size: int) -> Iterator[States]:
        """As `Encoders.encode_batches`, by one encoder after the other; on the CPU."""
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        found: dict[int, list[States]] = {}
        for number in self.turns.order() if batches else ():
            encoder = self.turns.take(number)
            found[number] = [
                {name: states.cpu() for name, states in given.items()}
                for given in (self.states_by(number, encoder, batch) for batch in batches)
            ]
            del encoder  # or the next one would be loaded beside it
        for _ in batches:
            yield checked(self.join([found[number].pop(0) for number in sorted(found)]))
