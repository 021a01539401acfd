"""Edits at the size of tests: diffusers' pipelines make a megapixel of every source image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch


@contextmanager
def small_sources(side: int = 32) -> Iterator[None]:
    """Lets diffusers' pipelines resize sources to about `side` x `side` pixels instead.

    The sizes that FLUX.1-Kontext prefers keep their aspects. Qwen-Image-Edit's, which are multiples
    of 32, become twice as large.
    """
    from diffusers.pipelines.flux import pipeline_flux_kontext
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    preferred = [
        (width * side // 1024, height * side // 1024)
        for width, height in pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    ]
    with ExitStack() as patches:
        kontext = patch.object(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", preferred)
        patches.enter_context(kontext)
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
            smaller = partial(_smaller, module.calculate_dimensions, (2 * side / 1024) ** 2)
            patches.enter_context(patch.object(module, "calculate_dimensions", smaller))
        yield


def _smaller(dimensions: Callable[..., Any], share: float, area: int, ratio: float) -> Any:
    width, height, *rest = dimensions(share * area, ratio)
    return max(width, 32), max(height, 32), *rest
