#include "finish.h"

#include <algorithm>
#include <vector>

namespace fastpo {
namespace {

// A batch's errors and margins by source.
struct Margins {
  const Batch& batch;
  bool has_reference;

  double error(int64_t source, int side, int64_t pair) const {
    return batch.errors[(2 * source + side) * batch.n_pairs + pair];
  }
  double reference(int side, int64_t pair) const {
    return has_reference ? error(1, side, pair) : 0.0;
  }
  // The policy's first, then the annotators'.
  int64_t count() const { return batch.n_sources - int64_t(has_reference); }
  double margin(int64_t m, int64_t pair) const {
    const int64_t source = m == 0 ? 0 : m + int64_t(has_reference);
    return (reference(0, pair) - error(source, 0, pair)) -
           (reference(1, pair) - error(source, 1, pair));
  }
  double gain(int64_t pair) const {
    return 0.5 * ((reference(0, pair) - error(0, 0, pair)) +
                     (reference(1, pair) - error(0, 1, pair)));
  }
  template <typename Value>
  double sum(Value value) const {
    double total = 0;
    for (int64_t pair = 0; pair < batch.n_pairs; ++pair) total += value(pair);
    return total;
  }
  double dots() const {
    return sum([&](int64_t pair) { return batch.dots == nullptr ? 0.0 : batch.dots[pair]; });
  }
};

int64_t n_sums_of(const Margins& margins, const Spec& spec) {
  const bool adaptive = spec.normalize != Normalize::absent;
  const int64_t own = adaptive ? 1 + margins.count() : int64_t(spec.baseline);
  return own + (spec.safeguard ? 2 : 0) + 1;
}

// Pairs that the statistics run over.
double count_of(const Margins& margins, const Spec& spec, const Given& given) {
  if (given.sums == nullptr) return double(margins.batch.n_pairs);
  return given.sums[n_sums_of(margins, spec) - 1];
}

double scale_of(const Margins& margins, int64_t m, const Spec& spec, const Given& given) {
  if (spec.normalize == Normalize::none) return 1;
  if (given.statistics != nullptr) return given.statistics[1 + m];
  double power = given.sums != nullptr ? double(given.sums[1 + m]) : margins.sum([&](int64_t i) {
    const double d = margins.margin(m, i);
    return d * d;
  });
  if (spec.normalize == Normalize::rms) power /= count_of(margins, spec, given);
  return std::sqrt(power);
}

// `u = mean_m sigmoid(-x_m) min(std_m(x_m), 1)`, the first factor alone for one annotator.
std::vector<double> minority_metric(const Margins& margins, const Spec& spec, const Given& given) {
  const int64_t n = margins.batch.n_pairs, count = margins.count();
  std::vector<double> u(n, 0.0), mean(n, 0.0), spread(n, 0.0), xs(n * count);
  for (int64_t m = 0; m < count; ++m) {
    const double scale = scale_of(margins, m, spec, given);
    for (int64_t i = 0; i < n; ++i) {
      const double x = spec.rho * (margins.margin(m, i) / (scale > 0 ? scale : 1));
      xs[m * n + i] = x;
      u[i] += sigmoid(-x) / double(count);
      mean[i] += x / double(count);
    }
  }
  if (count == 1) return u;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t m = 0; m < count; ++m) spread[i] += std::pow(xs[m * n + i] - mean[i], 2);
    u[i] *= at_most(std::sqrt(spread[i] / double(count - 1)), 1);
  }
  return u;
}

double weight_of(double u, const Spec& spec) {
  double power;
  switch (spec.weigh) {
    case Weigh::gate: return u < 0.5 ? 1 : 0;
    case Weigh::linear: power = spec.weight_scale * u; break;
    case Weigh::quadratic: power = spec.weight_scale * u * u; break;
    case Weigh::sqrt: power = std::exp(spec.weight_scale * std::sqrt(u)); break;
    default: power = std::exp(spec.weight_scale * u);
  }
  return 1 / (spec.weight_intercept + power);
}

template <typename Value>
double mean_of(const Margins& margins, const Spec& spec, const Given& given, Value value) {
  if (given.statistics != nullptr) return given.statistics[0];
  const double total = given.sums != nullptr ? double(given.sums[0]) : margins.sum(value);
  return total / count_of(margins, spec, given);
}

