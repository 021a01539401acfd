#include "rows.h"

#include <algorithm>
#include <memory>

#include "vectors.h"

namespace fastpo {
namespace {

// Elements of a sample whose sums are one number: it does not depend on the number of threads, so
// neither do the bits of a sum.
constexpr int64_t kBlock = 16384;
// Predictions whose rows are read in turns: more at the same distance would crowd one another out of
// the same lines of a cache.
constexpr size_t kTogether = 2;
constexpr int64_t kGrain = 1 << 17;  // elements that are worth a thread

ParallelFor parallel = nullptr;

struct alignas(64) Buffer {
  float values[kPiece];
};

// Of targets, masks and predictions of both sides: memory that a thread keeps; fresh pages cost
// as much as the arithmetic on them.
Buffer* scratch() {
  static thread_local std::unique_ptr<Buffer[]> kept(new Buffer[6]);
  return kept.get();
}

size_t width_of(Kind kind) { return kind == Kind::f32 ? 4 : 2; }

void widen(Kind kind, const char* from, float* to, int64_t n) {
  if (kind == Kind::f32) {
    std::memcpy(to, from, n * sizeof(float));
  } else if (kind == Kind::bf16) {
    widen_bf16(reinterpret_cast<const uint16_t*>(from), to, n);
  } else {
    widen_f16(reinterpret_cast<const uint16_t*>(from), to, n);
  }
}

void narrow(Kind kind, const float* from, char* to, int64_t n) {
  if (kind == Kind::f32) {
    if (static_cast<const void*>(from) != to) std::memcpy(to, from, n * sizeof(float));
  } else if (kind == Kind::bf16) {
    narrow_bf16(from, reinterpret_cast<uint16_t*>(to), n);
  } else {
    narrow_f16(from, reinterpret_cast<uint16_t*>(to), n);
  }
}

float widen_one(Kind kind, const char* from) {
  float value;
  widen(kind, from, &value, 1);
  return value;
}

bool is_dense(const Shape& shape, const Rows& rows) {
  return shape.n_dims == 1 && rows.inner[0] == 1;
}

// Calls `visit(address, position, count)` for runs of the elements [first, first + count) of a row
// along the last dimension, `position` counting from 0.
template <typename Visit>
void over_runs(const Shape& shape, const Rows& rows, char* row, int64_t first, int64_t count,
    Visit visit) {
  const int last = shape.n_dims - 1;
  const size_t width = width_of(rows.kind);
  for (int64_t done = 0; done < count;) {
    int64_t rest = first + done, offset = 0;
    const int64_t column = rest % shape.sizes[last];
    rest /= shape.sizes[last];
    for (int k = last - 1; k >= 0; --k) {
      offset += rest % shape.sizes[k] * rows.inner[k];
      rest /= shape.sizes[k];
    }
    offset += column * rows.inner[last];
    const int64_t run = std::min(count - done, shape.sizes[last] - column);
    visit(row + offset * int64_t(width), done, run);
    done += run;
  }
}

char* row_of(const Rows& rows, int side, int64_t pair) {
  return rows.side[side] + pair * rows.row * int64_t(width_of(rows.kind));
}

// Elements [first, first + n) of a row in float32: where they lie, or converted into the buffer.
const float* fetch(const Shape& shape, const Rows& rows, int side, int64_t pair, int64_t first,
    int64_t n, Buffer& buffer) {
  char* row = row_of(rows, side, pair);
  const size_t width = width_of(rows.kind);
  float* to = buffer.values;
  if (is_dense(shape, rows)) {
    const char* from = row + first * int64_t(width);
    if (rows.kind == Kind::f32) return reinterpret_cast<const float*>(from);
    widen(rows.kind, from, to, n);
    return to;
  }
  const int64_t step = rows.inner[shape.n_dims - 1] * int64_t(width);
  over_runs(shape, rows, row, first, n, [&](const char* from, int64_t at, int64_t run) {
    if (step == int64_t(width)) {
      widen(rows.kind, from, to + at, run);
    } else {
      for (int64_t i = 0; i < run; ++i) to[at + i] = widen_one(rows.kind, from + i * step);
    }
  });
  return to;
}

// Puts float32 elements where they belong in a row, in its kind.
void put(const Shape& shape, const Rows& rows, int side, int64_t pair, int64_t first, int64_t n,
    const float* values) {
  char* row = row_of(rows, side, pair);
  const size_t width = width_of(rows.kind);
  if (is_dense(shape, rows)) {
    narrow(rows.kind, values, row + first * int64_t(width), n);
    return;
  }
  const int64_t step = rows.inner[shape.n_dims - 1] * int64_t(width);
  over_runs(shape, rows, row, first, n, [&](char* to, int64_t at, int64_t run) {
    if (step == int64_t(width)) {
      narrow(rows.kind, values + at, to, run);
    } else {
      for (int64_t i = 0; i < run; ++i) narrow(rows.kind, values + at + i, to + i * step, 1);
    }
  });
}

// One piece of the tensors that sources share: target and mask of both sides.
struct Shared {
  const float* target[2];
  const float* mask[2] = {nullptr, nullptr};

