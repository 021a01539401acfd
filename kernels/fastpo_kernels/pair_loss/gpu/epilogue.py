"""The last program's work: from the partial sums to loss, statistics and gradient coefficients.

Loads come before stores: a store might alias what a later load reads, and would hold it up.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# ruff: noqa: RUF005 (Triton compiles no starred tuples)
import triton
import triton.language as tl

from fastpo_kernels._shared.triton_math import at_least, at_most, exp, sigmoid


@triton.jit
def _column_sums(partials_ptr, n_pairs, n_chunks, BLOCK_P: tl.constexpr, BLOCK_B: tl.constexpr):
    """Sums over the chunks of one side of one stream, `[P, B]` to `[B]`, in a fixed order."""
    p = tl.arange(0, BLOCK_P)[:, None]
    b = tl.arange(0, BLOCK_B)[None, :]
    mask = (p < n_chunks) & (b < n_pairs)
    # Past L1: the other programs wrote these.
    tile = tl.load(partials_ptr + p * (2 * n_pairs) + b, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(tile, axis=0)


@triton.jit
def reduced_errors(
    sources,
    partials_ptr,
    n_pairs,
    n_chunks,
    n_elements,
    READY: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Mean squared errors `[B]` of winners and losers of every source, one tuple."""
    b = tl.arange(0, BLOCK_B)
    plane = 2 * n_pairs.to(tl.int64) * n_chunks
    n = tl.cast(n_elements, tl.float32)
    errors = ()
    for s in tl.static_range(len(sources)):
        if (READY >> s) & 1:
            errors = errors + ready_errors(sources[s], b, n_pairs)
        else:
            winner_ptr = partials_ptr + s * plane
            loser_ptr = winner_ptr + n_pairs
            e_w = tl.div_rn(_column_sums(winner_ptr, n_pairs, n_chunks, BLOCK_P, BLOCK_B), n)
            e_l = tl.div_rn(_column_sums(loser_ptr, n_pairs, n_chunks, BLOCK_P, BLOCK_B), n)
            errors = errors + (e_w, e_l)
    return errors


@triton.jit
def ready_errors(source_ptr, b, n_pairs):
    """Errors of winners and losers that are known already."""
    valid = b < n_pairs
    e_w = tl.load(source_ptr + b, mask=valid, other=0.0).to(tl.float32)
    e_l = tl.load(source_ptr + n_pairs + b, mask=valid, other=0.0).to(tl.float32)
    return e_w, e_l


