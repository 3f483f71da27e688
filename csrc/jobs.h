// What the kernels are told: the layouts shared with Python, the description of one pulsed update, and
// the rule that turns one sample into a pulse train.
//
// THE PULSE STREAM. A pulsed update applies its samples in order, in blocks of kBlockSamples. Every sample of a block
// owns slot_width slots, of which its train takes the first BL_s; they are cut into 32-slot words, so that one AND of a
// word of x bits and a word of d bits finds the coincidences of 32 slots, whether they belong to one sample of 31 slots
// or to 32 samples of one slot. A sample of up to 32 slots never lies in two words.
//
// What a cell makes of a block: where trains have few slots (burst_width), or the device is not one for bursts
// (bursts.h), each coincidence is a pulse, and the n-th pulse takes the n-th noise number. Otherwise the coincidences
// of one sample in one word (of a counted train: all) are a burst, and the n-th burst takes the n-th noise number; a
// burst that is not small is pulses again, each with a noise number. Blocks are part of the numbers; chunk sizes and
// thread counts are not.
//
// Trains that may exceed 31 slots come in blocks of fewer samples (block_samples), so that a block's stream stays
// within the words of 512 samples of 31 slots; their bits are drawn in pieces of 32 slots. A counted train (mean_count,
// deterministic_implicit) has no bits: the cell's n pulses take the first n of the sample's BL slots.
#pragma once

#include "bursts.h"

