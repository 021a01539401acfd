#include "vectors.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTPO_AVX2 __attribute__((target("avx2,fma,f16c")))
#include <immintrin.h>
#endif

namespace fastpo {
namespace {

// Eight floats: one register or, without AVX, two. Four sums of them are 32 lanes.
typedef float Lanes __attribute__((vector_size(32)));
typedef float Anywhere __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int kLanes = 8, kStep = 4 * kLanes;

// Eight elements from an address on, in float32.
#define FASTPO_F32(from) (*reinterpret_cast<const Anywhere*>(from))
#define FASTPO_HALVES(from) _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))
#define FASTPO_BF16(from) \
  reinterpret_cast<Lanes>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(FASTPO_HALVES(from)), 16))
#define FASTPO_F16(from) \
  reinterpret_cast<Lanes>(_mm256_cvtph_ps(FASTPO_HALVES(from)))

// The body of `squares` by one of these. A macro, since what is inlined into a function for other
// processors would keep its own instructions.
#define FASTPO_SQUARES(LOAD, WIDEN)                                                           \
  Lanes a{}, b{}, c{}, d{};                                                                   \
  const int64_t whole = n - n % kStep;                                                        \
  int64_t i = 0;                                                                              \
  if (m == nullptr) {                                                                         \
    for (; i < whole; i += kStep) {                                                           \
      const Lanes p = LOAD(x + i) - FASTPO_F32(t + i);                                        \
      const Lanes q = LOAD(x + i + 8) - FASTPO_F32(t + i + 8);                                \
      const Lanes r = LOAD(x + i + 16) - FASTPO_F32(t + i + 16);                              \
      const Lanes s = LOAD(x + i + 24) - FASTPO_F32(t + i + 24);                              \
      a += p * p, b += q * q, c += r * r, d += s * s;                                         \
    }                                                                                         \
  } else {                                                                                    \
    for (; i < whole; i += kStep) {                                                           \
      const Lanes p = LOAD(x + i) - FASTPO_F32(t + i);                                        \
      const Lanes q = LOAD(x + i + 8) - FASTPO_F32(t + i + 8);                                \
      const Lanes r = LOAD(x + i + 16) - FASTPO_F32(t + i + 16);                              \
      const Lanes s = LOAD(x + i + 24) - FASTPO_F32(t + i + 24);                              \
      a += p * p * FASTPO_F32(m + i), b += q * q * FASTPO_F32(m + i + 8);                     \
      c += r * r * FASTPO_F32(m + i + 16), d += s * s * FASTPO_F32(m + i + 24);               \
    }                                                                                         \
  }                                                                                           \
  const Lanes sums = (a + b) + (c + d);                                                       \
  double total = added(sums);                                                                 \
  for (; i < n; ++i) {                                                                        \
    const float r = WIDEN(x[i]) - t[i];                                                       \
    total += m == nullptr ? r * r : r * r * m[i];                                             \
  }                                                                                           \
  return total

inline __attribute__((always_inline)) double added(const Lanes& sums) {
  double total = 0;
  for (int k = 0; k < kLanes; ++k) total += double(sums[k]);
  return total;
}

#ifdef FASTPO_AVX2
// The processor's own conversions, eight at a time; returns how many were converted.
FASTPO_AVX2 int64_t widen_f16_by_avx2(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  return i;
}

FASTPO_AVX2 int64_t narrow_f16_by_avx2(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  return i;
}

FASTPO_AVX2 double squares_bf16_by_avx2(
    const uint16_t* x, const float* t, const float* m, int64_t n) {
  FASTPO_SQUARES(FASTPO_BF16, from_bf16);
}

FASTPO_AVX2 double squares_f16_by_avx2(
    const uint16_t* x, const float* t, const float* m, int64_t n) {
  FASTPO_SQUARES(FASTPO_F16, from_f16);
}

// `to_bf16` of eight numbers, each in the lower half of its word.
FASTPO_AVX2 inline __m256i rounded_bf16(__m256 values) {
  const __m256i bits = _mm256_castps_si256(values), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
  const __m256i number = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(number, _mm256_set1_epi32(0x7FC0), nan);
}

FASTPO_AVX2 int64_t residuals_bf16_by_avx2(
    const uint16_t* x, const float* t, float slope, uint16_t* to, int64_t n) {
  const __m256 by = _mm256_set1_ps(slope);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m256i words[2];
    for (int k = 0; k < 2; ++k) {
      const __m256 wide = reinterpret_cast<__m256>(FASTPO_BF16(x + i + 8 * k));
      const __m256 r = _mm256_sub_ps(wide, _mm256_loadu_ps(t + i + 8 * k));
      words[k] = rounded_bf16(_mm256_mul_ps(by, r));
    }
    const __m256i packed = _mm256_packus_epi32(words[0], words[1]);  // by halves of registers
    const __m256i halves = _mm256_permute4x64_epi64(packed, 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), halves);
  }
  return i;
}

