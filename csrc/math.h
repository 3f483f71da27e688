// The one source of the numbers: random bits, normals and elementary functions, compiled for the host
// and for the device; devices.h has the device steps made of them.
//
// Everything here is integer arithmetic or IEEE operations in a fixed order (+, -, *, /, sqrt and
// explicit fma), built with -ffp-contract=off and --fmad=false, without libm. So a CPU and a GPU
// that are given the same operands produce the same bits.
//
// RANDOM NUMBERS are a pure function of a key and a counter (Philox-4x32-7, Salmon et al. 2011,
// "Parallel random numbers: as easy as 1, 2, 3"); there is no generator state to advance. The key is
// the tile's 64-bit key. The counter is laid out as follows:
//
//   purpose            c0                    c1                        c2      c3
//   kDraw              cell                  block of 4 words          0       purpose|array|0
//   kReinit            element / 4           0                         cycle   purpose|array|0
//   kBitX, kBitD       element / 4           sample * 64 + bit plane   step    purpose|array|piece
//   kNoise             cell                  block of samples          step    purpose|array|0
//   kDiffusion         cell / 4              0                         step    purpose|array|0
//   kWriteNoise        cell / 4              block of samples, 0       step    purpose|array|event
//   kReset             cell                  number of the reset       step    purpose|array|0
//   kReset             cell                  0; 1: PulseNoise          step    purpose|array|1 (refresh)
//   kRound             element / 4           sample * 64 + side        step    purpose|array|0
//   kRead              read_group(element)   sample                    ticket  purpose|array|round * 8 + stage
//
// `cell` = row * columns + column of the array; `element` indexes one side of an outer product; word
// k of the four belongs to element 4*(element/4)+k, and likewise to a cell; of kNoise, words 0 and 1 start the noise of
// the cell's pulses in that block (PulseNoise). `step` counts optimizer steps, `cycle` reinits.
// `piece` is the 32-slot piece of one sample's train, `side` is 0 for x and 1 for d. `event` is a WriteEvent
// (devices.h); that of a reinit has the cycle instead of the step. The second cell of a pair belongs to array + kMinus.
// kRead is explained in io.h: `ticket` numbers the reads of a tile, `round` those of one read that bound management
// repeats.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#  define LRTT_HD __host__ __device__ __forceinline__
#else
#  define LRTT_HD inline __attribute__((always_inline))
#endif

