// What follows the reduction: from errors to loss, statistics and the errors' coefficients.
#pragma once

#include <cstdint>

#include "objectives.h"

namespace fastpo {

enum class Normalize : int64_t { absent = -1, none = 0, rms = 1, l2 = 2 };
enum class Weigh : int64_t { linear, quadratic, sqrt, exponential, gate };

// The fields of `LossSpec`, and those of `Adaptive` if `normalize` is not absent.
struct Spec {
  Objective objective;
  bool has_reference;
  Normalize normalize;
  Weigh weigh;
  bool quadratic_margin, baseline, safeguard, per_pair;
  Options options;
  double rho, weight_scale, weight_intercept, shift_scale, margin_beta, share, sft_weight;
};

// Vectors of float32, or null. `sums` are those of all processes, as `LossSpec.n_sums` has them.
struct Given {
  const float *minority, *statistics, *sums, *pair_weight, *beta;
};

struct Batch {
  int64_t n_pairs, n_sources;
  const float* errors;  // [S, 2, B]
  const double* dots;   // [B], or null
};

// Where results go, float32: the loss `[]` or, per pair, `[B]`; margins `[B]`; the policy's errors
// `[2, B]`; and `NativeLayout`'s vector. Without a loss, `rest` is `PartialsLayout`'s vector.
struct Results {
  float *loss, *margin, *errors, *rest;
};

void finish(const Batch& batch, const Spec& spec, const Given& given, const Results& results);
void partial_results(const Batch& batch, const Spec& spec, float* results);

}  // namespace fastpo
