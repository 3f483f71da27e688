// See lanes.h. Compiled with LRTT_ISA set to the name of an instruction set. Nothing here may call a
// non-inlined function of another header: the linker could hand its wide-vector copy to a narrow machine.
#include "lanes.h"

#ifdef __BMI2__
#  include <immintrin.h>
#endif

namespace lrtt {
namespace {

uint32_t largest(const float* v, int64_t n, int64_t stride) {
  uint32_t top = 0;
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t b = magnitude_bits(v[i]);
      top = b > top ? b : top;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t b = magnitude_bits(v[i * stride]);
      top = b > top ? b : top;
    }
  }
  return top;
}

// The random numbers of stochastic rounding of sample s; only read where a side asks for them.
LRTT_HD void rounding_lanes(const PulseParams& pulse, const BlockPlan& plan, int s, bool is_x, int64_t e0, uint64_t key,
                            uint32_t step, uint32_t array, Lanes& out) {
  if (!pulse.sto_round) return;
  const uint32_t c1 = uint32_t(plan.first_sample + s) * 64u + (is_x ? 0u : 1u);
  random_lanes(key, uint32_t(e0 / 4), c1, step, counter3(kRound, array, 0), out);
}

// Lane l, word k of a chunk is element 4*l + k: one Philox call serves the four words of a lane. `any`: trains of any
// length, probabilities on a grid.
template <bool any>
LRTT_HD void generate_bits(const Operand& v, int64_t elements, int64_t e0, bool is_x, const PulseParams& pulse,
                           const BlockPlan& plan, uint64_t key, uint32_t step, uint32_t array, const Stream& out) {
  const int width = int(elements - e0 < kChunk ? elements - e0 : kChunk);
  for (int w = 0; w < plan.words; ++w) {
    memset(out.bits + w * out.ld + e0, 0, sizeof(uint32_t) * width);
    memset(out.neg + w * out.ld + e0, 0, sizeof(uint32_t) * width);
  }
  const uint32_t c3 = counter3(is_x ? kBitX : kBitD, array, 0);
  for (int s = 0; s < plan.samples; ++s) {
    const Train& t = plan.train[s];
    if (t.bl == 0) continue;
    const float scale = is_x ? t.sx : t.sd;
    const float* row = static_cast<const float*>(v.p) + int64_t(plan.row[s]) * v.ss + e0 * v.es;
    float value[kChunk] = {};
    for (int e = 0; e < width; ++e) value[e] = row[e * v.es];
    Lanes bits, sign, fired, random;
    if (any) rounding_lanes(pulse, plan, s, is_x, e0, key, step, array, random);
    for (int k = 0; k < 4; ++k) {
      for (int l = 0; l < kLanes; ++l) {
        const float f = value[4 * l + k];
        float chance = abs_(f) * scale;
        if (any) chance = on_grid(chance, is_x ? pulse.x_res : pulse.d_res, pulse.sto_round != 0, random[k][l]);
        bits[k][l] = threshold(chance);
        sign[k][l] = 0u - (to_bits(f) >> 31);
        fired[k][l] = 0;
      }
    }
    const uint32_t c1 = uint32_t(plan.first_sample + s) * 64u;
    const uint32_t group0 = uint32_t(e0 / 4);
    for (int begin = 0; begin < (any ? t.bl : 1); begin += 32) {  // the pieces of a long train
      const int bl = any && t.bl - begin > 32 ? 32 : t.bl - begin;
      const uint32_t piece = c3 + (any ? uint32_t(begin / 32) : 0u);
      const uint32_t slots = 0xffffffffu >> (32 - bl);
      if (any && begin > 0) memset(fired, 0, sizeof(fired));
      if (bl <= kDirectSlots) {
        for (int slot = 0; slot < bl; ++slot) {
          random_lanes(key, group0, c1 + uint32_t(slot), step, piece, random);
          for (int k = 0; k < 4; ++k)
            for (int l = 0; l < kLanes; ++l) fired[k][l] |= (random[k][l] < bits[k][l] ? 1u : 0u) << slot;
        }
      } else {
        Lanes undecided;
        for (int k = 0; k < 4; ++k)
          for (int l = 0; l < kLanes; ++l) undecided[k][l] = slots;
        for (uint32_t plane = 0; plane < 32; ++plane) {
          random_lanes(key, group0, c1 + plane, step, piece, random);
          uint32_t open = 0;
          for (int k = 0; k < 4; ++k)
            for (int l = 0; l < kLanes; ++l) {
              bernoulli_plane(plane, random[k][l], bits[k][l], undecided[k][l], fired[k][l]);
              open |= undecided[k][l];
            }
          if (open == 0) break;
        }
      }
      const int offset = s * plan.width + begin, word = offset / 32, shift = offset % 32;
      uint32_t* b0 = out.bits + word * out.ld + e0;
      uint32_t* n0 = out.neg + word * out.ld + e0;
      for (int e = 0; e < width; ++e) {
        const uint32_t f = fired[e & 3][e >> 2];
        const uint32_t g = f & sign[e & 3][e >> 2];
        b0[e] |= f << shift;
        n0[e] |= g << shift;
      }
    }
  }
}