FASTPO_AVX2 int64_t residuals_f16_by_avx2(
    const uint16_t* x, const float* t, float slope, uint16_t* to, int64_t n) {
  const __m256 by = _mm256_set1_ps(slope);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 wide = reinterpret_cast<__m256>(FASTPO_F16(x + i));
    const __m256 r = _mm256_sub_ps(wide, _mm256_loadu_ps(t + i));
    const __m128i halves = _mm256_cvtps_ph(_mm256_mul_ps(by, r), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  return i;
}

const bool kHasAvx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
#else
int64_t widen_f16_by_avx2(const uint16_t*, float*, int64_t) { return 0; }
int64_t narrow_f16_by_avx2(const float*, uint16_t*, int64_t) { return 0; }
double squares_bf16_by_avx2(const uint16_t*, const float*, const float*, int64_t) { return 0; }
double squares_f16_by_avx2(const uint16_t*, const float*, const float*, int64_t) { return 0; }
int64_t residuals_bf16_by_avx2(const uint16_t*, const float*, float, uint16_t*, int64_t) {
  return 0;
}
int64_t residuals_f16_by_avx2(const uint16_t*, const float*, float, uint16_t*, int64_t) {
  return 0;
}
const bool kHasAvx2 = false;
#endif

}  // namespace

FASTPO_CLONES void widen_bf16(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(from[i]);
}

FASTPO_CLONES void widen_f16(const uint16_t* from, float* to, int64_t n) {
  int64_t i = kHasAvx2 ? widen_f16_by_avx2(from, to, n) : 0;
  for (; i < n; ++i) to[i] = from_f16(from[i]);
}

FASTPO_CLONES void narrow_bf16(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(from[i]);
}

FASTPO_CLONES void narrow_f16(const float* from, uint16_t* to, int64_t n) {
  int64_t i = kHasAvx2 ? narrow_f16_by_avx2(from, to, n) : 0;
  for (; i < n; ++i) to[i] = to_f16(from[i]);
}

FASTPO_CLONES double squares(const float* x, const float* t, const float* m, int64_t n) {
  FASTPO_SQUARES(FASTPO_F32, float);
}

namespace {

// By way of a piece in float32.
double squares_by_pieces(void (*widen)(const uint16_t*, float*, int64_t), const uint16_t* x,
    const float* t, const float* m, int64_t n) {
  constexpr int64_t kWide = 2048;
  float wide[kWide];
  double total = 0;
  for (int64_t i = 0; i < n; i += kWide) {
    const int64_t part = n - i < kWide ? n - i : kWide;
    widen(x + i, wide, part);
    total += squares(wide, t + i, m == nullptr ? m : m + i, part);
  }
  return total;
}

}  // namespace

double squares_bf16(const uint16_t* x, const float* t, const float* m, int64_t n) {
  return kHasAvx2 ? squares_bf16_by_avx2(x, t, m, n) : squares_by_pieces(widen_bf16, x, t, m, n);
}

double squares_f16(const uint16_t* x, const float* t, const float* m, int64_t n) {
  return kHasAvx2 ? squares_f16_by_avx2(x, t, m, n) : squares_by_pieces(widen_f16, x, t, m, n);
}

FASTPO_CLONES double products(
    const float* x, const float* t, const float* y, const float* u, int64_t n) {
  Lanes a{}, b{}, c{}, d{};
  const int64_t whole = n - n % kStep;
  int64_t i = 0;
  for (; i < whole; i += kStep) {
    a += (FASTPO_F32(x + i) - FASTPO_F32(t + i)) *
         (FASTPO_F32(y + i) - FASTPO_F32(u + i));
    b += (FASTPO_F32(x + i + 8) - FASTPO_F32(t + i + 8)) *
         (FASTPO_F32(y + i + 8) - FASTPO_F32(u + i + 8));
    c += (FASTPO_F32(x + i + 16) - FASTPO_F32(t + i + 16)) *
         (FASTPO_F32(y + i + 16) - FASTPO_F32(u + i + 16));
    d += (FASTPO_F32(x + i + 24) - FASTPO_F32(t + i + 24)) *
         (FASTPO_F32(y + i + 24) - FASTPO_F32(u + i + 24));
  }
  const Lanes sums = (a + b) + (c + d);
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

FASTPO_CLONES void residuals_bf16(
    const uint16_t* x, const float* t, float slope, uint16_t* to, int64_t n) {
  for (int64_t i = kHasAvx2 ? residuals_bf16_by_avx2(x, t, slope, to, n) : 0; i < n; ++i) {
    to[i] = to_bf16(slope * (from_bf16(x[i]) - t[i]));
  }
}

FASTPO_CLONES void residuals_f16(
    const uint16_t* x, const float* t, float slope, uint16_t* to, int64_t n) {
  for (int64_t i = kHasAvx2 ? residuals_f16_by_avx2(x, t, slope, to, n) : 0; i < n; ++i) {
    to[i] = to_f16(slope * (from_f16(x[i]) - t[i]));
  }
}

}  // namespace fastpo