// Diffusion-SDPO's lambda; of two infinite sums there is no ratio, and it is 1.
double safeguard_of(const Margins& margins, const Spec& spec, const Given& given) {
  if (!spec.safeguard) return 1;
  double power, dot;
  if (given.sums != nullptr) {
    const float* last = given.sums + n_sums_of(margins, spec);
    power = last[-3], dot = last[-2];
  } else {
    power = margins.sum([&](int64_t i) { return margins.error(0, 0, i); });
    dot = margins.dots();
  }
  const double ratio = dot > 0 ? spec.share * power / dot : 1;
  return ratio != ratio ? 1 : at_most(at_least(ratio, 0), 1);
}

}  // namespace

void finish(const Batch& batch, const Spec& spec, const Given& given, const Results& results) {
  const Margins margins{batch, spec.has_reference};
  const int64_t n = batch.n_pairs;
  const bool adaptive = spec.normalize != Normalize::absent;
  float* minority = results.rest + 2 * (batch.n_sources - 1) * n;
  float *weights = minority + n, *slopes = weights + n;
  std::copy(batch.errors, batch.errors + 2 * n, results.errors);
  std::copy(batch.errors + 2 * n, batch.errors + 2 * batch.n_sources * n, results.rest);
  std::vector<double> u(n, 0.0);
  double mean = 0;
  if (adaptive) {
    if (given.minority != nullptr) {
      std::copy(given.minority, given.minority + n, u.begin());
    } else {
      u = minority_metric(margins, spec, given);
    }
    mean = mean_of(margins, spec, given, [&](int64_t i) { return margins.margin(0, i); });
  } else if (spec.baseline) {
    mean = mean_of(margins, spec, given, [&](int64_t i) { return margins.gain(i); });
    if (given.statistics == nullptr) mean = at_least(mean, 0);
  }
  const double factor = safeguard_of(margins, spec, given), count = spec.per_pair ? 1 : double(n);
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    Options options = spec.options;
    double margin_beta = spec.margin_beta, weight = 1, shift = mean;
    if (given.beta != nullptr) options.a = margin_beta = given.beta[i];
    if (adaptive) {
      weight = weight_of(u[i], spec);
      const double power = spec.quadratic_margin ? u[i] * u[i] : u[i];
      shift = spec.shift_scale * (mean - power / margin_beta);
    }
    if (given.pair_weight != nullptr) weight *= given.pair_weight[i];
    const Pair pair{margins.margin(0, i), margins.error(0, 0, i), margins.error(0, 1, i),
        margins.reference(0, i), margins.reference(1, i), shift};
    Slopes found = slopes_of(spec.objective, pair, options);
    found.by_loser *= factor;
    if (spec.sft_weight != 0) {
      found.loss += spec.sft_weight * pair.e_w;
      found.by_winner += spec.sft_weight;
    }
    total += weight * found.loss;
    if (spec.per_pair) results.loss[i] = float(weight * found.loss);
    results.margin[i] = float(pair.d);
    minority[i] = float(u[i]);
    weights[i] = float(weight);
    slopes[i] = float(weight * found.by_winner / count);
    slopes[n + i] = float(weight * found.by_loser / count);
  }
  if (!spec.per_pair) *results.loss = float(total / count);
  if (spec.safeguard) slopes[2 * n] = float(factor);
}

void partial_results(const Batch& batch, const Spec& spec, float* results) {
  const Margins margins{batch, spec.has_reference};
  const int64_t size = 2 * batch.n_sources * batch.n_pairs;
  std::copy(batch.errors, batch.errors + size, results);
  float* sums = results + size;
  if (spec.normalize != Normalize::absent) {
    *sums++ = float(margins.sum([&](int64_t i) { return margins.margin(0, i); }));
    for (int64_t m = 0; m < margins.count(); ++m) {
      *sums++ = float(margins.sum([&](int64_t i) { return std::pow(margins.margin(m, i), 2); }));
    }
  } else if (spec.baseline) {
    *sums++ = float(margins.sum([&](int64_t i) { return margins.gain(i); }));
  }
  if (spec.safeguard) {
    *sums++ = float(margins.sum([&](int64_t i) { return margins.error(0, 0, i); }));
    *sums++ = float(margins.dots());
  }
  const bool any = spec.normalize != Normalize::absent || spec.baseline || spec.safeguard;
  if (any) *sums = float(batch.n_pairs);
}

}  // namespace fastpo
