"""The pair losses: inputs, bytes, and the providers that are timed against one another.

`eager` is the loss as trainers write it: `F.mse_loss(pred.float(), target.float())` averaged per
image, on a target repeated for both sides, then the objective's few lines: trainers' own where
these are known, else the oracle's. `reference` is our float64-capable oracle, `compile` its
compiled form, `ours` the default of the machine: Triton on a GPU, the CPU implementation on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo import loss as fl
from fastpo.bench.cases import DTYPES, Case
from fastpo.bench.measure import Call, device, graphed
from fastpo_kernels.pair_loss import Adaptive, PairLoss
from fastpo_kernels.pair_loss.epilogue import PairErrors, from_errors
from fastpo_kernels.pair_loss.objectives import OBJECTIVES as SCALARS
from fastpo_kernels.pair_loss.objectives import Judged
from fastpo_kernels.pair_loss.spec import LossSpec, PairTensors
from fastpo_kernels.testing import PairInputs

SMOOTH, ADAPTIVE = 0.1, Adaptive(beta=1000.0)
COMPILE_MODES = {"compile": None, "compile-max": "max-autotune-no-cudagraphs"}
PROVIDERS = ("eager", "reference", *COMPILE_MODES, "ours", "ours-graph")


@dataclass(frozen=True)
class Objective:
    """A public call, the scalar function that eager applies with its options, the streams read."""

    call: Callable[..., PairLoss]
    scalar: str
    options: tuple[float, ...]
    streams: int = 2
    safeguard: float | None = None
    adaptive: Adaptive | None = None

    @property
    def has_statistics(self) -> bool:
        """Whether the batch's statistics enter the loss of a pair."""
        return self.scalar == "kto" or self.adaptive is not None or self.safeguard is not None


def _referenced(function: Callable[..., PairLoss], **options: float) -> Callable[..., PairLoss]:
    return lambda x, impl: function(x.policy, x.reference, x.target, impl=impl, **options)


def _alone(function: Callable[..., PairLoss]) -> Callable[..., PairLoss]:
    return lambda x, impl: function(x.policy, x.target, impl=impl)


def _judged(function: Callable[..., PairLoss], **options: float) -> Callable[..., PairLoss]:
    return lambda x, impl: function(
        x.policy, x.reference, x.target, annotators=x.annotators, impl=impl, **options
    )


_BETA = (2500.0,)
# In their order of importance to the speed targets.
OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(_referenced(fl.dpo, beta=2500.0), "dpo", _BETA),
    "adaptive_dpo": Objective(
        _judged(fl.adaptive_dpo, beta=1000.0), "dpo", (1000.0,), 4, adaptive=ADAPTIVE
    ),
    "sdpo": Objective(_referenced(fl.sdpo, beta=2500.0, mu=0.9), "dpo", _BETA, safeguard=0.9),
    "mapo": Objective(_alone(fl.mapo), "mapo", (0.1, 0.5, 1000.0), 1),
    "sft": Objective(_alone(fl.sft), "sft", (), 1),
    "ipo": Objective(_referenced(fl.ipo, tau=5.0), "ipo", (5.0,)),
    "kto": Objective(_referenced(fl.kto, beta=2500.0), "kto", (2500.0, 1.0, 1.0)),
    "hinge": Objective(_referenced(fl.hinge, beta=2500.0), "hinge", _BETA),
    "robust_dpo": Objective(
        _referenced(fl.robust_dpo, beta=2500.0, label_smoothing=SMOOTH),
        "robust_dpo", (2500.0, SMOOTH),
    ),
    "dmpo": Objective(
        _referenced(fl.dmpo, beta=2500.0, alpha=0.5), "dmpo", (2500.0, *(-0.6931471805599453,) * 2)
    ),
    "linear_dpo": Objective(
        _referenced(fl.linear_dpo, beta=2500.0), "linear_dpo", (2500.0, 1e-3)
    ),
    "adaptive_ipo": Objective(
        _judged(fl.adaptive_ipo, tau=5.0, beta=1000.0), "ipo", (5.0,), 4,
        adaptive=replace(ADAPTIVE, shift_scale=1e-3),
    ),
}  # fmt: skip


def inputs(case: Case) -> PairInputs:
    """Predictions near a shared target, drawn where they are used."""
    where, dtype, streams = device(), DTYPES[case.dtype], OBJECTIVES[case.name].streams
    torch.manual_seed(0)
    target = torch.randn(case.pairs, *case.dims, device=where, dtype=dtype)
    shape = (2 * case.pairs, *case.dims)
    full = [torch.randn(shape, device=where, dtype=dtype).mul_(0.3) for _ in range(streams)]
    for t in full:
        t.unflatten(0, (2, case.pairs)).add_(target)
    return PairInputs(full[0].requires_grad_(), full[min(1, streams - 1)], target, full[2:])


def least_bytes(case: Case) -> dict[str, int]:
    """Forward: every stream and the target read; backward: policy and target read, one written."""
    streams = OBJECTIVES[case.name].streams
    found = {"fwd": (2 * streams + 1) * case.sample_bytes, "bwd": 5 * case.sample_bytes}
    return {**found, "both": found["fwd"] + found["bwd"]}


def needed_bytes(case: Case) -> int:
    """Memory of the inputs, the repeated target, and eager's float32 copies and gradients."""
    streams = OBJECTIVES[case.name].streams
    return (2 * streams + 5) * case.sample_bytes + (streams + 4) * case.float_bytes


def _trainer_errors(pred: Tensor, target: Tensor) -> Tensor:
    losses = F.mse_loss(pred.float(), target.float(), reduction="none")
    return losses.mean(dim=list(range(1, losses.ndim)))