@triton.jit
def residual_product(
    partials_ptr,
    n_sources,
    n_pairs,
    n_chunks,
    n_elements,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Sum over the pairs of `<pred_w - target, pred_l - target> / N`."""
    dot_ptr = partials_ptr + n_sources * 2 * n_pairs.to(tl.int64) * n_chunks
    dot = tl.sum(_column_sums(dot_ptr, n_pairs, n_chunks, BLOCK_P, BLOCK_B))
    return tl.div_rn(dot, tl.cast(n_elements, tl.float32))


@triton.jit
def _count(sums_ptr, n_pairs, N_SUMS: tl.constexpr):
    """Pairs that the statistics run over: the last of the sums, or the batch's."""
    count = tl.cast(n_pairs, tl.float32)
    if sums_ptr is not None:
        count = tl.load(sums_ptr + N_SUMS - 1).to(tl.float32)
    return count


@triton.jit
def _scaled_margin(
    d,
    m,
    rho,
    statistics_ptr,
    sums_ptr,
    n_pairs,
    NORMALIZE: tl.constexpr,
    N_SUMS: tl.constexpr,
):
    """`x = rho d / scale`; d is 0 outside the batch."""
    if NORMALIZE == "none":
        scale = 1.0
    elif statistics_ptr is not None:
        scale = tl.load(statistics_ptr + 1 + m).to(tl.float32)
    else:
        power = tl.sum(d * d)
        if sums_ptr is not None:
            power = tl.load(sums_ptr + 1 + m).to(tl.float32)
        count = _count(sums_ptr, n_pairs, N_SUMS)
        scale = tl.sqrt_rn(tl.div_rn(power, count) if NORMALIZE == "rms" else power)
    return rho * tl.div_rn(d, tl.where(scale > 0, scale, 1.0))


@triton.jit
def _minority_metric(
    margins,
    rho,
    statistics_ptr,
    sums_ptr,
    n_pairs,
    NORMALIZE: tl.constexpr,
    N_SUMS: tl.constexpr,
):
    """`u = mean_m sigmoid(-x_m) * min(std_m(x_m), 1)`; the first factor alone for one annotator."""
    xs = ()
    for m in tl.static_range(len(margins)):
        x = _scaled_margin(margins[m], m, rho, statistics_ptr, sums_ptr, n_pairs, NORMALIZE, N_SUMS)
        xs = xs + (x,)
    doubt = tl.zeros_like(margins[0])
    mean = tl.zeros_like(margins[0])
    for m in tl.static_range(len(margins)):
        doubt += sigmoid(-xs[m])
        mean += xs[m]
    doubt, mean = tl.div_rn(doubt, 1.0 * len(margins)), tl.div_rn(mean, 1.0 * len(margins))
    if len(margins) > 1:
        spread = tl.zeros_like(mean)
        for m in tl.static_range(len(margins)):
            spread += (xs[m] - mean) * (xs[m] - mean)
        doubt *= at_most(tl.sqrt_rn(tl.div_rn(spread, len(margins) - 1.0)), 1.0)
    return doubt


@triton.jit
def _pair_weight(u, scale, intercept, WEIGHT_KIND: tl.constexpr):
    """The weight of a pair with minority metric u."""
    if WEIGHT_KIND == "gate":
        weight = tl.where(u < 0.5, 1.0, 0.0)
    else:
        if WEIGHT_KIND == "linear":
            power = scale * u
        elif WEIGHT_KIND == "quadratic":
            power = scale * u * u
        elif WEIGHT_KIND == "sqrt":
            power = exp(scale * tl.sqrt_rn(u))
        else:
            power = exp(scale * u)
        weight = tl.div_rn(1.0, intercept + power)
    return weight


@triton.jit
def _mean(values, statistics_ptr, sums_ptr, n_pairs, N_SUMS: tl.constexpr):
    """Mean over the pairs: of the batch, the given one, or that of the given sum."""
    if statistics_ptr is not None:
        mean = tl.load(statistics_ptr).to(tl.float32)
    else:
        total = tl.sum(values)
        if sums_ptr is not None:
            total = tl.load(sums_ptr).to(tl.float32)
        mean = tl.div_rn(total, _count(sums_ptr, n_pairs, N_SUMS))
    return mean


@triton.jit
def _safeguard(e_w, dot, share):
    """`lambda = clamp((1 - mu) |gA|**2 / (gA . gB), 0, 1)` where the products agree, else 1.

    `e_w` is the batch's sum of the winners' errors, `dot` that of the residuals' products, `share`
    is `1 - mu`, whose digits float32 would lose. Of two infinite sums there is no ratio, and lambda
    is 1.
    """
    agree = dot > 0.0
    ratio = tl.div_rn(share * e_w, tl.where(agree, dot, 1.0))
    agree = agree & (ratio == ratio)
    return tl.where(agree, at_most(at_least(ratio, 0.0), 1.0), 1.0)


@triton.jit
def finish(
    errors,  # 2S vectors [B]: of winners and losers of policy, then reference and annotators
    dot,  # residual_product; 0 without a safeguard
    minority_ptr,  # [B] or None
    statistics_ptr,  # [1] or [1 + M] or None
    sums_ptr,  # [N_SUMS], the sums of all processes, or None
    pair_weight_ptr,  # [B] or None
    beta_ptr,  # [B] in place of option_a, or None
    loss_ptr,  # [], or [B] where PER_PAIR
    stats_ptr,  # [StatsLayout.size]
    n_pairs,
    option_a,
    option_b,
    option_c,
    rho,
    weight_scale,
    weight_intercept,
    shift_scale,
    margin_beta,
    share,
    sft_weight,
    OBJECTIVE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WEIGHT_KIND: tl.constexpr,
    MARGIN_KIND: tl.constexpr,
    BATCH_BASELINE: tl.constexpr,
    SAFEGUARD: tl.constexpr,
    SFT: tl.constexpr,
    PER_PAIR: tl.constexpr,
    N_SUMS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """`loss = mean weight * (objective + sft_weight * e_w)`, and `StatsLayout`'s vector.

    `margin [B] | errors [S, 2B] | minority [B] | weight [B] | coefficients [2B] | safeguard [1]`
    """
    b = tl.arange(0, BLOCK_B)
    valid = b < n_pairs
    e_w, e_l = errors[0], errors[1]
    r_w, r_l = tl.zeros_like(e_w), tl.zeros_like(e_l)
    if HAS_REFERENCE:
        r_w, r_l = errors[2], errors[3]
    d = (r_w - e_w) - (r_l - e_l)
    weight = tl.where(valid, 1.0, 0.0)
    if beta_ptr is not None:
        option_a = tl.load(beta_ptr + b, mask=valid, other=1.0).to(tl.float32)
        margin_beta = option_a
    shift = 0.0
    u = tl.zeros_like(e_w)
    if NORMALIZE is not None:
        if minority_ptr is not None:
            u = tl.load(minority_ptr + b, mask=valid, other=0.0).to(tl.float32)
        else:
            margins = (d,)
            for s in tl.static_range(1 + HAS_REFERENCE, len(errors) // 2):
                margins = margins + ((r_w - errors[2 * s]) - (r_l - errors[2 * s + 1]),)
            u = _minority_metric(margins, rho, statistics_ptr, sums_ptr, n_pairs, NORMALIZE, N_SUMS)
        weight *= _pair_weight(u, weight_scale, weight_intercept, WEIGHT_KIND)
        mean = _mean(d, statistics_ptr, sums_ptr, n_pairs, N_SUMS)
        power = u * u if MARGIN_KIND == "quadratic" else u
        shift = shift_scale * (mean - tl.div_rn(power, margin_beta))
    elif BATCH_BASELINE:
        gain = 0.5 * ((r_w - e_w) + (r_l - e_l))
        shift = _mean(gain, statistics_ptr, sums_ptr, n_pairs, N_SUMS)
        if statistics_ptr is None:
            shift = at_least(shift, 0.0)
    if pair_weight_ptr is not None:
        weight *= tl.load(pair_weight_ptr + b, mask=valid, other=0.0).to(tl.float32)
    loss, slope_w, slope_l = OBJECTIVE(d, e_w, e_l, r_w, r_l, shift, option_a, option_b, option_c)
    factor = 1.0
    if SAFEGUARD:
        power = tl.sum(e_w)
        if sums_ptr is not None:
            power, dot = tl.load(sums_ptr + N_SUMS - 3), tl.load(sums_ptr + N_SUMS - 2)
        factor = _safeguard(power, dot, share)
        slope_l *= factor
    if SFT:
        loss += sft_weight * e_w
        slope_w += sft_weight
    count = tl.cast(n_pairs, tl.float32)
    if PER_PAIR:
        count = tl.cast(1.0, tl.float32)
        tl.store(loss_ptr + b, weight * loss, mask=valid)
    else:
        total = tl.div_rn(tl.sum(tl.where(valid, weight * loss, 0.0)), count)
        tl.store(loss_ptr, total)
    tl.store(stats_ptr + b, d, mask=valid)
    errors_ptr = stats_ptr + n_pairs
    for row in tl.static_range(len(errors)):
        tl.store(errors_ptr + row * n_pairs + b, errors[row], mask=valid)
    tail_ptr = errors_ptr + len(errors) * n_pairs
    tl.store(tail_ptr + b, u, mask=valid)
    tl.store(tail_ptr + n_pairs + b, weight, mask=valid)
    tl.store(tail_ptr + 2 * n_pairs + b, tl.div_rn(weight * slope_w, count), mask=valid)
    tl.store(tail_ptr + 3 * n_pairs + b, tl.div_rn(weight * slope_l, count), mask=valid)
    if SAFEGUARD:
        tl.store(tail_ptr + 4 * n_pairs, factor)


@triton.jit
def partial_results(
    errors,  # as in `finish`
    dot,
    results_ptr,  # [PartialsLayout.size]
    n_pairs,
    HAS_REFERENCE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    BATCH_BASELINE: tl.constexpr,
    SAFEGUARD: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """`PartialsLayout`'s vector `errors [S, 2B] | sums`, these as in `LossSpec.n_sums`."""
    b = tl.arange(0, BLOCK_B)
    valid = b < n_pairs
    e_w, e_l = errors[0], errors[1]
    r_w, r_l = tl.zeros_like(e_w), tl.zeros_like(e_l)
    if HAS_REFERENCE:
        r_w, r_l = errors[2], errors[3]
    d = (r_w - e_w) - (r_l - e_l)
    for row in tl.static_range(len(errors)):
        tl.store(results_ptr + row * n_pairs + b, errors[row], mask=valid)
    sums_ptr = results_ptr + len(errors) * n_pairs
    if ADAPTIVE:
        tl.store(sums_ptr, tl.sum(d))
        tl.store(sums_ptr + 1, tl.sum(d * d))
        sums_ptr += 2
        for s in tl.static_range(1 + HAS_REFERENCE, len(errors) // 2):
            own = (r_w - errors[2 * s]) - (r_l - errors[2 * s + 1])
            tl.store(sums_ptr, tl.sum(own * own))
            sums_ptr += 1
    elif BATCH_BASELINE:
        tl.store(sums_ptr, 0.5 * tl.sum((r_w - e_w) + (r_l - e_l)))
        sums_ptr += 1
    if SAFEGUARD:
        tl.store(sums_ptr, tl.sum(e_w))
        tl.store(sums_ptr + 1, dot)
        sums_ptr += 2
    if ADAPTIVE or BATCH_BASELINE or SAFEGUARD:
        tl.store(sums_ptr, tl.cast(n_pairs, tl.float32))