// The drawn cells of a lane group, one array a number.
struct CellLanes {
  float b_max[kLanes], b_min[kLanes], s_up[kLanes], s_dn[kLanes], e0[kLanes], e1[kLanes], e2[kLanes];
};

// The bits of `from` at the set bits of `mask`, packed together.
LRTT_HD uint32_t extract(uint32_t from, uint32_t mask) {
#ifdef __BMI2__
  return _pext_u32(from, mask);
#else
  uint32_t out = 0, place = 1;
  for (; mask != 0; mask &= mask - 1, place <<= 1) out |= (from & mask & (0u - mask)) != 0 ? place : 0u;
  return out;
#endif
}

// Words whose pulses are queued before they are applied.
constexpr int kSegmentWords = 64;

// The pulses of a lane group in one segment: how many a cell gets, and their directions in order.
struct Directions {
  uint32_t count[kLanes];
  uint32_t up[kSegmentWords + 1][kLanes];  // bit i of word j: pulse 32*j + i goes up; one word of slack
};

struct NoiseTable {
  float level[kNoiseLevels];
  NoiseTable() {
    for (uint32_t i = 0; i < kNoiseLevels; ++i) level[i] = noise_level(i);
  }
};
const NoiseTable noise_table;

struct NoiseLanes {  // PulseNoise of each lane
  uint32_t state[kLanes], increment[kLanes];
};

// Everything after the bits: lanes of one `other` index.
template <class Device, int how, int planes>
LRTT_HD void step_lanes(const DeviceParams& p, const CellLanes (&c)[planes], const Directions& queue,
                        NoiseLanes& random, float (&w)[planes][kLanes], float* cut) {
  const bool noisy = p.dw_min_std > 0.0f;
  uint32_t most = 0;
  for (int l = 0; l < kLanes; ++l) most = queue.count[l] > most ? queue.count[l] : most;
  float xi[kLanes] = {};
  for (uint32_t n = 0; n < most; ++n) {
    if (noisy) {
      for (int l = 0; l < kLanes; ++l) {
        const uint32_t next = advance(random.state[l], random.increment[l]);
        random.state[l] = n < queue.count[l] ? next : random.state[l];
      }
      for (int l = 0; l < kLanes; ++l) xi[l] = noise(noise_table.level, random.state[l]);
    }
    const uint32_t* up = queue.up[n / 32];
    for (int l = 0; l < kLanes; ++l) {
      const float shake = p.dw_min_std * xi[l];
      const bool upwards = ((up[l] >> (n & 31)) & 1u) != 0;
      const int plane = how == kPair && !upwards ? planes - 1 : 0;  // of a pair, the cell that takes the pulse, upwards
      const CellLanes& k = c[plane];
      const Cell one_cell{k.b_max[l], k.b_min[l], k.s_up[l], k.s_dn[l], k.e0[l], k.e1[l], k.e2[l]};
      float over = 0.0f;
      const float next = pulse<Device>(p, one_cell, w[plane][l], how == kPair || upwards, shake, over);
      const bool active = n < queue.count[l];
      w[plane][l] = active ? next : w[plane][l];
      cut[l] += active ? over : 0.0f;
    }
  }
}

