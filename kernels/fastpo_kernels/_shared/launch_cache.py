"""Launches that cost the host little when they come again.

`kernel[grid](...)` binds its arguments, specialises on each and looks the result up, which costs as
much as all else together. The outcome depends on dtypes, layouts and alignments alone, so a
launcher keeps the compiled kernel under these, and calls it with new addresses and numbers.
Imports no Triton; used only by what does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

_MOST_LAUNCHES = 1024  # a training run has two for every shape of batch


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
class CachedLaunch:
    """A launch but for its tensors and the numbers that no kernel is specialised on.

    A kernel's parameters are tensors, sizes, numbers, constexprs, in this order.

    Attributes:
        programs: size of the grid.
        sizes: sizes and strides.
        constexprs: the last parameters, in order.
        num_warps: of a program.
        scratch: float32 elements that the launch works in.
        compiled: launches the compiled kernel; None before the first launch.
    """

    programs: int
    sizes: tuple
    constexprs: Mapping[str, Any]
    num_warps: int
    scratch: int = 0
    compiled: Callable[..., None] | None = None
    _constants: tuple = field(default=(), repr=False)

    def launch(self, kernel: Any, tensors: tuple, numbers: tuple) -> CachedLaunch:
        """Launches a `@triton.jit` function; returns what can launch it again.

        The interpreter compiles nothing, and its result cannot.
        """
        compiled = kernel[(self.programs,)](
            *tensors, *self.sizes, *numbers, **self.constexprs, num_warps=self.num_warps
        )
        if compiled is None:
            return self
        constants = tuple(self.constexprs.values())
        return replace(self, compiled=compiled[(self.programs, 1, 1)], _constants=constants)

    def relaunch(self, addresses: tuple, numbers: tuple) -> None:
        """Launches again, on tensors that lie as the first did."""
        assert self.compiled is not None
        self.compiled(*addresses, *self.sizes, *numbers, *self._constants)


class LaunchCache(dict[Hashable, CachedLaunch]):
    """Launches that can be repeated, by what they depend on; too many are forgotten all at once."""

    def keep(self, key: Hashable, launch: CachedLaunch) -> None:
        """Keeps a launch, if it can be repeated."""
        if launch.compiled is None:
            return
        if len(self) >= _MOST_LAUNCHES:
            self.clear()
        self[key] = launch
