"""The peak of one process's memory: what is held throughout, and the largest phase of a step."""

from __future__ import annotations

from fastpo.plan.schema import Memory

ALLOWANCE = 10**9
"""Bytes for the CUDA context, cuBLAS and cuDNN workspaces: an assumption."""


def peak(parts: dict[str, int], phases: dict[str, int]) -> Memory:
    """Adds the largest of the phases, which follow one another, to what is held throughout."""
    phase = max(phases, key=phases.__getitem__)
    return Memory(**parts, activations=phases[phase], phase=phase, allowance=ALLOWANCE)
