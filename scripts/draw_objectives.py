"""Draws how each objective pulls on a pair, by autograd through `fastpo.loss`, for the docs.

    python scripts/draw_objectives.py       # docs/objectives.png and docs/sparse-steps.png

Reference errors are equal, and the policy's lie half a margin on either side of them. A panel shows
what a step of gradient descent does to the winner's error (down is better) and to the loser's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastpo.loss
from fastpo.config.train import TrainConfig
from fastpo.loss import PairLoss

DOCS = Path(__file__).parents[1] / "docs"
SLOPE = 1.0  # so that the margin is the logit
REFERENCE = 8.0  # error of both sides; so large that the policy's stay positive
LOGITS = torch.linspace(-6.0, 6.0, 241)
BLUE, RED, GRAY = "#2b6cb0", "#c05621", "#718096"

Call = Callable[[Tensor, Tensor, Tensor], PairLoss]


def call(name: str, **options: Any) -> Call:
    """A call of `fastpo.loss` by name, with everything but the tensors filled in."""
    return lambda policy, reference, target: getattr(fastpo.loss, name)(
        policy, reference, target, impl="reference", **options
    )


def minority(value: float) -> Tensor:
    """The metric u of every pair."""
    return torch.full_like(LOGITS, value, dtype=torch.float64)


PANELS: dict[str, tuple[tuple[str, Call], ...]] = {
    "dpo": (
        ("", call("dpo", beta=SLOPE)),
        ("label_smoothing 0.1", call("dpo", beta=SLOPE, label_smoothing=0.1)),
    ),
    "robust_dpo": (("label_smoothing 0.1", call("robust_dpo", beta=SLOPE, label_smoothing=0.1)),),
    "poly_dpo": (
        ("alpha 8", call("poly_dpo", beta=SLOPE, alpha=8.0)),
        ("alpha -1", call("poly_dpo", beta=SLOPE, alpha=-1.0)),
    ),
    "hinge": (("", call("hinge", beta=SLOPE)),),
    "ipo": (("tau 0.25", call("ipo", tau=0.25)),),
    "dmpo": (("alpha 0.01", call("dmpo", beta=SLOPE, alpha=0.01)),),
    "linear_dpo": (("eta 0.001", call("linear_dpo", beta=SLOPE, eta=1e-3)),),
    "sdpo": (
        ("sides agree", call("sdpo", beta=SLOPE, mu=0.9)),
        ("sides opposed", call("sdpo", beta=SLOPE, mu=0.9)),
    ),
    "kto": (("mean gain 0", call("kto", beta=SLOPE, baseline=torch.zeros(1))),),
    "sft": (("", lambda policy, _, target: fastpo.loss.sft(policy, target, rows="pairs")),),
    "mapo": (
        (
            "snr 0.5, T 12",
            lambda policy, _, target: fastpo.loss.mapo(
                policy, target, beta=1.0, snr=0.5, num_timesteps=12, impl="reference"
            ),
        ),
    ),
    "adaptive_dpo": (
        (
            "u 0, gate",
            call("adaptive_dpo", beta=SLOPE, minority=minority(0.0), weight_kind="gate"),
        ),
        ("u 0.3, linear", call("adaptive_dpo", beta=SLOPE, minority=minority(0.3))),
        (
            "u 0.9, gate",
            call("adaptive_dpo", beta=SLOPE, minority=minority(0.9), weight_kind="gate"),
        ),
    ),
}


def pulls(loss: Call, logits: Tensor = LOGITS, *, opposed: bool = False) -> tuple[Tensor, Tensor]:
    """Returns `dloss/de` of winners and losers, per pair, over the logit.

    Args:
        loss: The objective.
        logits: Margins times `SLOPE`.
        opposed: Residuals of winner and loser point in opposite directions, else in the same one.

    Returns:
        Two vectors like `logits`, float64; positive where a step lowers the error.
    """
    half = logits.double() / SLOPE / 2.0
    errors = torch.cat([REFERENCE - half, REFERENCE + half])
    sign = torch.ones_like(errors)
    sign[len(logits) :] = -1.0 if opposed else 1.0
    policy = (sign * errors.sqrt()).unsqueeze(1).requires_grad_()
    reference = torch.full_like(errors, REFERENCE)
    out = loss(policy, reference, torch.zeros_like(policy))
    (gradient,) = torch.autograd.grad(out.loss, policy)
    pull = (gradient / (2.0 * policy)).detach().squeeze(1) * len(logits)
    return pull[: len(logits)], pull[len(logits) :]


def draw_objectives(path: Path) -> None:
    """Draws one panel an objective."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 9.6), layout="constrained")
    axes = figure.subplots(4, 3, sharex=True)
    for axis, (name, calls) in zip(axes.flat, PANELS.items(), strict=True):
        for (label, loss), style in zip(calls, ("-", "--", ":"), strict=False):
            winner, loser = pulls(loss, opposed=label == "sides opposed")
            axis.plot(LOGITS, winner, style, color=BLUE, linewidth=3.6, alpha=0.55, label=label)
            axis.plot(LOGITS, -loser, style, color=RED, linewidth=1.2)
        axis.axhline(0.0, color=GRAY, linewidth=0.6)
        axis.axvline(0.0, color=GRAY, linewidth=0.6)
        axis.set_title(name, fontsize=11)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        if any(label for label, _ in calls):
            axis.legend(fontsize=8, frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("logit z = beta d")
    figure.supylabel("pull on the winner's error down (blue, wide), on the loser's error up (red)")
    figure.savefig(path, dpi=110)


def draw_sparse_steps(path: Path) -> None:
    """Draws a pair's gradient scale with its chance of a backward pass, and what a pair costs."""
    from matplotlib.figure import Figure

    threshold = TrainConfig.model_fields["backward_threshold"].default
    figure = Figure(figsize=(11.0, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    winner, _ = pulls(call("dpo", beta=SLOPE))
    scale = (winner / pulls(call("dpo", beta=SLOPE), torch.zeros(1))[0]).numpy()
    chance = np.minimum(1.0, scale / threshold)
    left.plot(LOGITS, scale, color=BLUE, label="gradient scale c, weight 1")
    left.plot(LOGITS, 0.0 * scale, color=RED, label="behind a closed gate: c = 0")
    left.plot(
        LOGITS, chance, "--", color=GRAY, label=f"chance of a backward pass: c / {threshold:g}"
    )
    left.fill_between(LOGITS, chance, 1.0, color=GRAY, alpha=0.15, linewidth=0.0)
    left.text(5.8, 0.9, "forward pass alone", ha="right", color=GRAY, fontsize=9)
    left.set(xlabel="logit z = beta d", title="What is known after the forward pass")
    left.legend(fontsize=8, loc="upper right", frameon=False)
    share = np.linspace(0.0, 1.0, 101)
    right.plot(share, 0.0 * share + 3.0, color=GRAY, label="all: 3")
    right.plot(share, 1.0 + 2.0 * share, color=RED, label="at once, the rest closed: 1 + 2 s")
    right.plot(share, 1.0 + 3.0 * share, color=BLUE, label="looking first: 1 + 3 s")
    right.axvline(2.0 / 3.0, color=GRAY, linewidth=0.6, linestyle=":")
    right.set(
        xlabel="share s of the pairs that get a backward pass",
        ylabel="passes a pair (forward 1, backward 2)",
        title="What a pair costs",
        ylim=(0.0, 4.2),
    )
    right.legend(fontsize=8, loc="lower right", frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Draws both pictures."""
    draw_objectives(DOCS / "objectives.png")
    draw_sparse_steps(DOCS / "sparse-steps.png")


if __name__ == "__main__":
    main()