namespace lrtt {

enum Array : uint32_t { kA = 0, kB = 1, kC = 2, kMinus = 4 };
enum Purpose : uint32_t {
  kDraw = 1,
  kReinit = 2,
  kBitX = 3,
  kBitD = 4,
  kNoise = 5,
  kDiffusion = 6,
  kWriteNoise = 7,
  kReset = 8,
  kRound = 9,
  kRead = 16
};

LRTT_HD uint32_t counter3(Purpose purpose, uint32_t array, uint32_t piece) {
  return (uint32_t(purpose) << 24) | (array << 16) | piece;
}

// ------------------------------------------------------------------ elementary pieces

LRTT_HD float fma_(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

LRTT_HD float sqrt_(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

LRTT_HD double sqrt_(double a) {
#ifdef __CUDA_ARCH__
  return __dsqrt_rn(a);
#else
  return __builtin_sqrt(a);
#endif
}

LRTT_HD float from_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

LRTT_HD uint32_t to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

// |f| as an integer that orders like |f|; NaN and infinity are at least kNonFinite.
constexpr uint32_t kNonFinite = 0x7f800000u;
LRTT_HD uint32_t magnitude_bits(float f) { return to_bits(f) & 0x7fffffffu; }

LRTT_HD float min_(float a, float b) { return a < b ? a : b; }
LRTT_HD float max_(float a, float b) { return a > b ? a : b; }
LRTT_HD float abs_(float a) { return from_bits(to_bits(a) & 0x7fffffffu); }

LRTT_HD int popcount_(uint32_t v) {
#ifdef __CUDA_ARCH__
  return __popc(v);
#else
  return __builtin_popcount(v);
#endif
}

// ------------------------------------------------------------------ Philox-4x32-7

// The fewest rounds that pass all of TestU01 (Salmon et al. 2011, table 2); their default of 10 is a margin that a
// pulse would pay for with a third of its random numbers' cost.
constexpr int kRounds = 7;

struct Words {
  uint32_t w[4];
};

// The halves of the 64-bit product a b.
LRTT_HD void product(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
#ifdef __CUDA_ARCH__
  high = __umulhi(a, b);  // one multiplication gives both; taking them out of a uint64_t costs an addition of zero
  low = a * b;
#else
  const uint64_t p = uint64_t(a) * b;
  high = uint32_t(p >> 32);
  low = uint32_t(p);
#endif
}

LRTT_HD Words philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#ifdef __CUDACC__
#  pragma unroll
#else
#  pragma GCC unroll 7
#endif
  for (int round = 0; round < kRounds; ++round) {
    uint32_t h0, l0, h1, l1;
    product(0xD2511F53u, c0, h0, l0);
    product(0xCD9E8D57u, c2, h1, l1);
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Words{{c0, c1, c2, c3}};
}

// The word of element or cell `e` among the four of its group.
LRTT_HD uint32_t word_of(const Words& r, uint32_t e) {
  const uint32_t k = e & 3u;
  return k == 0 ? r.w[0] : k == 1 ? r.w[1] : k == 2 ? r.w[2] : r.w[3];
}

// ------------------------------------------------------------------ elementary functions without libm

// log2 t of a positive normal number, to 2.8e-7: the exponent, and our Chebyshev fit of a mantissa in [0.75, 1.5).
LRTT_HD float log2_(float t) {
  const uint32_t shifted = to_bits(t) - 0x3f400000u;
  const float exponent = float(int32_t(shifted) >> 23);
  const float v = from_bits((shifted & 0x007fffffu) + 0x3f400000u) - 1.0f;
  float l = -0.0961651281f;
  l = fma_(l, v, 0.204129755f);
  l = fma_(l, v, -0.250653386f);
  l = fma_(l, v, 0.290073574f);
  l = fma_(l, v, -0.360335201f);
  l = fma_(l, v, 0.480847508f);
  l = fma_(l, v, -0.72135067f);
  l = fma_(l, v, 1.44269526f);
  return fma_(l, v, exponent);
}

// exp(z) for |z| <= 87, to 1e-7 relative: 2^n times a polynomial, no libm.
LRTT_HD float exp_(float z) {
  const float n = float(int32_t(fma_(z, 1.44269504f, z < 0 ? -0.5f : 0.5f)));
  float f = fma_(n, -0.693359375f, z);
  f = fma_(n, 2.12194440e-4f, f);
  float p = 1.9875691500e-4f;  // Cephes expf (Moshier): minimax of (e^f - 1 - f)/f^2 on +-ln2/2
  p = fma_(p, f, 1.3981999507e-3f);
  p = fma_(p, f, 8.3334519073e-3f);
  p = fma_(p, f, 4.1665795894e-2f);
  p = fma_(p, f, 1.6666665459e-1f);
  p = fma_(p, f, 5.0000001201e-1f);
  p = fma_(p, f * f, f) + 1.0f;
  return p * from_bits(uint32_t(int32_t(n) + 127) << 23);
}

// x^g for 0 <= x, to about 1e-6 |g log2 x|; 0^g = 0.
LRTT_HD float pow_(float x, float g) {
  const float z = 0.693147181f * (g * log2_(max_(x, 1e-30f)));
  return x > 0.0f ? exp_(min_(max_(z, -80.0f), 80.0f)) : 0.0f;
}

// ------------------------------------------------------------------ a normal from one word

// z = Phi^-1 of a 32-bit uniform: the sign bit picks the side, the other 31 bits give the two-sided
// tail probability q in (0, 1). With t = q(2-q) = 1 - x^2, x = 1 - q, and w = -log2 t, z/x is smooth
// in w (the variable of Giles 2010, "Approximating the erfinv function"). The coefficients are
// our own Chebyshev fits: the centre (w < 7, 99.6% of words) to 1.5e-7, the tail in
// sqrt(w) to 2.2e-6, relative to z/x. |z| <= 6.34, the value at q = 2^-32.
LRTT_HD float normal(uint32_t word) {
  const float q = (float(int32_t(word & 0x7fffffffu)) + 0.5f) * 4.656612873077393e-10f;  // 2^-31
  const float x = 1.0f - q;
  const float t = q * (2.0f - q);
  const float w = max_(-log2_(t), 0.0f);
  const float c = w - 3.5f;
  float z = 2.16665996e-09f;
  z = fma_(z, c, 3.62964947e-08f);
  z = fma_(z, c, -5.79798211e-07f);
  z = fma_(z, c, -6.4612658e-07f);
  z = fma_(z, c, 7.17791045e-05f);
  z = fma_(z, c, -0.000620948733f);
  z = fma_(z, c, -0.00264456123f);
  z = fma_(z, c, 0.242356926f);
  z = fma_(z, c, 2.09747577f);
  const float s = sqrt_(w) - 4.0f;
  float tail = -6.67963614e-05f;
  tail = fma_(tail, s, 0.000357993646f);
  tail = fma_(tail, s, -0.000817806518f);
  tail = fma_(tail, s, 0.00131835067f);
  tail = fma_(tail, s, -0.00243593566f);
  tail = fma_(tail, s, 0.00445158454f);
  tail = fma_(tail, s, 1.18452847f);
  tail = fma_(tail, s, 4.47536278f);
  z = (w < 7.0f ? z : tail) * x;
  return from_bits(to_bits(z) ^ (word & 0x80000000u));
}

// A uniform in [0, 1) with 24 bits.
LRTT_HD float uniform(uint32_t word) { return float(int32_t(word >> 8)) * 5.9604644775390625e-08f; }

// ------------------------------------------------------------------ cycle-to-cycle noise

// Noise of one pulse from 13 bits: a sign and one of 4096 equally likely magnitudes of a normal, the middles of its
// strata scaled to unit variance. 8192 levels, |z| <= 3.84, kurtosis 2.995, distribution within 1.3e-4 of the normal's;
// a full normal for each of billions of pulses would cost more than all the rest of the simulation.
constexpr int kNoiseLevels = 4096;

LRTT_HD float noise_level(uint32_t i) { return 1.0000805f * normal((i << 19) | (1u << 18)); }

// Noise of the pulses that one cell gets in one block of samples, in their order: a linear congruential generator
// modulo 2^32 (multiplier of Steele & Vigna 2021, "Computationally easy, spectrally good multipliers"), whose start and
// increment are Philox words of the cell. Its upper 13 bits are a sign and a level. A block has at most 15872 pulses a
// cell, far below the period of the lowest bit used (2^20); a Philox call for every few pulses would cost a quarter of
// an update.
struct PulseNoise {
  uint32_t state, increment;
};

LRTT_HD PulseNoise pulse_noise(uint64_t key, uint32_t cell, uint32_t block, uint32_t step, uint32_t c3) {
  const Words r = philox(key, cell, block, step, c3);
  return PulseNoise{r.w[0], r.w[1] | 1u};
}

// The state of the next pulse: bit 31 is its sign, bits 19 to 30 its level.
LRTT_HD uint32_t advance(uint32_t state, uint32_t increment) { return state * 0xadb4a92du + increment; }

LRTT_HD float noise(const float* levels, uint32_t state) {
  return from_bits(to_bits(levels[(state >> 19) & (kNoiseLevels - 1)]) ^ (state & 0x80000000u));
}

// ------------------------------------------------------------------ probabilities on a grid

// 0 <= v < 2^23 to the nearest integer, halves to the even one (rint).
LRTT_HD float nearest_even(float v) {
  const int whole = int(v);
  const float rest = v - float(whole);
  return float(whole + (rest > 0.5f || (rest == 0.5f && (whole & 1)) ? 1 : 0));
}

// p as a multiple of res: the nearest one, or with `random` one of the two neighbours so that the mean is p (to 2^-24
// of a step). res = 0 leaves p as it is. What is above 2 is far above 1 on every grid (res <= 1) and need not be exact.
LRTT_HD float on_grid(float p, float res, bool random, uint32_t word) {
  if (!(res > 0.0f)) return p;
  const float steps = min_(p, 2.0f) / res;
  if (!random) return nearest_even(steps) * res;
  const int whole = int(steps);
  return float(whole + (uniform(word) < steps - float(whole) ? 1 : 0)) * res;
}

// ------------------------------------------------------------------ Bernoulli words

// A probability as a 32-bit threshold: a word u fires where u < threshold. p >= 1 fires but for one word of 2^32.
LRTT_HD uint32_t threshold(float p) {
#ifdef __CUDA_ARCH__
  return __float2uint_rz(p * 4294967296.0f);  // saturates
#else
  return p < 1.0f ? uint32_t(p * 4294967296.0f) : 0xffffffffu;
#endif
}

// Up to kDirectSlots slots take one 32-bit uniform each; longer trains are sampled bit-sliced: lane j
// of `undecided` compares its uniform with p one bit plane at a time, most significant first, and
// drops out at the first difference. A word of n lanes needs about log2(n) + 2 planes, 32 at most.
constexpr int kDirectSlots = 5;

LRTT_HD void bernoulli_plane(uint32_t plane, uint32_t random, uint32_t bits, uint32_t& undecided, uint32_t& fired) {
  const uint32_t p = 0u - ((bits >> (31u - plane)) & 1u);  // this bit of p, spread over the lanes
  fired |= undecided & p & ~random;
  undecided &= ~(p ^ random);
}

}  // namespace lrtt