  Shared(const Shape& shape, const Rows& targets, const Rows& masks, int64_t pair, int64_t first,
      int64_t n) {
    Buffer* buffers = scratch();
    read(shape, targets, pair, first, n, target, buffers);
    if (masks.kind != Kind::none) read(shape, masks, pair, first, n, mask, buffers + 2);
  }

  static void read(const Shape& shape, const Rows& rows, int64_t pair, int64_t first, int64_t n,
      const float** into, Buffer* buffers) {
    into[0] = fetch(shape, rows, 0, pair, first, n, buffers[0]);
    const bool same = rows.side[0] == rows.side[1];
    into[1] = same ? into[0] : fetch(shape, rows, 1, pair, first, n, buffers[1]);
  }
};

void run(int64_t n_units, int64_t elements_of_unit, Work work, void* context) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_of_unit));
  if (parallel == nullptr || n_units <= grain || parallel(0, n_units, grain, work, context) != 0) {
    work(0, n_units, context);
  }
}

struct Reduction {
  const Shape& shape;
  const std::vector<Rows>& sources;
  const Rows &target, &mask;
  bool with_dots;
  int64_t n_blocks, n_sums;
  std::vector<double> sums;  // [pairs, blocks, sums]: of each source both sides, then the product

  // Of one side of a piece: half-precision numbers that lie in a row are widened in registers.
  double square(const Rows& rows, const Shared& shared, int side, int64_t pair, int64_t first,
      int64_t n, Buffer& buffer) const {
    const float *t = shared.target[side], *m = shared.mask[side];
    if (rows.kind != Kind::f32 && is_dense(shape, rows)) {
      const uint16_t* x = reinterpret_cast<const uint16_t*>(row_of(rows, side, pair)) + first;
      return rows.kind == Kind::bf16 ? squares_bf16(x, t, m, n) : squares_f16(x, t, m, n);
    }
    return squares(fetch(shape, rows, side, pair, first, n, buffer), t, m, n);
  }

  // One block of one pair.
  void block(int64_t unit) {
    const int64_t pair = unit / n_blocks, start = unit % n_blocks * kBlock;
    const int64_t end = std::min(start + kBlock, shape.n_elements);
    double* into = sums.data() + unit * n_sums;
    Buffer* buffers = scratch() + 4;
    for (size_t s = 0; s < sources.size(); s += kTogether) {
      const size_t last = std::min(s + kTogether, sources.size());
      for (int64_t first = start; first < end; first += kPiece) {
        some(into, s, last, pair, first, std::min<int64_t>(kPiece, end - first), buffers);
      }
    }
  }

  // Of a piece the errors of some sources, and with the first of them the product.
  void some(double* into, size_t s, size_t last, int64_t pair, int64_t first, int64_t n,
      Buffer* buffers) const {
    const bool dots = with_dots && s == 0;
    const Shared shared(shape, target, mask, pair, first, n);
    for (; s < last; ++s) {
      if (sources[s].kind == Kind::ready) continue;
      for (int side = 0; side < 2; ++side) {
        into[2 * s + side] += square(sources[s], shared, side, pair, first, n, buffers[side]);
      }
    }
    if (!dots) return;
    const float* x[2];
    for (int side = 0; side < 2; ++side) {
      x[side] = fetch(shape, sources[0], side, pair, first, n, buffers[side]);
    }
    into[n_sums - 1] += products(x[0], shared.target[0], x[1], shared.target[1], n);
  }
};

