// Counted trains (mean_count, deterministic_implicit) in the loops of lanes.cpp, which includes this inside its
// namespace.

// out.bits[s][e]: counted_value of element e of sample s with the sign of the operand; 0 where there is no update.
LRTT_HD void generate_values(const Operand& v, int64_t elements, int64_t e0, bool is_x, const PulseParams& pulse,
                             const BlockPlan& plan, uint64_t key, uint32_t step, uint32_t array, const Stream& out) {
  const int width = int(elements - e0 < kChunk ? elements - e0 : kChunk);
  const float res = is_x ? pulse.x_res : pulse.d_res;
  for (int s = 0; s < plan.samples; ++s) {
    const Train& t = plan.train[s];
    uint32_t* to = out.bits + int64_t(s) * out.ld + e0;
    memset(to, 0, sizeof(uint32_t) * size_t(kChunk));
    if (t.bl == 0) continue;
    const float* row = static_cast<const float*>(v.p) + int64_t(plan.row[s]) * v.ss + e0 * v.es;
    Lanes random;
    rounding_lanes(pulse, plan, s, is_x, e0, key, step, array, random);
    for (int e = 0; e < width; ++e) {
      const float f = row[e * v.es];
      const uint32_t word = pulse.sto_round ? random[e & 3][e >> 2] : 0u;
      const float q = counted_value(pulse.type, abs_(f) * (is_x ? t.sx : t.sd), res, pulse.sto_round != 0, word, t.bl);
      to[e] = to_bits(q) | (to_bits(f) & 0x80000000u);
    }
  }
}

// Directions of the pulses that fall into the words [begin, end): n pulses of a cell take the first n slots of a
// sample. `held` as in `run_pulses`.
LRTT_HD void queue_counts(const PulseParams& pulse, const BlockPlan& plan, int begin, int end, const Group& at,
                          uint64_t (&held)[kLanes], Directions& queue) {
  const int low = begin * 32, high = end * 32;
  for (int s = low / plan.width; s < plan.samples && s * plan.width < high; ++s) {
    const uint32_t single = at.one.bits[s * at.one.ld + at.other];
    if ((single & 0x7fffffffu) == 0) continue;
    const float each = abs_(from_bits(single));
    const int bl = plan.train[s].bl;
    const int begun = low - s * plan.width, first = begun > 0 ? begun : 0, last = high - s * plan.width;
    const uint32_t* value = at.lanes.bits + s * at.lanes.ld + at.lane0;
    int many[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const float own = abs_(from_bits(value[l]));
      const int n = counted_pulses(pulse.type, at.lanes_are_x ? own : each, at.lanes_are_x ? each : own, bl);
      many[l] = (n < last ? n : last) - first;
    }
    for (int l = 0; l < at.width; ++l) {
      const uint32_t up = 0u - ((value[l] ^ single ^ at.down_flip) >> 31);  // x*d negative: an up pulse
      for (int left = many[l]; left > 0; left -= 32) {
        const uint32_t have = queue.count[l], next = have + uint32_t(left < 32 ? left : 32);
        held[l] |= uint64_t(up & (0xffffffffu >> (left < 32 ? 32 - left : 0))) << (have & 31);
        if ((have ^ next) & ~31u) {
          queue.up[have / 32][l] = uint32_t(held[l]);
          held[l] >>= 32;
        }
        queue.count[l] = next;
      }
    }
  }
}
