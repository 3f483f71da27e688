// The converters of io.h on one sample. Compiled with LRTT_ISA set to the name of an instruction set, like lanes.cpp
// and under its rule: nothing here may call a non-inlined function of another header.
#include "lanes.h"

namespace lrtt {
namespace {

// `each(e, lane)` for every element, the lanes of one row next to each other.
template <class Each>
LRTT_HD void over_lanes(int64_t n, Each each) {
  int64_t e = 0;
  for (; e + kReadLanes <= n; e += kReadLanes)
    for (int l = 0; l < kReadLanes; ++l) each(e + l, l);
  for (int l = 0; e + l < n; ++l) each(e + l, l);
}

LRTT_HD void normals(const ReadId& id, ReadStage stage, uint32_t group0, float (&out)[kReadGroup]) {
  Lanes words;
  random_lanes(id.key, group0, id.sample, id.ticket, id.c3(stage), words);
  for (int k = 0; k < 4; ++k)
    for (int l = 0; l < kLanes; ++l) out[kLanes * k + l] = normal(words[k][l]);
}

LRTT_HD void dithers(const ReadId& id, ReadStage stage, uint32_t group0, float (&out)[kReadGroup]) {
  Lanes words;
  random_lanes(id.key, group0, id.sample, id.ticket, id.c3(stage), words);
  for (int k = 0; k < 4; ++k)
    for (int l = 0; l < kLanes; ++l) out[kLanes * k + l] = uniform(words[k][l]) - 0.5f;
}

void input(const IoNumbers& numbers, const float* x, int64_t n, const ReadId& id, float* u, float* alpha_out,
           float* sigma) {
  const IoNumbers io = numbers;  // a copy: u could overlap the original, for all the compiler knows
  uint32_t largest = 0;
  if (io.management == float(kAbsMax))
    for (int64_t e = 0; e < n; ++e) {
      const uint32_t b = magnitude_bits(x[e]);
      largest = b > largest ? b : largest;
    }
  double sum = 0.0;
  if (io.worst_case != 0.0f && id.round > 0) {
    double up[kReadLanes] = {}, down[kReadLanes] = {};
    over_lanes(n, [&](int64_t e, int l) __attribute__((always_inline)) {
      up[l] += double(max_(x[e], 0.0f));
      down[l] += double(max_(-x[e], 0.0f));
    });
    const double positive = tree_sum<kReadLanes>(up), negative = tree_sum<kReadLanes>(down);
    sum = positive > negative ? positive : negative;
  }
  const float alpha = read_scale(io, largest, sum, id.round);
  const bool noisy = io.inp_noise != 0.0f && alpha != 0.0f, dithered = io.inp_round == float(kStochastic);
  if (!noisy && !dithered) {
    for (int64_t e = 0; e < n; ++e) u[e] = dac(io, x[e], alpha, 0.0f);
  } else {
    for (int64_t e = 0; e < n; e += kReadGroup) {
      const int width = int(n - e < kReadGroup ? n - e : kReadGroup);
      float value[kReadGroup] = {}, xi[kReadGroup] = {}, dither[kReadGroup] = {};
      memcpy(value, x + e, sizeof(float) * size_t(width));
      if (dithered) dithers(id, kInputRounding, read_group(uint32_t(e)), dither);
      if (noisy) normals(id, kInputNoise, read_group(uint32_t(e)), xi);
      for (int i = 0; i < kReadGroup; ++i)
        value[i] = fma_(noisy ? io.inp_noise : 0.0f, xi[i], dac(io, value[i], alpha, dither[i]));
      memcpy(u + e, value, sizeof(float) * size_t(width));
    }
  }
  *alpha_out = alpha;
  *sigma = io.out_noise;
  if (io.w_noise != 0.0f) {
    double squares[kReadLanes] = {};
    over_lanes(n, [&](int64_t e, int l) __attribute__((always_inline)) { squares[l] += double(u[e]) * double(u[e]); });
    *sigma = read_sigma(io, tree_sum<kReadLanes>(squares));
  }
}

bool output(const IoNumbers& numbers, const float* acc, int64_t n, const ReadId& id, float alpha, float sigma,
            float* y) {
  const IoNumbers io = numbers;
  const bool noisy = sigma != 0.0f && alpha != 0.0f, dithered = io.out_round == float(kStochastic);
  uint32_t any = 0;
  for (int64_t e = 0; e < n; e += kReadGroup) {
    const int width = int(n - e < kReadGroup ? n - e : kReadGroup);
    float value[kReadGroup] = {}, xi[kReadGroup] = {}, dither[kReadGroup] = {};
    memcpy(value, acc + e, sizeof(float) * size_t(width));
    if (noisy) normals(id, kOutputNoise, read_group(uint32_t(e)), xi);
    if (dithered) dithers(id, kOutputRounding, read_group(uint32_t(e)), dither);
    uint32_t clipped[kReadGroup];
    for (int i = 0; i < kReadGroup; ++i) {
      bool over;
      value[i] = adc(io, value[i], alpha, noisy ? sigma : 0.0f, xi[i], dither[i], over);
      clipped[i] = over ? 1u : 0u;
    }
    for (int i = 0; i < width; ++i) any |= clipped[i];
    memcpy(y + e, value, sizeof(float) * size_t(width));
  }
  return any != 0;
}

}  // namespace

#define LRTT_CAT_(a, b) a##b
#define LRTT_CAT(a, b) LRTT_CAT_(a, b)
#define LRTT_STR_(a) #a
#define LRTT_STR(a) LRTT_STR_(a)

extern const IoKernels LRTT_CAT(io_kernels_, LRTT_ISA);
const IoKernels LRTT_CAT(io_kernels_, LRTT_ISA) = {LRTT_STR(LRTT_ISA), input, output};

}  // namespace lrtt
