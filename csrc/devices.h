// Device models: what a cell is and what a pulse does to it, compiled for the host and for the device.
//
// Models and their parameters follow aihwkit's pulsed devices (docs/devices.md has the formulas); a new model is one
// struct here, one line in DeviceKind and one in with_device.
#pragma once

#include "math.h"

namespace lrtt {

// Nodes of a PiecewiseStep.
#define LRTT_NODES(F, name)                                                                                     \
  F(name##_0)                                                                                                   \
  F(name##_1)                                                                                                   \
  F(name##_2)                                                                                                   \
  F(name##_3) F(name##_4) F(name##_5) F(name##_6) F(name##_7) F(name##_8) F(name##_9) F(name##_10) F(name##_11) \
      F(name##_12) F(name##_13) F(name##_14) F(name##_15)

// Every number of a device model. The Python side fills it by name through layout(), so a field added here needs no
// second list.
#define LRTT_DEVICE_FIELDS(F)                                                                                         \
  F(kind)                                                                                                             \
  F(granularity)                                                                                                      \
  F(dw_min)                                                                                                           \
  F(dw_min_dtod) F(dw_min_dtod_log_normal) F(dw_min_std) F(up_down) F(up_down_dtod) F(w_max) F(w_min) F(w_max_dtod)   \
      F(w_min_dtod) F(enforce_consistency) F(corrupt_devices_prob) F(corrupt_devices_range) F(mult_noise) F(gamma_up) \
          F(gamma_down) F(gamma_up_dtod) F(gamma_down_dtod) F(mean_bound_reference) F(allow_increasing_slope)         \
              F(slope_up_dtod) F(slope_down_dtod) F(reference_mean) F(reference_std) F(subtract_symmetry_point)       \
                  F(A_up) F(A_down) F(a) F(b) F(pow_gamma) F(pow_gamma_dtod) F(pow_up_down) F(pow_up_down_dtod)       \
                      F(lifetime) F(lifetime_dtod) F(reset) F(reset_dtod) F(reset_std) F(diffusion) F(diffusion_dtod) \
                          F(write_noise_std) F(apply_write_noise_on_set) F(pair) F(refresh_every)                     \
                              F(refresh_upper_thres) F(refresh_lower_thres) F(refresh_max_pulses) F(sections)         \
                                  LRTT_NODES(F, piecewise_up) LRTT_NODES(F, piecewise_down)

struct DeviceParams {
#define LRTT_FIELD(name) float name;
  LRTT_DEVICE_FIELDS(LRTT_FIELD)
#undef LRTT_FIELD
};

enum DeviceKind : int {
  kIdealFloat = 0,
  kConstantStep = 1,
  kLinearStep = 2,
  kSoftBounds = 3,
  kSoftBoundsReference = 4,
  kExpStep = 5,
  kPowStep = 6,
  kPowStepReference = 7,
  kPiecewiseStep = 8,
};

// What a cell holds beside the weight that is read. kNoisy: its persistent weight. kPair: two conductances, planes 0
// and 1, whose difference is read; the second cell is drawn as one of array + kMinus.
enum Hold : int { kPlain = 0, kNoisy = 1, kPair = 2 };

LRTT_HD int hold(const DeviceParams& p) { return p.pair != 0.0f ? kPair : p.write_noise_std > 0.0f ? kNoisy : kPlain; }

// One device, drawn. Extra numbers of a model go into e0, e1, e2.
struct Cell {
  float b_max, b_min;  // bounds of the weight
  float s_up, s_dn;    // step sizes, both positive: an up pulse adds s_up, a down pulse subtracts s_dn
  float e0, e1, e2;
};

constexpr int kCellNumbers = sizeof(Cell) / sizeof(float);

// Names a cell; its words are the random numbers it is drawn from.
struct CellId {
  uint64_t key;
  uint32_t array, cell;
  LRTT_HD Words words(uint32_t block) const { return philox(key, cell, block, 0, counter3(kDraw, array, 0)); }
};

// The part of a draw that all models share: bounds, gain, asymmetry, from block 0. Blocks 1 and 2 are the model's own,
// but for the last two words of block 1, the corruption draw.
LRTT_HD Cell draw_pulsed(const DeviceParams& p, const Words& n0) {
  Cell c;
  c.b_max = p.w_max * fma_(p.w_max_dtod, normal(n0.w[0]), 1.0f);
  c.b_min = p.w_min * fma_(p.w_min_dtod, normal(n0.w[1]), 1.0f);
  const float xi = normal(n0.w[2]);
  const float gain = p.dw_min_dtod_log_normal != 0.0f ? exp_(min_(max_(p.dw_min_dtod * xi, -60.0f), 60.0f))
                                                      : fma_(p.dw_min_dtod, xi, 1.0f);
  const float rho = p.up_down_dtod * normal(n0.w[3]);
  c.s_up = ((min_(p.up_down, 0.0f) + gain) + rho) * p.dw_min;
  c.s_dn = ((gain - max_(p.up_down, 0.0f)) - rho) * p.dw_min;
  if (p.enforce_consistency != 0.0f) {
    c.s_up = abs_(c.s_up);
    c.s_dn = abs_(c.s_dn);
    const float hi = max_(c.b_max, c.b_min), lo = min_(c.b_max, c.b_min);
    c.b_max = abs_(hi);
    c.b_min = 0.0f - abs_(lo);     // no negative zero: see into_bounds
  } else if (c.b_min > c.b_max) {  // an empty range: the cell is held at its middle
    c.b_max = c.b_max + (c.b_min - c.b_max) * 0.5f;
    c.b_min = c.b_max;
  }
  c.e0 = c.e1 = c.e2 = 0.0f;
  return c;
}

// A stuck cell holds one value of its range and takes no step.
LRTT_HD void corrupt(const DeviceParams& p, const Words& n1, Cell& c) {
  const bool stuck = uniform(n1.w[2]) < p.corrupt_devices_prob;
  const float lo = max_(c.b_min, -p.corrupt_devices_range);
  const float hi = min_(c.b_max, p.corrupt_devices_range);
  const float value = fma_(hi - lo, uniform(n1.w[3]), lo);
  c.b_max = stuck ? value : c.b_max;
  c.b_min = stuck ? value : c.b_min;
  c.s_up = stuck ? 0.0f : c.s_up;
  c.s_dn = stuck ? 0.0f : c.s_dn;
}

// A device model is a struct with `derive`, which fills the cell's own numbers, and `strength`, the change of w by one
// pulse with cycle-to-cycle noise sigma*xi, in units of the cell's step s (s_up, or -s_dn). The step itself and
// clipping to the cell's bounds are common.

// w += s (1 + sigma xi)
struct ConstantStep {
  LRTT_HD static void derive(const DeviceParams&, const CellId&, Cell&) {}
  LRTT_HD static float strength(const DeviceParams&, const Cell&, float, bool, float noise) { return 1.0f + noise; }
};

// w += s (1 - Gamma w / w_ref)(1 + sigma xi), or with additive noise s (1 - Gamma w / w_ref + sigma xi).
// e0 = Gamma_up / w_ref+, e1 = Gamma_down / w_ref-.
struct LinearStep {
  LRTT_HD static void derive(const DeviceParams& p, const CellId& id, Cell& c) {
    const Words n1 = id.words(1);
    float up = fma_(p.gamma_up_dtod, normal(n1.w[0]), p.gamma_up);
    float dn = fma_(p.gamma_down_dtod, normal(n1.w[1]), p.gamma_down);
    up = p.allow_increasing_slope != 0.0f ? up : abs_(up);
    dn = p.allow_increasing_slope != 0.0f ? dn : abs_(dn);
    const float ref_up = p.mean_bound_reference != 0.0f ? p.w_max : c.b_max;
    const float ref_dn = p.mean_bound_reference != 0.0f ? p.w_min : c.b_min;
    c.e0 = ref_up != 0.0f ? up / ref_up : 0.0f;
    c.e1 = ref_dn != 0.0f ? dn / ref_dn : 0.0f;
  }
  LRTT_HD static float strength(const DeviceParams& p, const Cell& c, float w, bool up, float noise) {
    const float slope = fma_(up ? c.e0 : c.e1, -w, 1.0f);
    return fma_(fma_(p.mult_noise, slope, 1.0f - p.mult_noise), noise, slope);  // mult_noise is 0 or 1
  }
};

// LinearStep with Gamma = 1 and the cell's own bounds as reference.
struct SoftBounds {
  LRTT_HD static void derive(const DeviceParams&, const CellId&, Cell& c) {
    c.e0 = c.b_max != 0.0f ? 1.0f / c.b_max : 0.0f;
    c.e1 = c.b_min != 0.0f ? 1.0f / c.b_min : 0.0f;
  }
  LRTT_HD static float strength(const DeviceParams& p, const Cell& c, float w, bool up, float noise) {
    return LinearStep::strength(p, c, w, up, noise);
  }
};

// Shifts a cell by its reference device: the pulsed state is v = w + e2, bounds and steps belong to v.
LRTT_HD void subtract_reference(float reference, Cell& c) {
  c.e2 = reference;
  c.b_max = c.b_max - reference;
  c.b_min = c.b_min - reference;
}

// SoftBounds in v = w + reference, whose slopes vary on their own and whose reference may sit at the symmetry point.
struct SoftBoundsReference {
  LRTT_HD static void derive(const DeviceParams& p, const CellId& id, Cell& c) {
    const Words n1 = id.words(1), n2 = id.words(2);
    const bool consistent = c.b_max > 0.0f && c.b_min < 0.0f;
    // A slope that is steeper by a factor means a bound that is nearer by it.
    const float up = abs_(fma_(p.slope_up_dtod, normal(n1.w[0]), 1.0f));
    const float dn = abs_(fma_(p.slope_down_dtod, normal(n1.w[1]), 1.0f));
    c.b_max = consistent && up > 0.0f ? c.b_max / up : c.b_max;
    c.b_min = consistent && dn > 0.0f ? c.b_min / dn : c.b_min;
    SoftBounds::derive(p, id, c);
    c.e0 = max_(c.e0, 0.0f);  // a bound on the wrong side of 0 softens nothing
    c.e1 = min_(c.e1, 0.0f);
    const float slopes = fma_(c.s_up, c.e0, -(c.s_dn * c.e1));
    const bool centred = p.subtract_symmetry_point != 0.0f && consistent && slopes > 0.0f;
    const float point = centred ? (c.s_up - c.s_dn) / slopes : 0.0f;
    subtract_reference(fma_(p.reference_std, normal(n2.w[0]), p.reference_mean) + point, c);
  }
  LRTT_HD static float strength(const DeviceParams& p, const Cell& c, float w, bool up, float noise) {
    return LinearStep::strength(p, c, w + c.e2, up, noise);
  }
};

// With z = 2 a w / (b_max - b_min) + b: w += max(1 - A_up exp(gamma_up z), 0) s_up (1 + sigma xi), and down with
// -gamma_down. e0 = 2 a / (b_max - b_min).
struct ExpStep {
  LRTT_HD static void derive(const DeviceParams& p, const CellId&, Cell& c) {
    const float range = c.b_max - c.b_min;
    c.e0 = range > 0.0f ? 2.0f * p.a / range : 0.0f;
    c.s_up = range > 0.0f ? c.s_up : 0.0f;
    c.s_dn = range > 0.0f ? c.s_dn : 0.0f;
  }
  LRTT_HD static float strength(const DeviceParams& p, const Cell& c, float w, bool up, float noise) {
    const float z = fma_(c.e0, w, p.b);
    const float power = up ? p.gamma_up * z : -(p.gamma_down * z);
    const float amplitude = up ? p.A_up : p.A_down;
    const float y = max_(1.0f - amplitude * exp_(min_(max_(power, -80.0f), 80.0f)), 0.0f);
    return y * (1.0f + noise);
  }
};

// w += s_up ((b_max - w) / R)^gamma_up (1 + sigma xi), R = b_max - b_min; down ((w - b_min) / R)^gamma_down.
// e0, e1 = the cell's gamma_up, gamma_down.
struct PowStep {
  LRTT_HD static void derive(const DeviceParams& p, const CellId& id, Cell& c) {
    const Words n1 = id.words(1);
    const float gain = fma_(p.pow_gamma_dtod, normal(n1.w[0]), 1.0f), rho = p.pow_up_down_dtod * normal(n1.w[1]);
    c.e0 = ((min_(p.pow_up_down, 0.0f) + gain) + rho) * p.pow_gamma;
    c.e1 = ((gain - max_(p.pow_up_down, 0.0f)) - rho) * p.pow_gamma;
    if (p.enforce_consistency != 0.0f) {
      c.e0 = abs_(c.e0);
      c.e1 = abs_(c.e1);
    }
  }
  LRTT_HD static float strength(const DeviceParams&, const Cell& c, float w, bool up, float noise) {
    const float range = c.b_max - c.b_min;
    const float room = up ? c.b_max - w : w - c.b_min;
    const float share = range > 0.0f ? room / range : 0.0f;
    return pow_(share, up ? c.e0 : c.e1) * (1.0f + noise);
  }
};

// PowStep in v = w + reference; the shift leaves b_max - w and w - b_min as they are.
struct PowStepReference {
  LRTT_HD static void derive(const DeviceParams& p, const CellId& id, Cell& c) {
    PowStep::derive(p, id, c);
    subtract_reference(fma_(p.reference_std, normal(id.words(2).w[0]), p.reference_mean), c);
  }
  LRTT_HD static float strength(const DeviceParams& p, const Cell& c, float w, bool up, float noise) {
    return PowStep::strength(p, c, w, up, noise);
  }
};

// s times the linear interpolation of `sections` + 1 nodes over [b_min, b_max]. e0 = sections / (b_max - b_min).
struct PiecewiseStep {
  LRTT_HD static void derive(const DeviceParams& p, const CellId&, Cell& c) {
    const float range = c.b_max - c.b_min;
    c.e0 = range > 0.0f ? p.sections / range : 0.0f;
  }
  LRTT_HD static float strength(const DeviceParams& p, const Cell& c, float w, bool up, float noise) {
    const float* node = up ? &p.piecewise_up_0 : &p.piecewise_down_0;
    const float place = max_((w - c.b_min) * c.e0, 0.0f);
    const float last = max_(p.sections - 1.0f, 0.0f);
    const int left = int(min_(place, last));
    const float t = min_(place - float(left), 1.0f);
    const float height = fma_(t, node[left + 1] - node[left], node[left]);
    return height * (1.0f + noise);
  }
};

// Calls f with the model of `kind`, as a value whose type is the struct: the one list of models.
#ifdef __CUDACC__
#  pragma nv_exec_check_disable
#endif
template <class F>
LRTT_HD void with_device(int kind, F&& f) {
  switch (kind) {
    case kConstantStep: f(ConstantStep{}); break;
    case kLinearStep: f(LinearStep{}); break;
    case kSoftBounds: f(SoftBounds{}); break;
    case kSoftBoundsReference: f(SoftBoundsReference{}); break;
    case kExpStep: f(ExpStep{}); break;
    case kPowStep: f(PowStep{}); break;
    case kPowStepReference: f(PowStepReference{}); break;
    case kPiecewiseStep: f(PiecewiseStep{}); break;
    default: break;
  }
}

template <class Device>
LRTT_HD Cell draw_cell(const DeviceParams& p, uint64_t key, uint32_t array, uint32_t cell) {
  const CellId id{key, array, cell};
  Cell c = draw_pulsed(p, id.words(0));
  if (p.corrupt_devices_prob > 0.0f) corrupt(p, id.words(1), c);
  Device::derive(p, id, c);
  return c;
}

// For w and bounds that are no negative zeros: so a GPU's minimum, which orders zeros, agrees with a CPU's, which does
// not.
LRTT_HD float clamp(const Cell& c, float w) {
#ifdef __CUDA_ARCH__
  return fmaxf(fminf(w, c.b_max), c.b_min);
#else
  return max_(min_(w, c.b_max), c.b_min);
#endif
}

LRTT_HD float into_bounds(const Cell& c, float w) { return clamp(c, w + 0.0f); }

// `w` is no negative zero, and so neither is what it becomes.
template <class Device>
LRTT_HD float pulse(const DeviceParams& p, const Cell& c, float w, bool up, float noise, float& lost) {
  const float moved = fma_(up ? c.s_up : -c.s_dn, Device::strength(p, c, w, up, noise), w);
  const float kept = clamp(c, moved);
  lost += abs_(moved - kept);
  return kept;
}

// Once per optimizer step: decay towards the cell's reset value, w <- (w - b)(1 - 1/lifetime) + b, and diffusion,
// w += |rate| xi. Block 3 of the cell's words draws its lifetime, reset value and rate.
LRTT_HD float relax(const DeviceParams& p, const Cell& c, const CellId& id, float w, uint32_t step) {
  const Words n3 = id.words(3);
  if (p.lifetime > 0.0f) {
    const float lifetime = p.lifetime * fma_(p.lifetime_dtod, normal(n3.w[0]), 1.0f);
    const float keep = lifetime > 1.0f ? 1.0f - 1.0f / lifetime : 0.0f;
    const float target = fma_(p.reset_dtod, normal(n3.w[1]), p.reset);
    w = into_bounds(c, fma_(w - target, keep, target));
  }
  if (p.diffusion > 0.0f) {
    const float rate = abs_(p.diffusion * fma_(p.diffusion_dtod, normal(n3.w[2]), 1.0f));
    const Words r = philox(id.key, id.cell / 4, 0, step, counter3(kDiffusion, id.array, 0));
    w = into_bounds(c, fma_(rate, normal(word_of(r, id.cell)), w));
  }
  return w;
}

// ------------------------------------------------------------------ writing a cell otherwise than by an update's
// pulses

// What writes a cell, part of the key of its write noise.
enum WriteEvent : uint32_t { kByPulses = 0, kByRelax = 1, kByReinit = 2, kBySet = 3, kByTransfer = 4, kByReset = 5 };

// What a read shows of a cell that holds w, from the write named by (event, c1, c2) until the next.
LRTT_HD float shown(const DeviceParams& p, const CellId& id, float w, WriteEvent event, uint32_t c1, uint32_t c2) {
  const Words r = philox(id.key, id.cell / 4, c1, c2, counter3(kWriteNoise, id.array, event));
  return fma_(p.write_noise_std * p.dw_min, normal(word_of(r, id.cell)), w);
}

// An array in memory: w[size] is what is read, cells[planes, size] what the cells hold (null where that is w).
struct Held {
  float *w, *cells;
  int64_t size;
};

LRTT_HD CellId minus_of(const CellId& id) { return CellId{id.key, id.array + kMinus, id.cell}; }

template <class Device>
LRTT_HD Cell draw_cell(const DeviceParams& p, const CellId& id) {
  return draw_cell<Device>(p, id.key, id.array, id.cell);
}

// Programs the cell to `target`, as well as its bounds allow.
template <class Device>
LRTT_HD void set_cell(const DeviceParams& p, const CellId& id, const Held& h, float target, WriteEvent event,
                      uint32_t c2) {
  const int64_t i = id.cell;
  const Cell c = draw_cell<Device>(p, id);
  if (hold(p) == kPair) {
    const Cell m = draw_cell<Device>(p, minus_of(id));
    h.cells[i] = into_bounds(c, max_(target, 0.0f));
    h.cells[h.size + i] = into_bounds(m, max_(-target, 0.0f));
    h.w[i] = h.cells[i] - h.cells[h.size + i];
  } else {
    const float kept = into_bounds(c, target);
    h.w[i] = kept;
    if (h.cells != nullptr) {
      h.cells[i] = kept;
      if (p.apply_write_noise_on_set != 0.0f) h.w[i] = shown(p, id, kept, event, 0, c2);
    }
  }
}

// Whether the cell stands at a bound; `target`: whether it would if w were written.
template <class Device>
LRTT_HD bool at_bound(const DeviceParams& p, const CellId& id, const Held& h, bool target) {
  const int64_t i = id.cell;
  const Cell c = draw_cell<Device>(p, id);
  if (hold(p) == kPair) {
    const Cell m = draw_cell<Device>(p, minus_of(id));
    const float plus = target ? max_(h.w[i], 0.0f) : h.cells[i];
    const float minus = target ? max_(-h.w[i], 0.0f) : h.cells[h.size + i];
    return plus >= c.b_max || minus >= m.b_max;
  }
  const float w = target || h.cells == nullptr ? h.w[i] : h.cells[i];
  return w >= c.b_max || w <= c.b_min;
}

// The weight after a reset: the cell's reset value with cycle-to-cycle noise.
LRTT_HD float reset_value(const DeviceParams& p, const Cell& c, const CellId& id, uint32_t word) {
  const float target = fma_(p.reset_dtod, normal(id.words(3).w[1]), p.reset);
  return into_bounds(c, fma_(p.reset_std, normal(word), target));
}

// Resets the cell with probability `share`, each cell of a pair on its own.
template <class Device>
LRTT_HD void reset_cell(const DeviceParams& p, const CellId& id, const Held& h, float share, uint32_t number,
                        uint32_t step) {
  const int64_t i = id.cell;
  const Words r = philox(id.key, id.cell, number, step, counter3(kReset, id.array, 0));
  const bool hit = uniform(r.w[1]) < share;
  if (hold(p) == kPair) {
    const CellId other = minus_of(id);
    const Words s = philox(id.key, id.cell, number, step, counter3(kReset, other.array, 0));
    if (hit) h.cells[i] = reset_value(p, draw_cell<Device>(p, id), id, r.w[0]);
    if (uniform(s.w[1]) < share) h.cells[h.size + i] = reset_value(p, draw_cell<Device>(p, other), other, s.w[0]);
    h.w[i] = h.cells[i] - h.cells[h.size + i];
  } else if (hit) {
    const float w = reset_value(p, draw_cell<Device>(p, id), id, r.w[0]);
    h.w[i] = w;
    if (h.cells != nullptr) {
      h.cells[i] = w;
      h.w[i] = shown(p, id, w, kByReset, number, step);
    }
  }
}

// Refresh of a pair that has come near its upper bounds: both cells are reset, and the one that was larger takes up
// pulses, each verified, until the difference is back (or refresh_max_pulses were spent).
template <class Device>
LRTT_HD void refresh_cell(const DeviceParams& p, const CellId& id, const Cell& c, const Cell& m, float& plus,
                          float& minus, uint32_t step) {
  if (!(max_(plus, minus) > p.refresh_upper_thres * p.w_max && min_(plus, minus) > p.refresh_lower_thres * p.w_max))
    return;
  const bool on_plus = plus > minus;
  const float want = abs_(plus - minus);
  const CellId other = minus_of(id), written = on_plus ? id : other;
  const uint32_t c3 = counter3(kReset, written.array, 1);
  plus = reset_value(p, c, id, philox(id.key, id.cell, 0, step, counter3(kReset, id.array, 1)).w[0]);
  minus = reset_value(p, m, other, philox(id.key, id.cell, 0, step, counter3(kReset, other.array, 1)).w[0]);
  const Cell& cell = on_plus ? c : m;
  float g = on_plus ? plus : minus;
  const float goal = want + (on_plus ? minus : plus);
  PulseNoise random = pulse_noise(id.key, id.cell, 1, step, c3);
  float lost = 0.0f;
  for (uint32_t n = 0; g < goal && float(n) < p.refresh_max_pulses; ++n) {
    random.state = advance(random.state, random.increment);
    const float level = noise_level((random.state >> 19) & (kNoiseLevels - 1));
    g = pulse<Device>(p, cell, g, true, p.dw_min_std * from_bits(to_bits(level) ^ (random.state & 0x80000000u)), lost);
  }
  plus = on_plus ? g : plus;
  minus = on_plus ? minus : g;
}

// Decay and diffusion of what the cell holds, and the refresh of a pair, once per optimizer step.
template <class Device>
LRTT_HD void relax_cell(const DeviceParams& p, const CellId& id, const Held& h, uint32_t step) {
  const int64_t i = id.cell;
  const Cell c = draw_cell<Device>(p, id);
  if (hold(p) == kPair) {
    const CellId other = minus_of(id);
    const Cell m = draw_cell<Device>(p, other);
    float plus = relax(p, c, id, h.cells[i], step), minus = relax(p, m, other, h.cells[h.size + i], step);
    if (p.refresh_every > 0.0f && (step + 1u) % uint32_t(p.refresh_every) == 0)
      refresh_cell<Device>(p, id, c, m, plus, minus, step);
    h.cells[i] = plus;
    h.cells[h.size + i] = minus;
    h.w[i] = plus - minus;
  } else if (h.cells != nullptr) {
    h.cells[i] = relax(p, c, id, h.cells[i], step);
    h.w[i] = shown(p, id, h.cells[i], kByRelax, 0, step);
  } else {
    h.w[i] = relax(p, c, id, h.w[i], step);
  }
}

}  // namespace lrtt
