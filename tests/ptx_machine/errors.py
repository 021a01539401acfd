"""What the machine raises: a class for each kind of fault, so that a test can name it."""

from __future__ import annotations


class PtxError(Exception):
    """The base of all; the message names kernel, line, instruction, program and thread."""


class UnknownInstruction(PtxError):
    """The text holds an instruction, or a modifier of one, that the machine does not know."""


class OutOfBounds(PtxError):
    """An access outside every allocation that the launch was given."""


class Misaligned(PtxError):
    """An access at an address that its width does not divide."""


class ReadOfUnwritten(PtxError):
    """A load of memory that nobody wrote."""


class Race(PtxError):
    """Two accesses, one of them a write, that no barrier and no release and acquire order."""


class OrderMatters(PtxError):
    """Two orders of the same programs and warps left different bits."""


class Unreached(PtxError):
    """A barrier, or a shuffle, that some of its threads never reach."""
