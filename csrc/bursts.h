// A burst: the n pulses that one sample gives a cell, all in one direction, as one step (jobs.h: of long trains those
// of 32 slots).
//
// On a device whose strength is linear in the weight, a pulse of step s (negative downwards) multiplies the distance
// d = s - h w from where steps vanish, h = s Gamma / w_ref, by 1 - h (1 + eta), so n of them move the weight by
//   (s - h w) E,  E = (1 - e^-y) / h,  y = -sum_i log(1 - h (1 + eta_i)).
// With normal eta of standard deviation sigma, to second order in h eta,
//   y = h (n mean + shake eta),  eta = sigma sqrt(n) xi,
//   shake = 1 / (1 - h),  mean = (-log(1 - h) + (h shake sigma)^2 / 2) / h,
// with a single normal xi. Additive noise (mult_noise = 0) moves the weight by s eta (1 - h (n - 1) / 2) beside it.
// Bounds clip the burst as a whole.
#pragma once

#include <type_traits>

#include "devices.h"

namespace lrtt {

template <class Device>
constexpr bool kLinearStrength = false;
template <>
constexpr bool kLinearStrength<ConstantStep> = true;
template <>
constexpr bool kLinearStrength<LinearStep> = true;
template <>
constexpr bool kLinearStrength<SoftBounds> = true;
template <>
constexpr bool kLinearStrength<SoftBoundsReference> = true;

// Bursts are for cells with |h| up to the first number (the series of mean leaves out h^6 / 7, 8e-9) and for |h| n up
// to the second (that of E leaves out y^6 / 5040, 5e-8).
constexpr float kSmallStep = 0.0625f, kSmallBurst = 0.25f;

// Samples of at most so many slots seldom have two coincidences in a cell: their pulses act one by one.
constexpr int kFewSlots = 4;
LRTT_HD bool burst_width(int slots) { return slots > kFewSlots; }

// Whether a device takes bursts. Where pulses go back and forth by more than their size, bounds clip each of them.
template <class Device>
LRTT_HD bool takes_bursts(const DeviceParams& p) {
  return kLinearStrength<Device> && p.dw_min_std <= 1.0f;
}
LRTT_HD bool takes_bursts(const DeviceParams& p) {
  bool takes = false;
  with_device(int(p.kind), [&](auto device) { takes = takes_bursts<decltype(device)>(p); });
  return takes;
}

// One direction of a cell. More than `most` pulses do not act at once.
struct Burst {
  float s, h, mean, shake, most;
};

template <class Device>
LRTT_HD Burst burst_of(const DeviceParams& p, const Cell& c, bool up) {
  const float s = up ? c.s_up : -c.s_dn, h = s * (up ? c.e0 : c.e1);  // a ConstantStep has e0 = e1 = 0
  Burst b{s, h, 1.0f, 1.0f, 0.0f};
  if (!(abs_(h) <= kSmallStep)) return b;
  b.most = kSmallBurst / max_(abs_(h), 1e-9f);
  float series = fma_(h, 0.16666667f, 0.2f);
  series = fma_(h, series, 0.25f);
  series = fma_(h, series, 0.33333334f);
  series = fma_(h, series, 0.5f);
  series = fma_(h, series, 1.0f);
  const float sigma = p.mult_noise * p.dw_min_std;
  b.shake = 1.0f / (1.0f - h);
  b.mean = fma_(0.5f * h * (b.shake * b.shake), sigma * sigma, series);
  return b;
}

// w after n pulses, as it is where n = 0; eta = sigma sqrt(n) xi; `inside`: noise that is multiplied with the step
// (mult_noise).
template <class Device>
LRTT_HD float burst(const Cell& c, const Burst& b, bool inside, float w, float n, float eta, float& lost) {
  const float t = fma_(n, b.mean, inside ? b.shake * eta : 0.0f);
  const float y = b.h * t;
  float e = fma_(y, -0.0013888889f, 0.0083333338f);
  e = fma_(y, e, -0.041666668f);
  e = fma_(y, e, 0.16666667f);
  e = fma_(y, e, -0.5f);
  e = fma_(y, e, 1.0f) * t;
  const float state = std::is_same<Device, SoftBoundsReference>::value ? w + c.e2 : w;
  float moved = fma_(fma_(-b.h, state, b.s), e, w);
  if (!inside) moved = fma_(b.s * eta, fma_(-0.5f * b.h, n - 1.0f, 1.0f), moved);
  const float kept = clamp(c, moved);
  lost += abs_(moved - kept);
  return kept;
}

}  // namespace lrtt
