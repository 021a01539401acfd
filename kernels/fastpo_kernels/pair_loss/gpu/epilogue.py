"""The last program's work: from the partial sums to loss, statistics and gradient coefficients."""

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
def source_errors(
    source_ptr,
    partials_ptr,
    errors_ptr,
    b,
    valid,
    n_pairs,
    n_chunks,
    n_elements,
    IS_READY: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Mean squared errors of winners and losers of one stream, also written to `errors_ptr`."""
    if IS_READY:
        e_w = tl.load(source_ptr + b, mask=valid, other=0.0).to(tl.float32)
        e_l = tl.load(source_ptr + n_pairs + b, mask=valid, other=0.0).to(tl.float32)
    else:
        n = tl.cast(n_elements, tl.float32)
        e_w = tl.div_rn(_column_sums(partials_ptr, n_pairs, n_chunks, BLOCK_P, BLOCK_B), n)
        loser_ptr = partials_ptr + n_pairs
        e_l = tl.div_rn(_column_sums(loser_ptr, n_pairs, n_chunks, BLOCK_P, BLOCK_B), n)
    tl.store(errors_ptr + b, e_w, mask=valid)
    tl.store(errors_ptr + n_pairs + b, e_l, mask=valid)
    return e_w, e_l


@triton.jit
def _count(statistics_ptr, n_pairs, N_SUMS: tl.constexpr):
    """Pairs that the statistics run over: the last of the sums, or the batch's."""
    count = tl.cast(n_pairs, tl.float32)
    if N_SUMS:
        count = tl.load(statistics_ptr + N_SUMS - 1).to(tl.float32)
    return count


@triton.jit
def _scaled_margin(
    d, m, rho, statistics_ptr, n_pairs, NORMALIZE: tl.constexpr, N_SUMS: tl.constexpr
):
    """`x = rho d / scale`; d is 0 outside the batch."""
    if statistics_ptr is not None and N_SUMS == 0:
        scale = tl.load(statistics_ptr + 1 + m).to(tl.float32)
    else:
        power = tl.sum(d * d)
        if N_SUMS:
            power = tl.load(statistics_ptr + 1 + m).to(tl.float32)
        count = _count(statistics_ptr, n_pairs, N_SUMS)
        scale = tl.sqrt_rn(tl.div_rn(power, count) if NORMALIZE == "rms" else power)
    return rho * tl.div_rn(d, tl.where(scale > 0, scale, 1.0))


@triton.jit
def _minority_metric(
    margins, rho, statistics_ptr, n_pairs, NORMALIZE: tl.constexpr, N_SUMS: tl.constexpr
):
    """`u = mean_m sigmoid(-x_m) * min(std_m(x_m), 1)`; the first factor alone for one annotator."""
    xs = ()
    for m in tl.static_range(len(margins)):
        x = _scaled_margin(margins[m], m, rho, statistics_ptr, n_pairs, NORMALIZE, N_SUMS)
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
def _mean(values, statistics_ptr, n_pairs, N_SUMS: tl.constexpr):
    """Mean over the pairs, the given one, or that of the given sum."""
    if statistics_ptr is None:
        mean = tl.div_rn(tl.sum(values), tl.cast(n_pairs, tl.float32))
    else:
        mean = tl.load(statistics_ptr).to(tl.float32)
        if N_SUMS:
            mean = tl.div_rn(mean, _count(statistics_ptr, n_pairs, N_SUMS))
    return mean


@triton.jit
def _margin_shift(
    d, u, statistics_ptr, n_pairs, adaptive_scalars, MARGIN_KIND: tl.constexpr, N_SUMS: tl.constexpr
):
    """`shift_scale * (mean(d) - u**k / beta)`."""
    mean = _mean(d, statistics_ptr, n_pairs, N_SUMS)
    power = u * u if MARGIN_KIND == "quadratic" else u
    return adaptive_scalars[3] * (mean - tl.div_rn(power, adaptive_scalars[4]))


@triton.jit
def _safeguard(e_w, dot, mu):
    """`lambda = clamp((1 - mu) |gA|**2 / (gA . gB), 0, 1)` where the products agree, else 1.

    `e_w` is the batch's sum of the winners' errors, `dot` that of the residuals' products. Of two
    infinite sums there is no ratio, and lambda is 1.
    """
    agree = dot > 0.0
    ratio = tl.div_rn((1.0 - mu) * e_w, tl.where(agree, dot, 1.0))
    agree = agree & (ratio == ratio)
    return tl.where(agree, at_most(at_least(ratio, 0.0), 1.0), 1.0)


@triton.jit
def finish(
    sources,
    minority_ptr,
    statistics_ptr,
    pair_weight_ptr,
    partials_ptr,
    loss_ptr,
    stats_ptr,
    n_pairs,
    n_chunks,
    n_elements,
    scalars,
    adaptive_scalars,
    mu,
    READY: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WEIGHT_KIND: tl.constexpr,
    MARGIN_KIND: tl.constexpr,
    BATCH_BASELINE: tl.constexpr,
    SAFEGUARD: tl.constexpr,
    N_SUMS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """From the partials to the loss and `stats` (whose layout is in `ops.py`)."""
    b = tl.arange(0, BLOCK_B)
    valid = b < n_pairs
    plane = 2 * n_pairs.to(tl.int64) * n_chunks
    errors_ptr = stats_ptr + n_pairs
    e_w, e_l = source_errors(
        sources[0], partials_ptr, errors_ptr, b, valid, n_pairs, n_chunks, n_elements,
        READY & 1, BLOCK_P, BLOCK_B,
    )  # fmt: skip
    r_w, r_l = tl.zeros_like(e_w), tl.zeros_like(e_l)
    if HAS_REFERENCE:
        r_w, r_l = source_errors(
            sources[1], partials_ptr + plane, errors_ptr + 2 * n_pairs, b, valid, n_pairs,
            n_chunks, n_elements, (READY >> 1) & 1, BLOCK_P, BLOCK_B,
        )  # fmt: skip
    d = (r_w - e_w) - (r_l - e_l)
    tl.store(stats_ptr + b, d, mask=valid)
    tail_ptr = errors_ptr + len(sources) * 2 * n_pairs
    weight = tl.where(valid, 1.0, 0.0)
    shift = 0.0
    u = tl.zeros_like(e_w)
    if NORMALIZE is not None:
        if minority_ptr is not None:
            u = tl.load(minority_ptr + b, mask=valid, other=0.0).to(tl.float32)
        else:
            margins = (d,)
            for s in tl.static_range(2, len(sources)):
                a_w, a_l = source_errors(
                    sources[s], partials_ptr + s * plane, errors_ptr + s * 2 * n_pairs, b, valid,
                    n_pairs, n_chunks, n_elements, (READY >> s) & 1, BLOCK_P, BLOCK_B,
                )  # fmt: skip
                margins = margins + ((r_w - a_w) - (r_l - a_l),)
            u = _minority_metric(
                margins, adaptive_scalars[0], statistics_ptr, n_pairs, NORMALIZE, N_SUMS
            )
        weight *= _pair_weight(u, adaptive_scalars[1], adaptive_scalars[2], WEIGHT_KIND)
        shift = _margin_shift(d, u, statistics_ptr, n_pairs, adaptive_scalars, MARGIN_KIND, N_SUMS)
    elif BATCH_BASELINE:
        gain = 0.5 * ((r_w - e_w) + (r_l - e_l))
        shift = at_least(_mean(gain, statistics_ptr, n_pairs, N_SUMS), 0.0)
    if pair_weight_ptr is not None:
        weight *= tl.load(pair_weight_ptr + b, mask=valid, other=0.0).to(tl.float32)
    tl.store(tail_ptr + b, u, mask=valid)
    tl.store(tail_ptr + n_pairs + b, weight, mask=valid)
    loss, slope_w, slope_l = OBJECTIVE(
        d, e_w, e_l, r_w, r_l, shift, scalars[0], scalars[1], scalars[2]
    )
    if SAFEGUARD:
        if N_SUMS:
            agreement_ptr = statistics_ptr + N_SUMS - 3
            slope_l *= _safeguard(tl.load(agreement_ptr), tl.load(agreement_ptr + 1), mu)
        else:
            dot_ptr = partials_ptr + len(sources) * plane
            dot = tl.sum(_column_sums(dot_ptr, n_pairs, n_chunks, BLOCK_P, BLOCK_B))
            dot = tl.div_rn(dot, tl.cast(n_elements, tl.float32))
            slope_l *= _safeguard(tl.sum(e_w), dot, mu)
    count = tl.cast(n_pairs, tl.float32)
    tl.store(loss_ptr, tl.div_rn(tl.sum(tl.where(valid, weight * loss, 0.0)), count))
    tl.store(tail_ptr + 2 * n_pairs + b, tl.div_rn(weight * slope_w, count), mask=valid)
    tl.store(tail_ptr + 3 * n_pairs + b, tl.div_rn(weight * slope_l, count), mask=valid)


@triton.jit
def partial_results(
    sources,
    partials_ptr,
    results_ptr,
    n_pairs,
    n_chunks,
    n_elements,
    READY: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BATCH_BASELINE: tl.constexpr,
    SAFEGUARD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Errors of every stream `[S, 2B]`, then the batch's sums, in the layout of `ops.py`."""
    b = tl.arange(0, BLOCK_B)
    valid = b < n_pairs
    plane = 2 * n_pairs.to(tl.int64) * n_chunks
    sums_ptr = results_ptr + len(sources) * 2 * n_pairs
    r_w, r_l = tl.zeros((BLOCK_B,), tl.float32), tl.zeros((BLOCK_B,), tl.float32)
    if HAS_REFERENCE:
        r_w, r_l = source_errors(
            sources[1], partials_ptr + plane, results_ptr + 2 * n_pairs, b, valid, n_pairs,
            n_chunks, n_elements, (READY >> 1) & 1, BLOCK_P, BLOCK_B,
        )  # fmt: skip
    e_w = r_w
    for s in tl.static_range(len(sources)):
        if s == 0 or s > HAS_REFERENCE:
            a_w, a_l = source_errors(
                sources[s], partials_ptr + s * plane, results_ptr + s * 2 * n_pairs, b, valid,
                n_pairs, n_chunks, n_elements, (READY >> s) & 1, BLOCK_P, BLOCK_B,
            )  # fmt: skip
            if s == 0:
                e_w = a_w
            if s == 0 and BATCH_BASELINE and NORMALIZE is None:
                tl.store(sums_ptr, 0.5 * tl.sum((r_w - a_w) + (r_l - a_l)))
                sums_ptr += 1
            if NORMALIZE is not None:
                d = (r_w - a_w) - (r_l - a_l)
                if s == 0:
                    tl.store(sums_ptr, tl.sum(d))
                    sums_ptr += 1
                tl.store(sums_ptr, tl.sum(d * d))
                sums_ptr += 1
    if SAFEGUARD:
        dot_ptr = partials_ptr + len(sources) * plane
        dot = tl.sum(_column_sums(dot_ptr, n_pairs, n_chunks, BLOCK_P, BLOCK_B))
        dot = tl.div_rn(dot, tl.cast(n_elements, tl.float32))
        tl.store(sums_ptr, tl.sum(e_w))
        tl.store(sums_ptr + 1, dot)
        sums_ptr += 2
    if BATCH_BASELINE or NORMALIZE is not None or SAFEGUARD:
        tl.store(sums_ptr, tl.cast(n_pairs, tl.float32))
