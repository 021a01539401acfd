"""Launches that cost the host little when they come again.

`kernel[grid](...)` binds its arguments, specialises on each and looks the result up, which costs as
much as all else together. The outcome depends on dtypes, layouts and alignments alone, so a
launcher keeps the compiled kernel under these, and calls it with new addresses and numbers.
Imports no Triton; used only by what does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

_MOST_PLANS = 1024  # a training run has two for every shape of batch


def described(tensors: Iterable[Tensor | None]) -> tuple[tuple, list[int | None]]:
    """What a compiled kernel depends on of its tensors, hashable, and their addresses."""
    facts: list[Hashable] = []
    addresses: list[int | None] = []
    for t in tensors:
        if t is None:
            facts.append(None)
            addresses.append(None)
        else:
            address = t.data_ptr()
            facts.append((t.dtype, t.shape, t.stride(), address % 16))
            addresses.append(address)
    return tuple(facts), addresses


@dataclass(frozen=True)
class Plan:
    """A launch but for its tensors and the numbers that no kernel is specialised on.

    A kernel's parameters are tensors, sizes, numbers, constexprs, in this order.

    Attributes:
        programs: size of the grid.
        sizes: sizes and strides.
        constexprs: the last parameters, in order.
        num_warps: of a program.
        scratch: float32 elements that the launch works in.
        slots: where in the tuple of a target's parts each given one stands.
        again: launches the compiled kernel; None before the first launch.
    """

    programs: int
    sizes: tuple
    constexprs: Mapping[str, Any]
    num_warps: int
    scratch: int = 0
    slots: Sequence[int | None] = ()
    again: Callable[..., None] | None = None
    _constants: tuple = field(default=(), repr=False)

    def first(self, kernel: Any, tensors: tuple, numbers: tuple) -> Plan:
        """Launches a `@triton.jit` function; returns the plan that can be repeated.

        The interpreter compiles nothing, and its plan cannot.
        """
        compiled = kernel[(self.programs,)](
            *tensors, *self.sizes, *numbers, **self.constexprs, num_warps=self.num_warps
        )
        if compiled is None:
            return self
        constants = tuple(self.constexprs.values())
        return replace(self, again=compiled[(self.programs, 1, 1)], _constants=constants)

    def repeat(self, addresses: tuple, numbers: tuple) -> None:
        """Launches again, on tensors that lie as the first did."""
        assert self.again is not None
        self.again(*addresses, *self.sizes, *numbers, *self._constants)

    def placed(self, addresses: Sequence[int | None]) -> tuple:
        """The addresses of a target's given parts, None for the others."""
        return tuple([None if k is None else addresses[k] for k in self.slots])


class Plans(dict[Hashable, Plan]):
    """Plans that can be repeated, by what they depend on; too many are forgotten all at once."""

    def keep(self, key: Hashable, plan: Plan) -> None:
        """Keeps a plan, if it can be repeated."""
        if plan.again is None:
            return
        if len(self) >= _MOST_PLANS:
            self.clear()
        self[key] = plan
