// Bursts (bursts.h) in the loops of lanes.cpp, which includes this inside its namespace.

struct BurstLanes {  // one direction of each lane's cell
  float s[kLanes], h[kLanes], mean[kLanes], shake[kLanes], most[kLanes];
};

// Set bits, written so that a compiler makes many lanes of it at once and not an instruction for one.
LRTT_HD uint32_t bits_set(uint32_t v) {
  v -= (v >> 1) & 0x55555555u;
  v = (v & 0x33333333u) + ((v >> 2) & 0x33333333u);
  v = (v + (v >> 4)) & 0x0f0f0f0fu;
  v += v >> 8;
  return (v + (v >> 16)) & 0x3fu;
}

LRTT_HD bool any(const uint32_t (&v)[kLanes]) {
  uint32_t all = 0;
  for (int l = 0; l < kLanes; ++l) all |= v[l];
  return all != 0;
}

// many[l] pulses, upwards or downwards, on the cell of lane l. directions: upwards, downwards; of a pair: those of the
// first cell and of the second, both upwards.
template <class Device, int how, int planes>
LRTT_HD void step_bursts(const DeviceParams& p, const CellLanes (&c)[planes], const BurstLanes (&directions)[2],
                         const uint32_t (&many)[kLanes], const uint32_t (&up)[kLanes], NoiseLanes& random,
                         float (&w)[planes][kLanes], float* cut) {
  float n[kLanes], eta[kLanes] = {};
  uint32_t large[kLanes], moving[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const float most_up = directions[0].most[l], most_down = directions[1].most[l];
    n[l] = float(int32_t(many[l]));
    large[l] = uint32_t(n[l] > (up[l] ? most_up : most_down));
    moving[l] = uint32_t(many[l] != 0) & (large[l] ^ 1u);
  }
  if (p.dw_min_std > 0.0f) {
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t next = advance(random.state[l], random.increment[l]);
      random.state[l] = moving[l] ? next : random.state[l];
    }
    for (int l = 0; l < kLanes; ++l) eta[l] = (p.dw_min_std * noise(noise_table.level, random.state[l])) * sqrt_(n[l]);
  }
  for (int plane = 0; plane < planes; ++plane) {
    const CellLanes& k = c[plane];
    for (int l = 0; l < kLanes; ++l) {
      const BurstLanes &u = directions[0], &v = directions[1];
      const Burst ups{u.s[l], u.h[l], u.mean[l], u.shake[l], 0.0f}, downs{v.s[l], v.h[l], v.mean[l], v.shake[l], 0.0f};
      const Burst b{up[l] ? ups.s : downs.s, up[l] ? ups.h : downs.h, up[l] ? ups.mean : downs.mean,
                    up[l] ? ups.shake : downs.shake, 0.0f};
      const Cell one_cell{k.b_max[l], k.b_min[l], k.s_up[l], k.s_dn[l], k.e0[l], k.e1[l], k.e2[l]};
      float over = 0.0f;
      const float next = burst<Device>(one_cell, b, p.mult_noise != 0.0f, w[plane][l], n[l], eta[l], over);
      const uint32_t active = planes == 1 ? moving[l] : moving[l] & (up[l] ^ uint32_t(plane));
      w[plane][l] = active ? next : w[plane][l];
      cut[l] += active ? over : 0.0f;
    }
  }
  if (!any(large)) return;
  for (int l = 0; l < kLanes; ++l) {
    if (!large[l]) continue;
    const int plane = how == kPair && !up[l] ? planes - 1 : 0;
    const CellLanes& k = c[plane];
    const Cell one_cell{k.b_max[l], k.b_min[l], k.s_up[l], k.s_dn[l], k.e0[l], k.e1[l], k.e2[l]};
    for (uint32_t i = 0; i < many[l]; ++i) {
      float xi = 0.0f;
      if (p.dw_min_std > 0.0f) {
        random.state[l] = advance(random.state[l], random.increment[l]);
        xi = p.dw_min_std * noise(noise_table.level, random.state[l]);
      }
      w[plane][l] = pulse<Device>(p, one_cell, w[plane][l], how == kPair || up[l] != 0, xi, cut[l]);
    }
  }
}

