"""The policy's trainable weights and their optimizer's state, wherever the processes keep them.

A checkpoint holds both by parameter name, whole and in float32, so that any number of processes
resumes it, with or without DeepSpeed. This module is for processes that each hold everything;
`fastpo.train.zero.ZeroWeights` is for those that share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastpo.train.optimizer import GROUP_STATE

State = dict[str, dict[str, Any]]
COUNTS = ": counts"
"""The key of what an optimizer counts for all parameters together; no parameter has the name."""
UNORDERED = ""
"""The key of an optimizer state that is not ordered by parameter."""


class PolicyWeights:
    """Trainable weights that every process holds whole (one process, or plain data parallelism).

    Methods marked *collective* must be called by all processes alike.

    Args:
        trainable: The policy's trainable parameters by name.
        optimizer: Their optimizer.
        main: Whether this is the main process, the one that writes.
    """

    def __init__(
        self, trainable: dict[str, nn.Parameter], optimizer: Optimizer, *, main: bool
    ) -> None:
        self.trainable = trainable
        self.optimizer = optimizer
        self.main = main

    @property
    def whole(self) -> bool:
        """Whether `local` are whole weights, not parts of them."""
        return True

    @property
    def local(self) -> dict[str, Tensor]:
        """The tensors that hold this process's part of each weight; averages shadow these."""
        return dict(self.trainable)

    def release_gathered(self) -> None:
        """Makes `local` the only copy of the weights; call it around any exchange of them."""

    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns tensors laid out like `local`, whole, on the main process (collective).

        Args:
            parts: Each process's parts; a name ends in its parameter's, behind an optional number
                and a dot, as `MovingAverages.state_dict` has it.

        Returns:
            The whole tensors; empty on the other processes.
        """
        return {n: p.detach().contiguous() for n, p in parts.items()} if self.main else {}

    @torch.no_grad()
    def scatter(self, whole: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        """Fills tensors laid out like `local` with their parts of whole ones."""
        for name, part in parts.items():
            part.copy_(whole[name])

    def load(self, whole: Mapping[str, Tensor]) -> None:
        """Sets the weights."""
        self.scatter(whole, self.local)

    def optimizer_state(self) -> State:
        """Returns the optimizer's state by parameter, on the main process (collective)."""
        if not self.main:
            return {}
        saved = self.optimizer.state_dict()
        if "state" not in saved:  # an optimizer around others, which orders its state by itself
            return {UNORDERED: saved}
        names = self._names()
        state = {names[i]: values for i, values in saved["state"].items()}
        counts = {k: float(v) for k, v in saved["param_groups"][0].items() if k in GROUP_STATE}
        return state | ({COUNTS: counts} if counts else {})

    def load_optimizer_state(self, saved: State) -> None:
        """Sets the optimizer's state; rates and options stay those of the configuration."""
        if UNORDERED in saved:
            self.optimizer.load_state_dict(saved[UNORDERED])
            return
        state = self.optimizer.state_dict()
        state["state"] = {i: saved[name] for i, name in self._names().items() if name in saved}
        self.optimizer.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group |= {k: type(group[k])(v) for k, v in saved.get(COUNTS, {}).items()}

    def _names(self) -> dict[int, str]:
        """Parameter names by the optimizer's own numbering."""
        name_of = {id(p): name for name, p in self.trainable.items()}
        listed = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {i: name_of[id(p)] for i, p in enumerate(listed)}


def parameter_name(key: str) -> str:
    """The parameter that an average's key `<number>.<parameter>`, or its own name, belongs to."""
    number, _, name = key.partition(".")
    return name if number.isdigit() else key
