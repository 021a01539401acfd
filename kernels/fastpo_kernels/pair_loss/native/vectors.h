// Loops over a piece of a row: conversions to and from float32, sums, gradients.
//
// A sum has 32 lanes in float32, as many on every processor, and ends in float64.
#pragma once

#include <cstdint>
#include <cstring>

// The best of three builds of a loop is taken when the module is loaded. GCC before 12 chooses among
// features, not among levels of them.
#if !defined(__x86_64__) || !defined(__GLIBC__) || !defined(__GNUC__) || defined(__clang__)
#define FASTPO_CLONES
#elif __GNUC__ < 12
#define FASTPO_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define FASTPO_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif

namespace fastpo {

// Elements that are read of a row before the next row's turn. Few, so that both sides of all
// predictions come from memory nearly at once, which one core reads faster than one row after
// another (twice as fast with 512 as with 16384, in bfloat16), and the target in float32 stays in
// the first cache; and enough for the sum at the end of a piece to cost nothing.
constexpr int kPiece = 512;

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bf16(uint16_t half) { return as_float(uint32_t(half) << 16); }

// Branchless, so that compilers vectorize it: normal numbers by a shift of the exponent, subnormal
// ones by a subtraction (as FP16 by M. Dukhan, https://github.com/Maratyszcza/FP16).
inline float from_f16(uint16_t half) {
  const uint32_t w = uint32_t(half) << 16, sign = w & 0x80000000u, twice = w + w;
  const float normal = as_float((twice >> 4) + (0xE0u << 23)) * as_float(0x07800000u);
  const float tiny = as_float((twice >> 17) | (126u << 23)) - 0.5f;
  return as_float(sign | (twice < (1u << 27) ? as_bits(tiny) : as_bits(normal)));
}

// To nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

inline uint16_t to_f16(float value) {
  const uint32_t w = as_bits(value), twice = w + w;
  float base = as_float(w & 0x7FFFFFFFu) * as_float(0x77800000u) * as_float(0x08800000u);
  uint32_t bias = twice & 0xFF000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  base = as_float((bias >> 1) + 0x07800000u) + base;
  const uint32_t bits = as_bits(base), number = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
  return uint16_t(((w & 0x80000000u) >> 16) | (twice > 0xFF000000u ? 0x7E00u : number));
}

void widen_bf16(const uint16_t* from, float* to, int64_t n);
void widen_f16(const uint16_t* from, float* to, int64_t n);
void narrow_bf16(const float* from, uint16_t* to, int64_t n);
void narrow_f16(const float* from, uint16_t* to, int64_t n);
// Sum of (x - t)**2, of which each is multiplied by m where there is one; x as it lies in memory.
double squares(const float* x, const float* t, const float* m, int64_t n);
double squares_bf16(const uint16_t* x, const float* t, const float* m, int64_t n);
double squares_f16(const uint16_t* x, const float* t, const float* m, int64_t n);
// Sum of (x - t) (y - u).
double products(const float* x, const float* t, const float* y, const float* u, int64_t n);
// slope (x - t), times m where there is one.
void residuals(const float* x, const float* t, const float* m, float slope, float* to, int64_t n);
// The same without a mask, of half-precision numbers to such.
void residuals_bf16(const uint16_t* x, const float* t, float slope, uint16_t* to, int64_t n);
void residuals_f16(const uint16_t* x, const float* t, float slope, uint16_t* to, int64_t n);

}  // namespace fastpo
