// The scalar functions of `pair_loss/objectives.py` with partial derivatives, in float64.
//
// The formulas are those of `pair_loss/gpu/objectives.py`. Comparisons are written so that NaN
// passes through.
#pragma once

#include <cmath>
#include <cstdint>

namespace fastpo {

// What is known of a pair: margin, errors of policy and reference, what is subtracted.
struct Pair {
  double d, e_w, e_l, r_w, r_l, shift;
};

// Loss, and its derivatives by the policy's errors.
struct Slopes {
  double loss, by_winner, by_loser;
};

struct Options {
  double a, b, c;
};

// In the order of the names in `launch.py`.
enum class Objective : int64_t {
  dpo, robust_dpo, ipo, hinge, kto, dmpo, linear_dpo, sft, mapo, poly_dpo
};

// Beyond it a sigmoid is 0 or 1, and its product with a larger logit no number.
constexpr double kSaturated = 700.0;

inline double at_least(double x, double low) { return x < low ? low : x; }
inline double at_most(double x, double high) { return x > high ? high : x; }
inline double softplus(double x) { return at_least(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

inline double sigmoid(double x) {
  const double t = std::exp(-std::fabs(x));
  return (x < 0 ? t : 1.0) / (1.0 + t);
}

inline double share(double smoothing, double loss) {
  return smoothing == 0 ? 0.0 : smoothing * loss;
}

inline Slopes dpo(const Pair& p, const Options& o) {
  const double z = o.a * p.d - p.shift, smoothing = o.b;
  const double loss = share(smoothing, softplus(z)) + (1 - smoothing) * softplus(-z);
  const double slope = o.a * ((1 - smoothing) * sigmoid(-z) - smoothing * sigmoid(z));
  return {loss, slope, -slope};
}

inline Slopes robust_dpo(const Pair& p, const Options& o) {
  const double z = o.a * p.d - p.shift, smoothing = o.b, scale = 1 / (1 - 2 * smoothing);
  const double loss = scale * ((1 - smoothing) * softplus(-z) - share(smoothing, softplus(z)));
  const double slope = scale * o.a * ((1 - smoothing) * sigmoid(-z) + smoothing * sigmoid(z));
  return {loss, slope, -slope};
}

inline Slopes ipo(const Pair& p, const Options& o) {
  const double gap = p.d - p.shift - 0.5 / o.a;
  return {gap * gap, -2 * gap, 2 * gap};
}

inline Slopes hinge(const Pair& p, const Options& o) {
  const double slack = 1 - (o.a * p.d - p.shift), slope = slack <= 0 ? 0.0 : o.a;
  return {at_least(slack, 0.0), slope, -slope};
}

inline Slopes kto(const Pair& p, const Options& o) {
  const double winner = o.a * (p.r_w - p.e_w - p.shift), loser = o.a * (p.r_l - p.e_l - p.shift);
  const double loss = 0.5 * (o.b * sigmoid(-winner) + o.c * sigmoid(loser));
  return {loss, 0.5 * o.a * o.b * sigmoid(winner) * sigmoid(-winner),
      -0.5 * o.a * o.c * sigmoid(loser) * sigmoid(-loser)};
}

inline Slopes dmpo(const Pair& p, const Options& o) {
  const double z = at_most(at_least(o.a * p.d - p.shift, -kSaturated), kSaturated);
  const double yes = sigmoid(z), no = sigmoid(-z);
  const double loss = yes * (-softplus(-z) - o.b) + no * (-softplus(z) - o.c);
  const double slope = -o.a * yes * no * (z - (o.b - o.c));
  return {loss, slope, -slope};
}

inline Slopes linear_dpo(const Pair& p, const Options& o) {
  const double z = o.a * p.d - p.shift, c = at_most(at_least(0.5 - 0.2 * z, o.b), 1 - o.b);
  return {c * (p.e_w - p.e_l), c, -c};
}

// `h = x / expm1(x) - 1` and `dh/dx`, x >= 0: Bernoulli's series below 1/2, else closed.
inline void decay_minus_one(double x, double& value, double& slope) {
  if (x < 0.5) {
    const double t = x * x;
    value = t * (1. / 12 + t * (-1. / 720 + t * (1. / 30240 + t * (-1. / 1209600)))) - 0.5 * x;
    slope = x * (1. / 6 + t * (-1. / 180 + t * (1. / 5040 + t * (-1. / 151200)))) - 0.5;
    return;
  }
  const double far = at_most(x, kSaturated), decayed = std::exp(-far);
  const double f = far * decayed / (1 - decayed);
  value = f - 1;
  slope = f * (1 - f) / far - f;
}

inline Slopes mapo(const Pair& p, const Options& o) {
  const double weight = o.a, snr = o.b, steps = o.c;
  double h_w, h_l, slope_w, slope_l;
  decay_minus_one(snr * p.e_w, h_w, slope_w);
  decay_minus_one(snr * p.e_l, h_l, slope_l);
  const double v = steps * (h_w - h_l), pull = weight * steps * snr * sigmoid(-v);
  return {p.e_w + weight * softplus(-v), 1 - pull * slope_w, pull * slope_l};
}

inline Slopes poly_dpo(const Pair& p, const Options& o) {
  const double z = o.a * p.d - p.shift, no = sigmoid(-z);
  const double slope = o.a * no * (1 + o.b * sigmoid(z));
  return {softplus(-z) + o.b * no, slope, -slope};
}

inline Slopes slopes_of(Objective objective, const Pair& p, const Options& o) {
  switch (objective) {
    case Objective::dpo: return dpo(p, o);
    case Objective::robust_dpo: return robust_dpo(p, o);
    case Objective::ipo: return ipo(p, o);
    case Objective::hinge: return hinge(p, o);
    case Objective::kto: return kto(p, o);
    case Objective::dmpo: return dmpo(p, o);
    case Objective::linear_dpo: return linear_dpo(p, o);
    case Objective::mapo: return mapo(p, o);
    case Objective::poly_dpo: return poly_dpo(p, o);
    case Objective::sft: break;
  }
  return {p.e_w, 1, 0};
}

}  // namespace fastpo
