"""Executes the PTX that Triton compiles, without a GPU, and watches it: see docs/ptx-machine.md.

Needs NumPy; `launch` also Triton and torch. Imports nothing of FastPO.
"""

from .counts import Counts
from .errors import (
    Misaligned,
    OrderMatters,
    OutOfBounds,
    PtxError,
    Race,
    ReadOfUnwritten,
    UnknownInstruction,
    Unreached,
)
from .machine import Machine
from .parser import parse

__all__ = [
    "Counts",
    "Machine",
    "Misaligned",
    "OrderMatters",
    "OutOfBounds",
    "PtxError",
    "Race",
    "ReadOfUnwritten",
    "UnknownInstruction",
    "Unreached",
    "parse",
]