// Where a lane group stands in the streams: elements lane0 .. lane0 + width - 1 of one side against element `other`.
struct Group {
  const Stream &lanes, &one;
  int64_t lane0, other;
  int width;
  bool lanes_are_x;
  uint32_t down_flip;
};

#include "burst_lanes.h"
#include "counted_lanes.h"

void generate(const Operand& v, int64_t elements, int64_t e0, bool is_x, const PulseParams& pulse,
              const BlockPlan& plan, uint64_t key, uint32_t step, uint32_t array, const Stream& out) {
  switch (form_of(pulse)) {
    case kShortBits: generate_bits<false>(v, elements, e0, is_x, pulse, plan, key, step, array, out); break;
    case kAnyBits: generate_bits<true>(v, elements, e0, is_x, pulse, plan, key, step, array, out); break;
    default: generate_values(v, elements, e0, is_x, pulse, plan, key, step, array, out); break;
  }
}

// A block pulse by pulse, on the cells of a lane group; returns the number of pulses.
template <class Device, int how, int planes>
LRTT_HD int64_t run_pulses(const DeviceParams& p, const PulseParams& pulse, const BlockPlan& plan, const Group& at,
                           const CellLanes (&c)[planes], NoiseLanes& random, float (&w)[planes][kLanes], float* cut,
                           uint32_t* touched) {
  const bool counted = form_of(pulse) == kCounted;
  int64_t pulses = 0;
  Directions queue{};
  for (int begin = 0; begin < plan.words; begin += kSegmentWords) {
    const int end = plan.words - begin < kSegmentWords ? plan.words : begin + kSegmentWords;
    uint64_t held[kLanes] = {};  // directions not yet written to the queue
    for (int l = 0; l < kLanes; ++l) queue.count[l] = 0;
    if (counted) queue_counts(pulse, plan, begin, end, at, held, queue);
    for (int word = begin; word < (counted ? begin : end); ++word) {
      const uint32_t ob = at.one.bits[word * at.one.ld + at.other];
      if (ob == 0) continue;
      const uint32_t on = at.one.neg[word * at.one.ld + at.other] ^ at.down_flip;
      const uint32_t* lb = at.lanes.bits + word * at.lanes.ld + at.lane0;
      const uint32_t* ln = at.lanes.neg + word * at.lanes.ld + at.lane0;
      for (int l = 0; l < at.width; ++l) {
        const uint32_t m = lb[l] & ob;
        if (m == 0) continue;
        const uint32_t have = queue.count[l], next = have + uint32_t(popcount_(m));
        held[l] |= uint64_t(extract(ln[l] ^ on, m)) << (have & 31);  // x*d negative: an up pulse
        if ((have ^ next) & ~31u) {
          queue.up[have / 32][l] = uint32_t(held[l]);
          held[l] >>= 32;
        }
        queue.count[l] = next;
      }
    }
    for (int l = 0; l < kLanes; ++l) {
      pulses += queue.count[l];
      queue.up[queue.count[l] / 32][l] = uint32_t(held[l]);
      if (how != kPlain) touched[l] |= queue.count[l];
    }
    step_lanes<Device, how>(p, c, queue, random, w, cut);
  }
  return pulses;
}

