"""What every scorer has, and what those with weights share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastpo.precision import DTYPES
from fastpo.system.process import default_device

Scores = dict[str, NDArray[np.float64]]
Prompts = Sequence[str | None]
BATCH_SIZE = 16


@runtime_checkable
class Scorer(Protocol):
    """Scores images against their prompts.

    Attributes:
        name: Its name in messages.
    """

    name: str

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scores:
        """Returns one `(N,)` float64 array per metric, higher is better, the main metric first."""
        ...


class WeightedScorer:
    """A scorer that runs a network: where, on how many images at once, and in which precision.

    Args:
        device: Where it runs; default CUDA if there is any.
        batch_size: Images of one forward pass.
        precision: `fp32`, `bf16` or `fp16`: the dtype of weights and forward pass. Norms, cosines
            and heads are computed in float64 in all of them.

    Attributes:
        name: Its name in messages, and of its metric.
        reads_prompts: Whether a score depends on the prompt.
        needs_groups: Whether a score depends on the other images of the same prompt, which must
            then be in one call of `score`.
    """

    name = ""
    reads_prompts = True
    needs_groups = False

    def __init__(
        self,
        *,
        device: torch.device | str | None = None,
        batch_size: int = BATCH_SIZE,
        precision: str = "fp32",
    ) -> None:
        self.device = torch.device(device or default_device())
        self.batch_size = batch_size
        self.dtype = DTYPES[precision]

    @torch.inference_mode()
    def batched(
        self,
        score: Callable[[Sequence[Image.Image], Sequence[str]], Tensor],
        images: Sequence[Image.Image],
        prompts: Sequence[str],
    ) -> NDArray[np.float64]:
        """Runs `score` over slices of the images; `(N, ...)`, `(0,)` without images.

        Raises:
            ValueError: There is not one prompt per image.
        """
        if len(images) != len(prompts):
            raise ValueError(f"one prompt per image: got {len(images)} and {len(prompts)}")
        size = self.batch_size
        starts = range(0, len(images), size)
        parts = [score(images[i : i + size], prompts[i : i + size]) for i in starts]
        return torch.cat(parts).double().cpu().numpy() if parts else np.zeros(0)


def reads_prompts(scorer: Scorer) -> bool:
    """Tells whether a scorer's scores depend on the prompts; of a foreign one it is assumed."""
    return not isinstance(scorer, WeightedScorer) or scorer.reads_prompts


def needs_groups(scorer: Scorer) -> bool:
    """Tells whether all images of a prompt must be scored in one call."""
    return isinstance(scorer, WeightedScorer) and scorer.needs_groups