def _trainer_dpo(pair: Judged, beta: float) -> Tensor:
    """DPO in the released trainers' lines."""
    return -F.logsigmoid(beta * pair.d)


def _trainer_robust_dpo(pair: Judged, beta: float, smoothing: float) -> Tensor:
    """Robust DPO in the lines of Adaptive-DPO's trainer."""
    z = beta * pair.d
    up, down = F.logsigmoid(z), F.logsigmoid(-z)
    return (-up * (1 - smoothing) + down * smoothing) / (1 - 2 * smoothing)


def _trainer_mapo(pair: Judged, weight: float, snr: float, num_timesteps: float) -> Tensor:
    """MaPO in the released trainer's lines, but for `expm1`, where that writes `exp(...) - 1`."""
    e_w, e_l = pair.e
    winner = snr * e_w / torch.expm1(snr * e_w)
    loser = snr * e_l / torch.expm1(snr * e_l)
    return e_w - weight * F.logsigmoid(num_timesteps * (winner - loser))


_TRAINERS = {"dpo": _trainer_dpo, "robust_dpo": _trainer_robust_dpo, "mapo": _trainer_mapo}


def trainer_loss(name: str, x: PairInputs) -> Callable[[], Tensor]:
    """The loss as a trainer writes it; a shared target is repeated before the clock runs."""
    objective, target = OBJECTIVES[name], x.target
    if len(target) != len(x.policy):
        target = target.repeat(2, *[1] * (target.ndim - 1))

    def known(source: Tensor) -> Tensor:
        with torch.no_grad():
            return _trainer_errors(source, target)

    def plain() -> Tensor:
        e_w, e_l = _trainer_errors(x.policy, target).chunk(2)
        r = known(x.reference).chunk(2) if objective.streams > 1 else None
        d = e_l - e_w if r is None else (r[0] - r[1]) - (e_w - e_l)
        function = _TRAINERS.get(objective.scalar, SCALARS[objective.scalar].function)
        return function(Judged(d, (e_w, e_l), r, 0.0), *objective.options).mean()

    def with_statistics() -> Tensor:
        errors = _trainer_errors(x.policy, target).unflatten(0, (2, -1))
        reference = known(x.reference).view_as(errors)
        judged = [known(a).view_as(errors) for a in x.annotators]
        dot = None
        if objective.safeguard is not None:
            winner, loser = (x.policy.detach().float() - target.float()).chunk(2)
            dot = (winner * loser).flatten(1).mean(1)
        spec = LossSpec(
            objective.scalar, objective.options, objective.adaptive, objective.safeguard
        )
        found = PairErrors(errors, reference, judged, dot)
        return from_errors(found, PairTensors(x.policy, target), spec).loss

    return with_statistics if objective.has_statistics else plain


def losses(case: Case, x: PairInputs, providers: Iterable[str]) -> dict[str, Callable[[], Tensor]]:
    """What every provider calls to get the scalar loss."""
    call = OBJECTIVES[case.name].call
    default = "triton" if device() == "cuda" else None
    found: dict[str, Callable[[], Tensor]] = {}
    for provider in providers:
        if provider == "eager":
            found[provider] = trainer_loss(case.name, x)
        elif provider == "reference":
            found[provider] = lambda: call(x, "reference").loss
        elif provider in COMPILE_MODES:
            mode = COMPILE_MODES[provider]
            compiled = torch.compile(lambda: call(x, "reference").loss, mode=mode, dynamic=False)
            found[provider] = compiled
        else:
            found[provider] = lambda: call(x, default).loss
    return found


def graphed_step(case: Case, x: PairInputs, direction: str) -> Call:
    """Our default in a CUDA graph.

    From a leaf of its own: that of `x` belongs to the stream of the losses that live, and a capture
    may not wait for it.
    """
    y = replace(x, policy=x.policy.detach().requires_grad_())

    def loss() -> Tensor:
        return OBJECTIVES[case.name].call(y, "triton").loss

    def both() -> object:
        return torch.autograd.grad(loss(), y.policy)

    return graphed(both if direction == "both" else loss)


def passes(
    case: Case, x: PairInputs, found: dict[str, Callable[[], Tensor]], direction: str
) -> dict[str, Callable[[], Call]]:
    """How to make the call of every provider for one direction; a graph has no backward alone."""
    made: dict[str, Callable[[], Call]] = {
        name: (lambda loss=loss: _pass(loss, x, direction))
        for name, loss in found.items()
        if name != "ours-graph"
    }
    if "ours-graph" in found and direction != "bwd":
        made["ours-graph"] = lambda: graphed_step(case, x, direction)
    return made


def _pass(loss: Callable[[], Tensor], x: PairInputs, direction: str) -> Call:
    if direction == "bwd":
        value = loss()
        return lambda: torch.autograd.grad(value, x.policy, retain_graph=True)
    call: Call = loss
    if direction == "both":

        def call() -> object:
            return torch.autograd.grad(loss(), x.policy)

    return call


def disagreement(case: Case, x: PairInputs) -> str:
    """Empty, or how the default's loss or gradient departs from the reference's."""
    call = OBJECTIVES[case.name].call
    found = []
    for impl in ("triton" if device() == "cuda" else None, "reference"):
        loss = call(x, impl).loss
        found.append((loss.detach(), *torch.autograd.grad(loss, x.policy)))
    for name, ours, theirs in zip(("loss", "gradient"), *found, strict=True):
        error = (ours.float() - theirs.float()).abs().max().item()
        scale = theirs.float().abs().max().item()
        if not error <= 2e-2 * scale + 1e-6:
            return f"{name} departs from the reference by {error:.3g} of {scale:.3g}"
    return ""
