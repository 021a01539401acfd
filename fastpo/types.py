"""The objects that cross the stages, in the order in which the data passes them.

`PreferencePair` (sources) -> `PairBatch` (cache) -> `NoisedPair` (noise) -> `PairPredictions`
(models) -> `fastpo.loss.PairLoss`. Wherever a tensor holds both sides of B pairs, the winners are
rows `0..B-1` and the losers rows `B..2B-1`, in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


MOST_PROMPT = 20_000
"""Characters of a prompt; text encoders read the first few hundred."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One labeled comparison of two images made for the same prompt.

    Attributes:
        pair_id: Stable text name of the pair within its data set; never its position.
        prompt: The caption both images were made for.
        winner: Returns the encoded bytes (JPEG, PNG, WebP) of the preferred image when called.
        loser: The same for the other image.
        flipped: Whether the label was exchanged on purpose (synthetic minority label).
        fault: Why the listing alone makes the pair unusable; None where it does not.
        weight: Multiplies the pair's loss; None where the data set says nothing, which counts as 1.
        source_images: Of an edit, each returns the bytes of an image that the prompt says how to
            change, in the order in which the model is told them.
    """

    pair_id: str
    prompt: str
    winner: Callable[[], bytes]
    loser: Callable[[], bytes]
    flipped: bool = False
    fault: str | None = None
    weight: float | None = None
    source_images: tuple[Callable[[], bytes], ...] = ()


def pair_key(pair_id: str) -> int:
    """Returns the 63-bit integer that stands for `pair_id` in counters and on disk.

    It is the first eight bytes of BLAKE2b over the UTF-8 name, big-endian, without the sign bit.
    """
    digest = hashlib.blake2b(pair_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, slots=True)
class PairBatch:
    """B pairs of one latent shape, as the cache gives them.

    Attributes:
        index: `(B,)` int64, position of the pair in the cache; the ledger's slot.
        pair_key: `(B,)` int64, `pair_key(pair_id)`; keys the noise.
        visit: `(B,)` int64, how often each pair was drawn before (its epoch).
        flipped: `(B,)` bool, pairs that come the other way round than the data have them.
        latent_mean: `(2B, C, h, w)` mean of the VAE's posterior, unscaled, winners first.
        latent_logvar: `(2B, C, h, w)` its log-variance.
        conditions: What the denoiser is told beside the noisy latents, each `(B, ...)`, under the
            names that the model's family gives them. Both sides of a pair share them.
        pair_weight: `(B,)` float32, multiplies each pair's loss; None where the data set has none.
    """

    index: Tensor
    pair_key: Tensor
    visit: Tensor
    flipped: Tensor
    latent_mean: Tensor
    latent_logvar: Tensor
    conditions: dict[str, Tensor]
    pair_weight: Tensor | None = None

    def __len__(self) -> int:
        """Returns B."""
        return self.index.shape[0]

    def to(self, device: torch.device) -> PairBatch:
        """Returns the batch on `device`; pinned memory is copied without waiting."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> PairBatch:
        """Returns the batch with a function applied to every tensor."""
        moved: dict[str, Any] = {f.name: change(getattr(self, f.name)) for f in _PLAIN_FIELDS}
        conditions = {name: change(tensor) for name, tensor in self.conditions.items()}
        weight = None if self.pair_weight is None else change(self.pair_weight)
        return PairBatch(**moved, conditions=conditions, pair_weight=weight)


_PLAIN_FIELDS = tuple(f for f in fields(PairBatch) if f.name not in ("conditions", "pair_weight"))


@dataclass(frozen=True, slots=True)
class NoisedPair:
    """What the denoiser sees and what it should answer.

    Attributes:
        noisy_latents: `(2B, C, h, w)` both sides at the same timestep with the same noise.
        index: `(B,)` int64, the pair's place in the noise schedule, shared by the two sides.
        timesteps: `(B,)` int64 or float32, what the denoiser is told there.
        target: `(B, C, h, w)` where the pair shares it (epsilon prediction), else `(2B, C, h, w)`.
        guidance: The guidance scale that models distilled from guided predictions are told.
    """

    noisy_latents: Tensor
    index: Tensor
    timesteps: Tensor
    target: Tensor
    guidance: float = 1.0


@dataclass(frozen=True, slots=True)
class PairPredictions:
    """The denoisers' answers to one `NoisedPair`.

    Attributes:
        policy: `(2B, C, h, w)`, carries the gradient.
        reference: `(2B, C, h, w)`, or its `(2B,)` float32 errors where they were computed before,
            or None for objectives without a reference.
        annotators: Further models' predictions, each `(2B, C, h, w)`.
    """

    policy: Tensor
    reference: Tensor | None
    annotators: tuple[Tensor, ...] = ()
