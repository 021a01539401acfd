"""Edits at the size of tests: diffusers' pipelines make a megapixel of every source image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def small_sources(side: int = 32) -> Iterator[None]:
    """Lets diffusers' pipelines resize sources to about `side` x `side` pixels instead.

    The sizes that FLUX.1-Kontext prefers keep their aspects.
    """
    from diffusers.pipelines.flux import pipeline_flux_kontext

    preferred = [
        (width * side // 1024, height * side // 1024)
        for width, height in pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    ]
    with patch.object(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", preferred):
        yield
