#include "vectors.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTPO_F16C __attribute__((target("avx,f16c")))
#include <immintrin.h>
#endif

namespace fastpo {
namespace {

// Eight floats: one register or, without AVX, two. Four sums of them are 32 lanes.
typedef float Lanes __attribute__((vector_size(32)));
typedef float Anywhere __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int kLanes = 8, kStep = 4 * kLanes;

#define FASTPO_LOAD(from) (*reinterpret_cast<const Anywhere*>(from))

inline __attribute__((always_inline)) double added(const Lanes* sums) {
  double total = 0;
  for (int k = 0; k < kStep; ++k) total += double(sums[k / kLanes][k % kLanes]);
  return total;
}

#ifdef FASTPO_F16C
// The processor's own conversions, eight at a time; returns how many were converted.
FASTPO_F16C int64_t widen_by_f16c(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  return i;
}

FASTPO_F16C int64_t narrow_by_f16c(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  return i;
}

const bool kHasF16c = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
#else
int64_t widen_by_f16c(const uint16_t*, float*, int64_t) { return 0; }
int64_t narrow_by_f16c(const float*, uint16_t*, int64_t) { return 0; }
const bool kHasF16c = false;
#endif

}  // namespace

FASTPO_CLONES void widen_bf16(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(from[i]);
}

FASTPO_CLONES void widen_f16(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = kHasF16c ? widen_by_f16c(from, to, n) : 0; i < n; ++i) to[i] = from_f16(from[i]);
}

FASTPO_CLONES void narrow_bf16(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(from[i]);
}

FASTPO_CLONES void narrow_f16(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = kHasF16c ? narrow_by_f16c(from, to, n) : 0; i < n; ++i) to[i] = to_f16(from[i]);
}

FASTPO_CLONES double squares(const float* x, const float* t, const float* m, int64_t n) {
  Lanes a{}, b{}, c{}, d{};
  const int64_t whole = n - n % kStep;
  int64_t i = 0;
  if (m == nullptr) {
    for (; i < whole; i += kStep) {
      const Lanes p = FASTPO_LOAD(x + i) - FASTPO_LOAD(t + i), q = FASTPO_LOAD(x + i + 8) - FASTPO_LOAD(t + i + 8);
      const Lanes r = FASTPO_LOAD(x + i + 16) - FASTPO_LOAD(t + i + 16), s = FASTPO_LOAD(x + i + 24) - FASTPO_LOAD(t + i + 24);
      a += p * p, b += q * q, c += r * r, d += s * s;
    }
  } else {
    for (; i < whole; i += kStep) {
      const Lanes p = FASTPO_LOAD(x + i) - FASTPO_LOAD(t + i), q = FASTPO_LOAD(x + i + 8) - FASTPO_LOAD(t + i + 8);
      const Lanes r = FASTPO_LOAD(x + i + 16) - FASTPO_LOAD(t + i + 16), s = FASTPO_LOAD(x + i + 24) - FASTPO_LOAD(t + i + 24);
      a += p * p * FASTPO_LOAD(m + i), b += q * q * FASTPO_LOAD(m + i + 8);
      c += r * r * FASTPO_LOAD(m + i + 16), d += s * s * FASTPO_LOAD(m + i + 24);
    }
  }
  const Lanes sums[] = {a, b, c, d};
  double total = added(sums);
  for (; i < n; ++i) {
    const float r = x[i] - t[i];
    total += m == nullptr ? r * r : r * r * m[i];
  }
  return total;
}

FASTPO_CLONES double products(
    const float* x, const float* t, const float* y, const float* u, int64_t n) {
  Lanes a{}, b{}, c{}, d{};
  const int64_t whole = n - n % kStep;
  int64_t i = 0;
  for (; i < whole; i += kStep) {
    a += (FASTPO_LOAD(x + i) - FASTPO_LOAD(t + i)) * (FASTPO_LOAD(y + i) - FASTPO_LOAD(u + i));
    b += (FASTPO_LOAD(x + i + 8) - FASTPO_LOAD(t + i + 8)) * (FASTPO_LOAD(y + i + 8) - FASTPO_LOAD(u + i + 8));
    c += (FASTPO_LOAD(x + i + 16) - FASTPO_LOAD(t + i + 16)) * (FASTPO_LOAD(y + i + 16) - FASTPO_LOAD(u + i + 16));
    d += (FASTPO_LOAD(x + i + 24) - FASTPO_LOAD(t + i + 24)) * (FASTPO_LOAD(y + i + 24) - FASTPO_LOAD(u + i + 24));
  }
  const Lanes sums[] = {a, b, c, d};
  double total = added(sums);
  for (; i < n; ++i) total += (x[i] - t[i]) * (y[i] - u[i]);
  return total;
}

FASTPO_CLONES void residuals(
    const float* x, const float* t, const float* m, float slope, float* to, int64_t n) {
  if (m == nullptr) {
    for (int64_t i = 0; i < n; ++i) to[i] = slope * (x[i] - t[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = slope * (x[i] - t[i]) * m[i];
  }
}

}  // namespace fastpo