template <class Device, int how>
LRTT_HD int64_t run(const PulseJob& job, const BlockPlan& plan, int64_t lane0, int64_t other, const Stream& x,
                    const Stream& d, int64_t* lost) {
  const bool along_columns = job.n >= job.m;
  const int64_t longer = along_columns ? job.n : job.m;
  const int width = int(longer - lane0 < kLanes ? longer - lane0 : kLanes);
  const uint64_t key = uint64_t(job.state[kKey]);
  const uint32_t step = uint32_t(job.state[kStep]);
  const uint32_t c3 = counter3(kNoise, uint32_t(job.array), 0);
  const DeviceParams& p = job.device;
  const int64_t first = along_columns ? other * job.n + lane0 : lane0 * job.n + other;
  const int64_t stride = along_columns ? 1 : job.n;
  const Stream& lanes = along_columns ? x : d;
  const Stream& one = along_columns ? d : x;
  const uint32_t down_flip = plan.eta_sign < 0 ? 0xffffffffu : 0u;

  constexpr int planes = how == kPair ? 2 : 1;
  float* const source = how == kPlain ? job.w : job.cells;
  const int64_t size = int64_t(job.m) * job.n;
  float w[planes][kLanes] = {}, cut[kLanes] = {};
  uint32_t cell[kLanes], touched[kLanes] = {};
  CellLanes c[planes];
  for (int l = 0; l < kLanes; ++l) cell[l] = uint32_t(first + l * stride);
  for (int plane = 0; plane < planes; ++plane) {
    for (int l = 0; l < width; ++l) w[plane][l] = source[plane * size + first + l * stride] + 0.0f;  // no negative zero
    for (int l = 0; l < kLanes; ++l) {
      const Cell drawn = draw_cell<Device>(p, key, uint32_t(job.array) + uint32_t(plane * kMinus), cell[l]);
      c[plane].b_max[l] = drawn.b_max;
      c[plane].b_min[l] = drawn.b_min;
      c[plane].s_up[l] = drawn.s_up;
      c[plane].s_dn[l] = drawn.s_dn;
      c[plane].e0[l] = drawn.e0;
      c[plane].e1[l] = drawn.e1;
      c[plane].e2[l] = drawn.e2;
    }
  }
  const uint32_t number = uint32_t(plan.first_sample / block_samples(job.pulse));  // of this block
  NoiseLanes random{};
  if (p.dw_min_std > 0.0f && plan.words > 0)
    for (int l = 0; l < kLanes; ++l) {
      const PulseNoise start = pulse_noise(key, cell[l], number, step, c3);
      random.state[l] = start.state;
      random.increment[l] = start.increment;
    }
  const Group at{lanes, one, lane0, other, width, along_columns, down_flip};
  int64_t pulses;
  if (takes_bursts<Device>(p) && burst_width(plan.width)) {
    pulses = run_bursts<Device, how>(p, job.pulse, plan, at, c, random, w, cut, touched);
  } else {
    pulses = run_pulses<Device, how>(p, job.pulse, plan, at, c, random, w, cut, touched);
  }
  for (int l = 0; l < width; ++l) {
    const int64_t i = first + l * stride;
    for (int plane = 0; plane < planes; ++plane) source[plane * size + i] = w[plane][l];
    if (how == kNoisy && touched[l])
      job.w[i] = shown(p, CellId{key, uint32_t(job.array), cell[l]}, w[0][l], kByPulses, number, step);
    if (how == kPair && touched[l]) job.w[i] = w[0][l] - w[planes - 1][l];
    *lost += int64_t(double(cut[l]) * kFixedPoint + 0.5);
  }
  return pulses;
}

int64_t pulses(const PulseJob& job, const BlockPlan& plan, int64_t lane0, int64_t other, const Stream& x,
               const Stream& d, int64_t* lost) {
  int64_t count = 0;
  with_device(int(job.device.kind), [&](auto device) __attribute__((always_inline)) {
    switch (hold(job.device)) {
      case kNoisy: count = run<decltype(device), kNoisy>(job, plan, lane0, other, x, d, lost); break;
      case kPair: count = run<decltype(device), kPair>(job, plan, lane0, other, x, d, lost); break;
      default: count = run<decltype(device), kPlain>(job, plan, lane0, other, x, d, lost);
    }
  });
  return count;
}

}  // namespace

#define LRTT_CAT_(a, b) a##b
#define LRTT_CAT(a, b) LRTT_CAT_(a, b)
#define LRTT_STR_(a) #a
#define LRTT_STR(a) LRTT_STR_(a)

extern const LaneKernels LRTT_CAT(lane_kernels_, LRTT_ISA);
const LaneKernels LRTT_CAT(lane_kernels_, LRTT_ISA) = {LRTT_STR(LRTT_ISA), largest, generate, pulses};

}  // namespace lrtt
