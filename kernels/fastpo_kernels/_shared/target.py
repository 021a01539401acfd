"""What the denoiser should answer where no tensor holds it: formed where it is used. Torch only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastpo_kernels._shared.layout import joint_layout
from fastpo_kernels._shared.philox import MAX_SEED, Stream, pair_normal

Prediction = Literal["epsilon", "v_prediction", "flow"]
# The operators and the kernels take these, in this order; the first three are latent-sized.
PARTS = ("noise", "latents", "logvar", "signal", "sigma", "pair_key", "visit")
EncodedTarget = tuple[Sequence[Tensor], str, Sequence[float]]


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
    """The target of B pairs, formed in registers where a loss reads it, never written to memory.

    With the pair's noise n and a side's `x = (latents + exp(logvar/2) n' - shift) scale`, it is n
    (`epsilon`), `signal n - sigma x` (`v_prediction`) or `n - x` (`flow`), in float32. Give the
    noise as a tensor, or a `draw` to make it again, bit for bit as the noise kernel made it on the
    same device; n' is always drawn again.

        >>> noise, latents = torch.randn(2, 4, 8, 8), torch.randn(4, 4, 8, 8)
        >>> target = PairTarget("v_prediction", noise, latents, signal=torch.full((2,), 0.8),
        ...                     sigma=torch.full((2,), 0.6))

    Attributes:
        prediction: what the denoiser predicts.
        noise: `[B, *dims]`, floating-point, or None: drawn.
        latents: `[2B, *dims]`, floating-point, winners first; for epsilon None.
        signal: `[B]` float32, factor of the latents at each pair's timestep; v prediction's alone.
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
        """The tensors that there are, by their names in `PARTS`."""
        own = {name: getattr(self, name) for name in PARTS[:5]}
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
        shapes = dict.fromkeys(PARTS, (n_pairs,))
        shapes |= {"noise": (n_pairs, *dims), "latents": (2 * n_pairs, *dims)}
        shapes["logvar"] = shapes["latents"]
        for name, part in self.parts().items():
            _check_part(f"target's {name}", part, name, shapes[name], policy)

    def _check_presence(self) -> None:
        if self.prediction not in get_args(Prediction):
            allowed = get_args(Prediction)
            raise ValueError(
                f"target's prediction must be one of {allowed}, got {self.prediction!r}"
            )
        needed = {"epsilon": (), "flow": ("latents",)}
        needed["v_prediction"] = ("latents", "signal", "sigma")
        for name in ("latents", "signal", "sigma"):
            missing = getattr(self, name) is None
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

    def encode(self) -> EncodedTarget:
        """Tensors, their kind and names, and numbers: what an operator's schema can hold."""
        parts = self.parts()
        if self.draw is not None and self.noise is not None and self.logvar is None:
            parts = {name: t for name, t in parts.items() if name not in PARTS[5:]}
        kind = "shared" if self.prediction == "epsilon" else self.prediction
        seed = 0 if self.draw is None else self.draw.seed
        return list(parts.values()), " ".join([kind, *parts]), [float(seed), self.shift, self.scale]

    def form(self, policy: Tensor) -> Tensor:
        """The target of `policy`'s predictions as a tensor, in their dtype or in float32 if better.

        `[B, *dims]` for epsilon, which the pair shares, else `[2B, *dims]`.
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
        x = ((x - self.shift) * self.scale).unflatten(0, (2, len(noise)))
        if self.signal is None or self.sigma is None:
            return (noise - x).flatten(0, 1)
        shape = (-1, *[1] * (noise.ndim - 1))
        signal, sigma = (t.to(dtype).view(shape) for t in (self.signal, self.sigma))
        return (signal * noise - sigma * x).flatten(0, 1)

    def _drawn(self, policy: Tensor, dtype: torch.dtype, stream: Stream) -> Tensor:
        draw, dims = self.draw, policy.shape[1:]
        assert draw is not None
        return pair_normal(
            draw.pair_key, draw.visit, dims, seed=draw.seed, stream=stream, dtype=dtype
        )


def _check_part(
    label: str, part: Tensor, name: str, shape: tuple[int, ...], policy: Tensor
) -> None:
    if not isinstance(part, Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(part).__name__}")
    if name in ("pair_key", "visit"):
        if part.dtype != torch.int64:
            raise TypeError(f"{label} must be int64, got {part.dtype}")
    elif not part.is_floating_point():
        raise TypeError(f"{label} must be a floating-point tensor, got {part.dtype}")
    if tuple(part.shape) != shape:
        raise ValueError(f"{label} must be {shape} for policy's rows, got {tuple(part.shape)}")
    if part.device != policy.device:
        raise ValueError(f"{label} must be on policy's {policy.device}, got {part.device}")


def encode_ready(target: Tensor, n_pairs: int) -> EncodedTarget:
    """`encode` of a target that is a tensor, `[B, *dims]` or `[2B, *dims]`."""
    kind = "shared noise" if target.shape[0] == n_pairs else "separate noise"
    return [target], kind, [0.0, 0.0, 1.0]


class KernelTarget(NamedTuple):
    """The kernels' arguments for a target."""

    tensors: tuple[Tensor | None, ...]
    kind: str
    scalars: tuple[int, float, float]

    @classmethod
    def decode(cls, tensors: Sequence[Tensor], kind: str, scalars: Sequence[float]) -> KernelTarget:
        """What `encode` wrote; the tensors in the order of `PARTS`, None for one that is not."""
        formula, *names = kind.split()
        parts = dict(zip(names, tensors, strict=True))
        seed, shift, scale = scalars
        return cls(tuple(map(parts.get, PARTS)), formula, (int(seed), shift, scale))

    @property
    def slots(self) -> tuple[int | None, ...]:
        """Of each of `PARTS`, which of the encoded tensors it is."""
        given = iter(range(len(PARTS)))
        return tuple(None if t is None else next(given) for t in self.tensors)

    @property
    def n_streams(self) -> int:
        """What a program holds beside a target that is read: latents, log-variance, drawn noise."""
        noise, latents, logvar = (t is not None for t in self.tensors[:3])
        return latents + logvar + (not noise)

    def layout(self, others: Sequence[Tensor]):
        """Joint sizes, and strides of the others and of noise, latents and log-variance."""
        own = [t for t in self.tensors[:3] if t is not None]
        # Draws are numbered in row-major order.
        sizes, rows = joint_layout([*others, *own], in_order=self.tensors[5] is not None)
        given = iter(rows[len(others) :])
        strides = tuple(rows[0] if t is None else next(given) for t in self.tensors[:3])
        return sizes, rows[: len(others)], strides
