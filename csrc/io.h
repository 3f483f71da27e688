// Reading an array through converters: the numbers of the input converter (DAC) and of the output converter (ADC).
// The matrix product between them is the caller's. aihwkit's analog matrix-vector product (one pass) is the model.
//
//   t = x / alpha_s / inp_step -> rounded -> clipped to +-inp_bound / inp_step -> + noise = the operand u
//   v = inp_step (u W^T) + sigma_s xi -> v / out_step, rounded -> clipped -> * out_step * alpha_s
//
// Operands are in units of the converter's step, so without input noise they are small integers, which bf16 and fp16
// hold exactly. alpha_s is the scale of sample s (noise management, and bound management from its second round on);
// sigma_s^2 = out_noise^2 + (w_noise |u| inp_step)^2: independent noise on every weight adds up to that at an output.
//
// RANDOM NUMBERS: one of kRead's words per element, see math.h. `ticket` numbers the reads of a tile.
#pragma once

#include "math.h"

namespace lrtt {

#define LRTT_IO_FIELDS(F)                                                                                            \
  F(management)                                                                                                      \
  F(nm_thres)                                                                                                        \
  F(worst_case)                                                                                                      \
  F(worst_cap) F(inp_round) F(inp_scale) F(inp_unit) F(inp_limit) F(inp_noise) F(out_round) F(out_scale) F(out_unit) \
      F(out_limit) F(out_noise) F(w_noise)

// inp_scale = 1 / inp_step, inp_unit = inp_step, inp_limit = inp_bound / inp_step, inp_noise in units of inp_step; a
// converter that does not round has the step 1. w_noise is in units of inp_step too.
struct IoNumbers {
#define LRTT_FIELD(name) float name;
  LRTT_IO_FIELDS(LRTT_FIELD)
#undef LRTT_FIELD
};

constexpr int kIoFields = sizeof(IoNumbers) / sizeof(float);

enum Management { kUnmanaged = 0, kAbsMax = 1, kConstant = 2 };
enum Rounding { kContinuous = 0, kNearest = 1, kStochastic = 2 };
enum ReadStage : uint32_t { kInputNoise = 0, kInputRounding = 1, kOutputNoise = 2, kOutputRounding = 3 };

inline IoNumbers io_numbers(const double* packed) {
  float f[kIoFields];
  for (int i = 0; i < kIoFields; ++i) f[i] = float(packed[i]);
  IoNumbers p;
  memcpy(&p, f, sizeof(p));
  return p;
}

// Which words a sample's elements take.
struct ReadId {
  uint64_t key;
  uint32_t sample, ticket, array, round;
  LRTT_HD uint32_t c3(ReadStage stage) const { return counter3(kRead, array, round * 8u + stage); }
};

// Element e takes word read_word(e) of the Philox call read_group(e): 16 neighbours share a word number, so
// that vector lanes and the threads of a warp lie along memory.
constexpr int kReadGroup = 64;
LRTT_HD uint32_t read_group(uint32_t e) { return e / 64u * 16u + e % 16u; }
LRTT_HD uint32_t read_word(uint32_t e) { return e / 16u % 4u; }

// Sums over a sample: lane l adds the elements l, l + 128, ... in float64, then the lanes along a tree (jobs.h).
constexpr int kReadLanes = 128;

// To the nearest integer, ties to even. Beyond 2^22 nothing is rounded: that is far outside every converter.
LRTT_HD float round_even(float t) {
  const float magic = 12582912.0f;  // 1.5 * 2^23
  const float r = (t + magic) - magic;
  return abs_(t) < 4194304.0f ? r : t;
}

LRTT_HD float into_range(float t, float limit) {
  t = t > limit ? limit : t;
  return t < -limit ? -limit : t;
}

// The scale of a sample in round `round` of bound management. `largest` is magnitude_bits of max |x|; `sum` the larger
// of the sums of the positive and of the negative inputs, needed where worst_case is on and round > 0.
LRTT_HD float read_scale(const IoNumbers& p, uint32_t largest, double sum, uint32_t round) {
  float alpha = 1.0f;
  if (p.management == float(kConstant)) alpha = p.nm_thres;
  if (p.management == float(kAbsMax)) {
    if (largest > kNonFinite) return from_bits(0x7fc00000u);
    alpha = min_(from_bits(largest), p.nm_thres);
  }
  if (round == 0) return alpha;
  if (p.worst_case == 0.0f) return alpha * float(1u << round);
  double worst = sum * double(p.worst_case);
  const double cap = double(alpha) * double(p.worst_cap);
  if (cap < worst) worst = cap;
  return max_(float(worst), alpha) * float(1u << (round - 1u));
}

// One input in units of the step, before noise. `dither` is 0, or a uniform in [-0.5, 0.5).
LRTT_HD float dac(const IoNumbers& p, float x, float alpha, float dither) {
  float t = (x / alpha) * p.inp_scale;
  if (p.inp_round != float(kContinuous)) t = round_even(t + dither);
  return alpha == 0.0f ? 0.0f : into_range(t, p.inp_limit);
}

LRTT_HD float read_sigma(const IoNumbers& p, double squares) {
  const double w = double(p.w_noise), out = double(p.out_noise);
  return float(sqrt_(out * out + (w * w) * squares));
}

// One output; `over` says whether the converter clipped it.
LRTT_HD float adc(const IoNumbers& p, float product, float alpha, float sigma, float xi, float dither, bool& over) {
  float t = fma_(sigma, xi, product * p.inp_unit) * p.out_scale;
  if (p.out_round != float(kContinuous)) t = round_even(t + dither);
  over = alpha != 0.0f && abs_(t) > p.out_limit;
  return alpha == 0.0f ? 0.0f : (into_range(t, p.out_limit) * p.out_unit) * alpha;
}

// ------------------------------------------------------------------ jobs

// u[samples, n] and per[2, samples] (alpha_s, sigma_s) from x[samples, n], whose rows are `stride` apart. Samples that
// are not `pending` (null: all are) get zeros.
struct InputJob {
  const void* x;
  int64_t stride;
  int x_type, u_type;  // ElementType; the CPU takes float32 only
  int64_t samples, first_sample;
  int n, array, round;
  const int64_t *ticket, *state;
  const int32_t* pending;
  void* u;
  float* per;
  IoNumbers io;
};

// y[samples, n] from the products acc[samples, n]; clipped[samples] where an output hit its bound. Samples that are not
// `pending` keep their y and are not clipped.
struct OutputJob {
  float* y;
  const float *acc, *per;
  int64_t samples, first_sample;
  int n, array, round;
  const int64_t *ticket, *state;
  const int32_t* pending;
  int32_t* clipped;
  IoNumbers io;
};

// acc[samples, d] = u[samples, n] w[d, n]^T for blocks of samples of which one is pending; on the device only. The
// weight is rounded to u's type, as the product of the first round has it.
struct ProductJob {
  const void* u;
  int u_type;
  const float* w;
  const int32_t* pending;
  float* acc;
  int64_t samples;
  int n, d;
};

}  // namespace lrtt
