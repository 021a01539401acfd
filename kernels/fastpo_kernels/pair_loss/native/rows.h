// The passes over predictions: mean squared errors of every row, and their gradient.
#pragma once

#include <cstdint>
#include <vector>

namespace fastpo {

constexpr int kMaxDims = 8;

enum class Kind : int64_t { none = -1, f32 = 0, bf16 = 1, f16 = 2, ready = 3 };

// Winners' and losers' rows of B pairs, in elements of `kind`: two float32 rows [B] if `ready`.
struct Rows {
  Kind kind = Kind::none;
  char* side[2] = {nullptr, nullptr};
  int64_t row = 0;  // elements from one pair to the next
  int64_t inner[kMaxDims] = {};
};

// Of B pairs' samples; the dimensions are as few as describe all tensors.
struct Shape {
  int64_t n_pairs = 0;
  int64_t n_elements = 0;
  int n_dims = 0;
  int64_t sizes[kMaxDims] = {};
};

// Runs `work(context, first, end)` over parts of [0, n), on torch's threads.
using Work = void (*)(int64_t, int64_t, void*);
using ParallelFor = int32_t (*)(int64_t, int64_t, int64_t, Work, void*);
void set_parallel_for(ParallelFor function);

// Mean squared errors of sources that are not ready, each [2, B], into theirs of `errors`
// [S, 2, B]; and, if `dots` is not null, the mean product of the first source's residuals, [B].
void row_errors(const Shape& shape, const std::vector<Rows>& sources, const Rows& target,
    const Rows& mask, float* errors, double* dots);

// `scale 2/N coefficients (policy - target)`, times the mask; coefficients are [2, B].
void row_gradients(const Shape& shape, const Rows& policy, const Rows& target, const Rows& mask,
    const Rows& gradient, const float* coefficients, float scale);

}  // namespace fastpo