// A block in bursts, on the cells of a lane group; returns the number of pulses.
template <class Device, int how, int planes>
LRTT_HD int64_t run_bursts(const DeviceParams& p, const PulseParams& pulse, const BlockPlan& plan, const Group& at,
                           const CellLanes (&c)[planes], NoiseLanes& random, float (&w)[planes][kLanes], float* cut,
                           uint32_t* touched) {
  BurstLanes directions[2];
  for (int way = 0; way < 2; ++way) {
    const CellLanes& k = c[how == kPair ? way * (planes - 1) : 0];
    for (int l = 0; l < kLanes; ++l) {
      const Cell one_cell{k.b_max[l], k.b_min[l], k.s_up[l], k.s_dn[l], k.e0[l], k.e1[l], k.e2[l]};
      const Burst b = burst_of<Device>(p, one_cell, how == kPair || way == 0);
      directions[way].s[l] = b.s;
      directions[way].h[l] = b.h;
      directions[way].mean[l] = b.mean;
      directions[way].shake[l] = b.shake;
      directions[way].most[l] = b.most;
    }
  }
  uint32_t many[kLanes] = {}, up[kLanes] = {}, sum[kLanes] = {}, inside[kLanes];
  for (int l = 0; l < kLanes; ++l) inside[l] = l < at.width ? 0xffffffffu : 0u;
  const auto apply = [&]() __attribute__((always_inline)) {
    if (!any(many)) return;
    for (int l = 0; l < kLanes; ++l) sum[l] += many[l];
    step_bursts<Device, how>(p, c, directions, many, up, random, w, cut);
  };
  if (form_of(pulse) == kCounted) {
    for (int s = 0; s < plan.samples; ++s) {
      const uint32_t single = at.one.bits[s * at.one.ld + at.other];
      if ((single & 0x7fffffffu) == 0) continue;
      const float each = abs_(from_bits(single));
      const uint32_t* value = at.lanes.bits + s * at.lanes.ld + at.lane0;
      for (int l = 0; l < at.width; ++l) {
        const float own = abs_(from_bits(value[l]));
        many[l] = uint32_t(
            counted_pulses(pulse.type, at.lanes_are_x ? own : each, at.lanes_are_x ? each : own, plan.train[s].bl));
        up[l] = (value[l] ^ single ^ at.down_flip) >> 31;  // x*d negative: an up pulse
      }
      apply();
    }
  }
  const int slots = plan.width < 32 ? plan.width : 32;
  for (int word = 0; word < (form_of(pulse) == kCounted ? 0 : plan.words); ++word) {
    const uint32_t ob = at.one.bits[word * at.one.ld + at.other];
    if (ob == 0) continue;
    const uint32_t on = at.one.neg[word * at.one.ld + at.other] ^ at.down_flip;
    const uint32_t* lb = at.lanes.bits + word * at.lanes.ld + at.lane0;
    const uint32_t* ln = at.lanes.neg + word * at.lanes.ld + at.lane0;
    for (int low = 0; low < 32; low += slots) {
      const uint32_t own = ob & ((0xffffffffu >> (32 - slots)) << low);
      if (own == 0) continue;
      for (int l = 0; l < kLanes; ++l) {  // streams have room for whole lane groups
        const uint32_t m = lb[l] & own & inside[l];
        many[l] = bits_set(m);
        up[l] = ((ln[l] ^ on) & m) != 0 ? 1u : 0u;
      }
      apply();
    }
  }
  int64_t pulses = 0;
  for (int l = 0; l < kLanes; ++l) {
    pulses += sum[l];
    touched[l] |= sum[l];
  }
  return pulses;
}