namespace lrtt {

constexpr int kBlockSamples = 512;
constexpr int kShortSlots = 31;                          // up to here a block has kBlockSamples samples
constexpr int kMostSlots = kShortSlots * kBlockSamples;  // a block of one sample

// Samples of a block whose trains have at most `slots` slots: a power of two.
LRTT_HD int block_samples(int slots) {
  int samples = kBlockSamples;
  while (samples > 1 && samples * slots > kBlockSamples * kShortSlots) samples /= 2;
  return samples;
}

// Slots of every sample of a block whose longest train has `longest`.
LRTT_HD int slot_width(int longest) {
  if (longest > 32) return (longest + 31) / 32 * 32;
  int width = 1;
  while (width < longest) width *= 2;
  return width;
}

constexpr double kFixedPoint = 16777216.0;  // 2^24 units per weight unit

// tile.state, int64: the whole mutable state of a tile besides A, B and C.
enum State { kKey, kStep, kCounter, kCycle, kStateSize };

// tile.counts, int64: accumulators that monitoring reads. Weight sums are fixed point (kFixedPoint), so
// that concurrent additions commute and the totals are the same for any number of threads.
#define LRTT_COUNTS(F) \
  F(pulses_a) F(pulses_b) F(pulses_c) F(transfers) F(intended) F(lost) F(nonfinite) F(first_bad_step)

enum Count {
#define LRTT_FIELD(name) k_##name,
  LRTT_COUNTS(LRTT_FIELD)
#undef LRTT_FIELD
      kCountSize
};

// tile.hyper, float64 on the host: these fields, then DeviceParams of the fast and the visible array.
#define LRTT_TILE_FIELDS(F)                                                                                           \
  F(tau)                                                                                                              \
  F(transfer_every)                                                                                                   \
  F(count_samples)                                                                                                    \
  F(transfer_mode) F(reinit) F(reinit_std) F(desired_bl) F(update_management) F(update_bl_management) F(transfer_bl)  \
      F(transfer_update_management) F(transfer_update_bl_management) F(max_words) F(pulse_type) F(fixed_bl) F(max_bl) \
          F(x_res) F(d_res) F(sto_round) F(um_grad_scale) F(transfer_pulse_type) F(transfer_x_res) F(transfer_d_res)  \
              F(transfer_sto_round)

struct TileParams {
#define LRTT_FIELD(name) double name;
  LRTT_TILE_FIELDS(LRTT_FIELD)
#undef LRTT_FIELD
};

enum TransferMode { kDigital = 1, kPulsed = 2, kPulsedResidual = 3 };
enum Reinit { kNormal = 1, kUniform = 2, kOrthogonal = 3 };

constexpr int kTileFields = sizeof(TileParams) / sizeof(double);
constexpr int kDeviceFields = sizeof(DeviceParams) / sizeof(float);
constexpr int kHyperSize = kTileFields + 2 * kDeviceFields;

inline TileParams tile_params(const double* hyper) {
  TileParams p;
  memcpy(&p, hyper, sizeof(p));
  return p;
}

inline DeviceParams device_params(const double* hyper, bool visible) {
  float f[kDeviceFields];
  for (int i = 0; i < kDeviceFields; ++i) f[i] = float(hyper[kTileFields + (visible ? kDeviceFields : 0) + i]);
  DeviceParams p;
  memcpy(&p, f, sizeof(p));
  return p;
}

enum PulseType : int {
  kStochasticCompressed = 1,
  kStochasticPlain = 2,  // differs in aihwkit's implementation only
  kMeanCount = 3,
  kDeterministicImplicit = 4,
  kNone = 5,  // these two never reach a pulsed update
  kNoneWithDevice = 6,
};

struct PulseParams {
  int desired_bl;
  int update_management;
  int update_bl_management;
  int type = kStochasticCompressed;
  int fixed_bl = 1;
  int max_bl = 0;  // of a train that fixed_bl = 0 makes longer
  int sto_round = 0;
  float x_res = 0.0f, d_res = 0.0f;
  double um_grad_scale = 1.0;
};

LRTT_HD PulseParams update_pulse(const TileParams& t) {
  return {int(t.desired_bl), int(t.update_management), int(t.update_bl_management),
          int(t.pulse_type), int(t.fixed_bl),          int(t.max_bl),
          int(t.sto_round),  float(t.x_res),           float(t.d_res),
          t.um_grad_scale};
}

LRTT_HD PulseParams transfer_pulse(const TileParams& t) {
  return {int(t.transfer_bl),
          int(t.transfer_update_management),
          int(t.transfer_update_bl_management),
          int(t.transfer_pulse_type),
          1,
          0,
          int(t.transfer_sto_round),
          float(t.transfer_x_res),
          float(t.transfer_d_res),
          1.0};
}

// Most slots that a train can have, and with it the samples of a block.
LRTT_HD int most_slots(const PulseParams& p) { return p.fixed_bl || p.max_bl < p.desired_bl ? p.desired_bl : p.max_bl; }
LRTT_HD int block_samples(const PulseParams& p) { return block_samples(most_slots(p)); }
LRTT_HD int block_words(const PulseParams& p) { return (block_samples(p) * slot_width(most_slots(p)) + 31) / 32; }

// How a job's pulses are made. Each form has kernels of its own, so that the common one pays nothing for the others.
enum Form : int {
  kShortBits = 0,  // at most kShortSlots slots with probabilities as they are
  kAnyBits = 1,    // long trains, probabilities on a grid
  kCounted = 2,    // no bits
};

LRTT_HD int form_of(const PulseParams& p) {
  if (p.type == kMeanCount || p.type == kDeterministicImplicit) return kCounted;
  return most_slots(p) > kShortSlots || p.x_res > 0.0f || p.d_res > 0.0f ? kAnyBits : kShortBits;
}

enum ElementType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A [samples, elements] operand; sample s, element e stands at p[s*ss + e*es]. The CPU takes float32 only.
struct Operand {
  const void* p;
  int64_t ss, es;
  int type;
  int padding;
};

// w[m, n] (row-major) takes `samples` rank-1 updates w -= eta_s d_s x_s^T as pulses.
struct PulseJob {
  float *w, *cells;  // cells: see Held, null for kPlain
  int m, n;
  Operand x, d;                   // x has n elements a sample, d has m
  const uint32_t *x_top, *d_top;  // magnitude_bits of each sample's largest |x|, |d|, where somebody has them; or null
  int64_t samples, first_sample;
  const float* eta;
  const int64_t* state;
  int64_t* counts;
  int array;
  PulseParams pulse;
  DeviceParams device;
};

// Everything about one tile that the transfer needs. T is float or double.
struct TransferJob {
  void *a, *b, *c;                     // [d, r], [r, k], [d, k]
  float *cells_a, *cells_b, *cells_c;  // see Held
  int d, k, r;
  int is_double;
  int64_t increment;  // samples of this step
  int64_t* state;
  int64_t* counts;
  TileParams tile;
  DeviceParams fast, visible;
};

// ------------------------------------------------------------------ the train of one sample

struct Train {
  int bl;
  float sx, sd;
};

// Update management and BL management (Gokmen & Vlasov 2016; aihwkit's pulsed meta parameter).
// x_max, d_max are magnitude_bits of the largest |x|, |d|. A non-finite operand gets no train. Without fixed_bl and BL
// management, a train that desired_bl slots cannot express gets ceil(lr / g) slots and S = 1; beyond max_bl, S grows.
LRTT_HD Train plan_train(float eta, uint32_t x_max, uint32_t d_max, float granularity, const PulseParams& p,
                         bool& finite) {
  finite = x_max < kNonFinite && d_max < kNonFinite && magnitude_bits(eta) < kNonFinite;
  Train t{0, 0.0f, 0.0f};
  if (!finite || x_max == 0 || d_max == 0 || eta == 0.0f) return t;
  const double lr = double(abs_(eta)), g = double(granularity);
  const double xm = double(from_bits(x_max)), dm = double(from_bits(d_max)) * p.um_grad_scale;
  const double kappa = lr * xm * dm / g;
  const double want = double(p.desired_bl);
  double bl = want;
  bool unit = false;
  if (p.update_bl_management && kappa < want) {
    bl = double(int(kappa));
    if (bl < kappa) bl += 1.0;
    if (bl < 1.0) return t;  // kappa underflowed to 0
  } else if (!p.fixed_bl && g * want < lr) {
    const double need = lr / g;
    bl = double(most_slots(p));
    unit = need <= bl;
    if (unit) bl = double(int(need)) < need ? double(int(need)) + 1.0 : double(int(need));
  }
  const double s = unit ? 1.0 : sqrt_(lr / (g * bl));
  double ratio = 1.0;  // sqrt(x_m / d_m), with d_m limited to what BL pulses can express
  if (p.update_management) ratio = sqrt_(xm / (kappa > want ? dm * (want / kappa) : dm));
  t.bl = int(bl);
  // Kept finite: 0 * infinity would let a zero operand fire where the other one is above 1e36.
  t.sd = from_bits(kNonFinite - 1u);
  t.sx = t.sd;
  if (s * ratio < double(t.sd)) t.sd = float(s * ratio);
  if (s / ratio < double(t.sx)) t.sx = float(s / ratio);
  return t;
}

// ------------------------------------------------------------------ counted trains

// One side of a counted train, from p = |v| S: mean_count rounds BL q(p) to a whole number, deterministic_implicit
// keeps q(p); p above 1 acts as 1.
LRTT_HD float counted_value(int type, float p, float res, bool random, uint32_t word, int bl) {
  const float q = min_(on_grid(p, res, random, word), 1.0f);
  return type == kMeanCount ? nearest_even(float(bl) * q) : q;
}

// Pulses of a cell whose sides have these values (magnitudes): round(x d / BL) or round(BL d x), halves to even.
LRTT_HD int counted_pulses(int type, float x, float d, int bl) {
  if (type == kDeterministicImplicit) return int(nearest_even(float(bl) * d * x));
  const double product = double(x) * double(d);  // of integers; the quotient is exact enough for its integer part
  const int whole = int(product / double(bl));
  const int rest = 2 * (int(product) - whole * bl);
  return whole + (rest > bl || (rest == bl && (whole & 1)) ? 1 : 0);
}

// Words that term q of a transfer needs so that nothing of it is cut, up to the cap.
LRTT_HD int transfer_words(float tau, uint32_t x_max, uint32_t d_max, float granularity, int bl, int cap) {
  if (x_max >= kNonFinite || d_max >= kNonFinite) return 1;
  const double kappa = double(abs_(tau)) * double(from_bits(x_max)) * double(from_bits(d_max)) / double(granularity);
  const double words = kappa / double(bl);
  if (!(words < double(cap))) return cap;
  const int n = int(words);
  return double(n) < words ? n + 1 : (n < 1 ? 1 : n);
}

// |d| above this saturates all words of a term that needs more than the cap; infinity where none does.
LRTT_HD float saturation(float tau, uint32_t x_max, uint32_t d_max, float granularity, const PulseParams& p, int cap) {
  const float never = from_bits(kNonFinite);
  const int words = transfer_words(tau, x_max, d_max, granularity, p.desired_bl, cap);
  bool finite;
  const Train t = plan_train(tau / float(words), x_max, d_max, granularity, p, finite);
  if (t.bl == 0) return never;
  return abs_(from_bits(d_max)) * t.sd > 1.000001f ? 1.0f / t.sd : never;  // 1e-6: rounding of sd
}

// The part of v beyond +-limit.
LRTT_HD float excess(float v, float limit) {
  const float over = abs_(v) - limit;
  return over > 0.0f ? (v < 0.0f ? -over : over) : 0.0f;
}

// ------------------------------------------------------------------ reinit

// Element `index` = q*k + j of the fresh B before clipping; r*k elements. The orthogonal draw starts from
// the same normals.
LRTT_HD float draw_b(int reinit, float std, uint32_t word) {
  if (reinit == kUniform) return std * (1.7320508f * fma_(2.0f, uniform(word), -1.0f));
  return std * normal(word);
}

// ------------------------------------------------------------------ sums in one fixed order

// Lane l adds the elements l, l + lanes, l + 2*lanes, ...; then the lanes are added along a tree.
constexpr int kSumLanes = 32;      // a warp
constexpr int kScaleLanes = 1024;  // a thread block

template <int lanes>
LRTT_HD double tree_sum(double* lane) {
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// lr * <p.grad, g0> / <g0, g0>. Equal vectors give equal sums, so an untouched gradient leaves lr as it is.
LRTT_HD float pulse_rate(double lr, double cross, double square) {
  return square == 0.0 ? 0.0f : float(lr * (cross / square));
}

}  // namespace lrtt
