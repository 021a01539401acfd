"""What the denoiser should answer, named by its parts instead of held by a tensor. Torch only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastpo_kernels._shared.philox import MAX_SEED, Stream, pair_normal

Prediction = Literal["epsilon", "v_prediction", "flow"]


@dataclass(frozen=True, eq=False)
class PairDraw:
    """Names the draws of B pairs: `pair_noise` makes the same numbers from it at any time.

    Attributes:
        seed: the run's seed in [0, 2^32).
        pair_key: `[B]` int64 in [0, 2^63).
        visit: `[B]` int64 in [0, 2^32).
    """

    seed: int
    pair_key: Tensor
    visit: Tensor


@dataclass(frozen=True, eq=False)
class PairTarget:
    """The target of B pairs by its parts; a loss that is given one forms the tensor first.

    With the pair's noise n and a side's `x = (latents + exp(logvar/2) n' - shift) scale`, it is n
    (`epsilon`), `signal n - sigma x` (`v_prediction`) or `n - x` (`flow`), in float32. Give the
    noise as a tensor, or a `draw` to make it again; n' is always drawn again, as the reference of
    `pair_noise` draws.

        >>> noise, latents = torch.randn(2, 4, 8, 8), torch.randn(4, 4, 8, 8)
        >>> target = PairTarget("v_prediction", noise, latents, signal=torch.full((2,), 0.8),
        ...                     sigma=torch.full((2,), 0.6))

    Attributes:
        prediction: what the denoiser predicts.
        noise: `[B, *dims]`, floating-point, `[2B, *dims]` where the sides have noise of their own,
            or None: drawn.
        latents: `[2B, *dims]`, floating-point, winners first; for epsilon None.
        signal: `[B]` float32, factor of the latents at each pair's timestep, or `[2B]` at each
            side's; v prediction's alone.
        sigma: `[B]` float32, factor of the noise; likewise.
        draw: what the draws are named by; needed without `noise` and with `logvar`.
        logvar: like `latents`, the posterior's log-variance where the latents are its mean.
        shift: subtracted from the latents.
        scale: multiplies them then.
    """

    prediction: Prediction
    noise: Tensor | None = None
    latents: Tensor | None = None
    signal: Tensor | None = None
    sigma: Tensor | None = None
    draw: PairDraw | None = None
    logvar: Tensor | None = None
    shift: float = 0.0
    scale: float = 1.0

    def parts(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        own = {
            "noise": self.noise,
            "latents": self.latents,
            "logvar": self.logvar,
            "signal": self.signal,
            "sigma": self.sigma,
        }
        if self.draw is not None:
            own |= {"pair_key": self.draw.pair_key, "visit": self.draw.visit}
        return {name: t for name, t in own.items() if t is not None}

    def check(self, policy: Tensor) -> None:
        """Whether this is a target for `policy`'s predictions.

        Raises:
            TypeError: not a tensor, or of a dtype that is not taken.
            ValueError: a part too many or too few, or of a wrong shape or device.
        """
        self._check_presence()
        n_pairs, dims = policy.shape[0] // 2, tuple(policy.shape[1:])
        sides = (2 * n_pairs, *dims)
        either = ((n_pairs,), (2 * n_pairs,))
        shapes = {
            "noise": ((n_pairs, *dims), sides),
            "latents": (sides,),
            "logvar": (sides,),
            "signal": either,
            "sigma": either,
        }
        for name, part in self.parts().items():
            _check_part(name, part, shapes.get(name, ((n_pairs,),)), policy)

    def _check_presence(self) -> None:
        if self.prediction not in get_args(Prediction):
            allowed = get_args(Prediction)
            raise ValueError(
                f"target's prediction must be one of {allowed}, got {self.prediction!r}"
            )
        needed = {"epsilon": (), "flow": ("latents",)}
        needed["v_prediction"] = ("latents", "signal", "sigma")
        parts = {"latents": self.latents, "signal": self.signal, "sigma": self.sigma}
        for name, part in parts.items():
            missing = part is None
            if missing == (name in needed[self.prediction]):
                rule = "needs" if missing else "takes no"
                raise ValueError(f"a target of {self.prediction} {rule} {name}")
        if self.logvar is not None and (self.latents is None or self.draw is None):
            raise ValueError("target's logvar needs latents, its mean, and a draw")
        if self.noise is None and self.draw is None:
            raise ValueError("a target needs noise, or a draw to make it from")
        if self.draw is not None and not isinstance(self.draw, PairDraw):
            raise TypeError(f"target's draw must be a PairDraw, got {type(self.draw).__name__}")
        if self.draw is not None and not 0 <= self.draw.seed <= MAX_SEED:
            raise ValueError(f"target's seed must lie in [0, 2^32), got {self.draw.seed}")

    @torch.no_grad()
    def form(self, policy: Tensor) -> Tensor:
        """The target of `policy`'s predictions as a tensor, in their dtype or in float32 if better.

        `[B, *dims]` for an epsilon that the pair shares, else `[2B, *dims]`.
        """
        dtype = torch.promote_types(policy.dtype, torch.float32)
        noise = self.noise
        noise = self._drawn(policy, dtype, Stream.NOISE) if noise is None else noise.to(dtype)
        if self.latents is None:
            return noise
        x = self.latents.to(dtype)
        if self.logvar is not None:
            sides = (Stream.POSTERIOR_WINNER, Stream.POSTERIOR_LOSER)
            draws = torch.cat([self._drawn(policy, dtype, side) for side in sides])
            x = x + torch.exp(0.5 * self.logvar.to(dtype)) * draws
        n_pairs = policy.shape[0] // 2
        x = ((x - self.shift) * self.scale).unflatten(0, (2, n_pairs))
        noise = noise.unflatten(0, (-1, n_pairs))
        if self.signal is None or self.sigma is None:
            return (noise - x).flatten(0, 1)
        shape = (-1, n_pairs, *[1] * (x.ndim - 2))
        signal, sigma = (t.to(dtype).view(shape) for t in (self.signal, self.sigma))
        return (signal * noise - sigma * x).flatten(0, 1)

    def _drawn(self, policy: Tensor, dtype: torch.dtype, stream: Stream) -> Tensor:
        draw, dims = self.draw, policy.shape[1:]
        assert draw is not None
        return pair_normal(
            draw.pair_key, draw.visit, dims, seed=draw.seed, stream=stream, dtype=dtype
        )


def _check_part(
    name: str, part: Tensor, shapes: tuple[tuple[int, ...], ...], policy: Tensor
) -> None:
    label = f"target's {name}"
    if not isinstance(part, Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(part).__name__}")
    if name in ("pair_key", "visit"):
        if part.dtype != torch.int64:
            raise TypeError(f"{label} must be int64, got {part.dtype}")
    elif not part.is_floating_point():
        raise TypeError(f"{label} must be a floating-point tensor, got {part.dtype}")
    if tuple(part.shape) not in shapes:
        allowed = " or ".join(map(str, shapes))
        raise ValueError(f"{label} must be {allowed} for policy's rows, got {tuple(part.shape)}")
    if part.device != policy.device:
        raise ValueError(f"{label} must be on policy's {policy.device}, got {part.device}")