struct Gradient {
  const Shape& shape;
  const Rows &policy, &target, &mask, &gradient;
  const float* slopes;
  float scale;
  int64_t n_blocks;

  // Half-precision rows, in registers.
  void of_halves(int side, int64_t pair, int64_t first, int64_t n, const float* t,
      float slope) const {
    const auto* x = reinterpret_cast<const uint16_t*>(row_of(policy, side, pair)) + first;
    auto* to = reinterpret_cast<uint16_t*>(row_of(gradient, side, pair)) + first;
    if (policy.kind == Kind::bf16) {
      residuals_bf16(x, t, slope, to, n);
    } else {
      residuals_f16(x, t, slope, to, n);
    }
  }

  void block(int64_t unit) const {
    const int64_t pair = unit / n_blocks, start = unit % n_blocks * kBlock;
    const int64_t end = std::min(start + kBlock, shape.n_elements);
    const bool direct = gradient.kind == Kind::f32 && is_dense(shape, gradient);
    const bool halves = gradient.kind != Kind::f32 && mask.kind == Kind::none &&
                        is_dense(shape, gradient) && is_dense(shape, policy);
    Buffer &read = scratch()[4], &made = scratch()[5];
    for (int64_t first = start; first < end; first += kPiece) {
      const int64_t n = std::min<int64_t>(kPiece, end - first);
      const Shared shared(shape, target, mask, pair, first, n);
      for (int side = 0; side < 2; ++side) {
        const float slope = scale * slopes[side * shape.n_pairs + pair];
        if (halves) {
          of_halves(side, pair, first, n, shared.target[side], slope);
          continue;
        }
        const float* x = fetch(shape, policy, side, pair, first, n, read);
        float* to = made.values;
        if (direct) to = reinterpret_cast<float*>(row_of(gradient, side, pair)) + first;
        residuals(x, shared.target[side], shared.mask[side], slope, to, n);
        if (!direct) put(shape, gradient, side, pair, first, n, to);
      }
    }
  }
};

template <typename Pass>
void work_on(int64_t first, int64_t end, void* context) {
  for (int64_t unit = first; unit < end; ++unit) static_cast<Pass*>(context)->block(unit);
}

int64_t blocks_of(const Shape& shape) { return (shape.n_elements + kBlock - 1) / kBlock; }

}  // namespace

void set_parallel_for(ParallelFor function) { parallel = function; }

void row_errors(const Shape& shape, const std::vector<Rows>& sources, const Rows& target,
    const Rows& mask, float* errors, double* dots) {
  const int64_t n_blocks = blocks_of(shape), n_sums = 2 * int64_t(sources.size()) + 1;
  Reduction pass{shape, sources, target, mask, dots != nullptr, n_blocks, n_sums,
      std::vector<double>(shape.n_pairs * n_blocks * n_sums)};
  const int64_t elements = std::min(kBlock, shape.n_elements) * n_sums;
  run(shape.n_pairs * n_blocks, elements, work_on<Reduction>, &pass);
  for (int64_t pair = 0; pair < shape.n_pairs; ++pair) {
    for (int64_t k = 0; k < n_sums; ++k) {
      double sum = 0;
      for (int64_t b = 0; b < n_blocks; ++b) sum += pass.sums[(pair * n_blocks + b) * n_sums + k];
      sum /= double(shape.n_elements);
      if (k == n_sums - 1) {
        if (dots != nullptr) dots[pair] = sum;
      } else if (sources[k / 2].kind != Kind::ready) {
        errors[k * shape.n_pairs + pair] = float(sum);
      }
    }
  }
}

void row_gradients(const Shape& shape, const Rows& policy, const Rows& target, const Rows& mask,
    const Rows& gradient, const float* coefficients, float scale) {
  const float factor = scale * (2.0f / float(shape.n_elements));
  Gradient pass{shape, policy, target, mask, gradient, coefficients, factor, blocks_of(shape)};
  const int64_t elements = std::min(kBlock, shape.n_elements) * 4;
  run(shape.n_pairs * pass.n_blocks, elements, work_on<Gradient>, &pass);
}

}  // namespace fastpo
