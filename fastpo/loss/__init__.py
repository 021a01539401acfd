"""The objectives: one function each, tensors first, options by keyword.

A batch holds B pairs, winners in rows `0..B-1`, losers in `B..2B-1`. With `e` and `r` the mean
squared denoising errors of policy and reference, the margin is `d = (r_w - r_l) - (e_w - e_l)` and
the logit `z = beta d`: **beta is the slope itself**. Trainers that write `0.5 * beta_dpo * d` call
5000 what is 2500 here. `ls` below is the log-sigmoid. The batch's loss is the mean of the pairs'
losses.

Every function takes (`sft` and `mapo` without `reference`)

* `policy`: `[2B, *dims]` float32, bfloat16 or float16 predictions; it alone gets a gradient;
* `reference` (and each annotator): `[2B, *dims]` predictions, or `[2B]` float32 errors already
known;
* `target`: `[2B, *dims]`, or `[B, *dims]` where the pair shares it, or a `PairTarget`: latents,
  noise (or its counters) and the schedule, from which the tensor is formed first;
* `pair_weight`: `[B]`, multiplies every pair's loss, or None, the default;
* `sft_weight`: adds this share of the winner's error to every pair's loss, before its weight;
* `safeguard`: Diffusion-SDPO's mu, which scales the loser's gradient: see `sdpo`;
* `layout`: `"halves"`, as above, or `"interleaved"`: winner, loser, winner, ... in all of them. Any
  of policy, reference, annotators and target may also be a tuple `(winner, loser)` of `[B, *dims]`.
  All are read where they lie (the oracle and `torch.compile` make halves of them); vectors, given
  or returned, are winners first in any case;
* `mask`: `[2B, *dims]`, or `[B, *dims]` where the pair shares it, with 1 for a dimension along
  which it is the same (inpainting, padding): errors become `sum m (x - t)**2 / sum m`, in the same
  launches. Ready errors must be made with it: `pair_errors(..., mask=)`. Not with a safeguard;
* `reduction`: `"mean"`, or `"none"`, with which `loss` is every pair's, `[B]`;
* `impl`: `"triton"`, `"cpu"`, `"reference"`, or None: triton if every tensor is on a supported GPU
  (compute capability 8.0, or AMD) and there are at most 2048 pairs, else `"cpu"`: the reference's
  mathematics in fewer operators and passes. A name never falls back; Triton needs vectors and
  ready errors contiguous.

Each returns a `PairLoss`: the scalar `loss`, `margin` `[B]` and `policy_error` `[2B]`, all three
differentiable, so that `out.loss + 0.1 * out.policy_error[:B].mean()` trains on both terms; beside
detached `reference_error` `[2B]` or None, `minority` `[B]` or None, `weight` `[B]` or None, and
`safeguard`, the factor of the loser's gradient, or None. `sft` takes neither of the two terms.

`beta` is a number or `[B]`, one for every pair, whose values are not read: see that they are
positive. No option gets a gradient, and one that wants it is refused.

A loss without a reference (what some trainers call reference-free DPO) is `dpo` on a reference
whose errors are zero: `dpo(policy, torch.zeros(2 * B), target, beta=beta)`, the logit being
`-beta (e_w - e_l)`.

Objectives with statistics over the batch (kto, sdpo, adaptive_dpo, adaptive_ipo, and any with a
safeguard) also take

* `reduce`: maps this process's sums, one short float32 vector whose last entry is its number of
  pairs, to those of all processes (`dist.all_reduce`, for one). The pass over the predictions and
  the finish are then two launches, with one call of `reduce` between them.

Nothing is read back to the host. Each raises `TypeError` on a wrong type or dtype and
`ValueError` on a wrong shape, device, option or `impl`, naming the rule and what it got.

    >>> policy, reference, target = torch.randn(4, 3), torch.randn(4, 3), torch.randn(2, 3)
    >>> out = dpo(policy.requires_grad_(), reference, target, beta=2500.0)
    >>> out.loss.backward()
"""

from fastpo.loss.adaptive import adaptive_dpo, adaptive_ipo
from fastpo.loss.preference import (
    dmpo,
    dpo,
    hinge,
    ipo,
    kto,
    linear_dpo,
    poly_dpo,
    robust_dpo,
    sdpo,
)
from fastpo.loss.reference_free import mapo, sft
from fastpo_kernels.pair_loss import (
    PairDraw,
    PairLoss,
    PairTarget,
    Reduce,
    Target,
    pair_errors,
)

__all__ = [
    "PairDraw",
    "PairLoss",
    "PairTarget",
    "Reduce",
    "Target",
    "adaptive_dpo",
    "adaptive_ipo",
    "dmpo",
    "dpo",
    "hinge",
    "ipo",
    "kto",
    "linear_dpo",
    "mapo",
    "pair_errors",
    "poly_dpo",
    "robust_dpo",
    "sdpo",
    "sft",
]
