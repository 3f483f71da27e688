// Segment sums on the CPU: blocks over threads, the loops of segment_lanes.cpp inside. Every slot comes from memory
// once: all slots of a block pass through the tree side by side, as streams that the processor fetches ahead, and their
// norms find them in the second cache. (The norms first, with the next block fetched meanwhile, took 1.4 times as
// long.)
#include <cstring>

#include "kernels.h"
#include "segment_lanes.h"

namespace lrtt {

extern const SegmentLanes segment_lanes_base;
#ifdef LRTT_X86_CLONES
extern const SegmentLanes segment_lanes_v3, segment_lanes_v4;
#endif

namespace cpu {
namespace {

// The set that lane_kernels() chose.
const SegmentLanes& segment_lanes() {
#ifdef LRTT_X86_CLONES
  for (const SegmentLanes* lanes : {&segment_lanes_v4, &segment_lanes_v3})
    if (strcmp(lanes->name, instruction_set()) == 0) return *lanes;
#endif
  return segment_lanes_base;
}

struct Partial {
  double* square;  // [steps, blocks]
  uint8_t* bad;    // [steps, blocks]
  int64_t blocks;
};

using Moves = std::vector<SegmentMove>;

// The program in moves of one slot, or, where all slots count whole, of up to four.
Moves moves_of(const std::vector<SegmentStep>& program, bool several) {
  const int steps = int(program.size());
  const auto waits = [&](int s) { return s < steps && program[size_t(s)].adds == 0 && !program[size_t(s)].emit; };
  const auto adds = [&](int s) { return s < steps ? program[size_t(s)].adds : 0; };
  Moves moves;
  for (int s = 0, slots; s < steps; s += slots) {
    slots = 1;
    if (several && waits(s) && adds(s + 1) > 0) {
      const bool pair_waits = adds(s + 1) == 1 && !program[size_t(s + 1)].emit;
      slots = pair_waits && waits(s + 2) && adds(s + 3) > 1 ? 4 : 2;
    }
    const SegmentStep& last = program[size_t(s + slots - 1)];
    moves.push_back({s, slots, last.adds - slots / 2, last.emit});
  }
  return moves;
}

double norm(const SegmentLanes& lanes, const float* slot, int64_t n, bool* bad) {
  const double square = lanes.norm_float(slot, n);
  *bad = not_finite(square);  // squares of finite floats cannot overflow a double
  return square;
}
double norm(const SegmentLanes& lanes, const double* slot, int64_t n, bool* bad) {
  return lanes.norm_double(slot, n, bad);
}
void sum(const SegmentLanes& lanes, const SegmentPart<float>& part) { lanes.sum_float(part); }
void sum(const SegmentLanes& lanes, const SegmentPart<double>& part) { lanes.sum_double(part); }

template <class T>
void block(const SegmentCall& call, const SegmentJob& job, const Moves& moves, int nodes, int64_t index, int64_t number,
           const Partial* partial) {
  thread_local std::vector<const T*> slots;
  thread_local std::vector<T*> out;
  const SegmentLanes& lanes = segment_lanes();
  const int64_t begin = index * kSegmentBlock;
  const int64_t rest = job.size - begin, size = rest < kSegmentBlock ? rest : int64_t(kSegmentBlock);
  const int steps = int(call.program.size());
  slots.clear();
  out.clear();
  for (int s = 0; s < steps; ++s) {
    const T* slot = static_cast<const T*>(job.slots[s]);
    slots.push_back(slot == nullptr ? nullptr : slot + begin);
  }
  for (int n = 0; n < nodes; ++n) out.push_back(static_cast<T*>(job.out[n]) + begin);
  sum(lanes,
      SegmentPart<T>{slots.data(), out.data(), size, moves.data(), int(moves.size()), call.weights, *call.scale});
  for (int s = 0; partial != nullptr && s < steps; ++s) {
    bool bad = false;
    const int64_t at = s * partial->blocks + number;
    partial->square[at] = slots[size_t(s)] == nullptr ? 0.0 : norm(lanes, slots[size_t(s)], size, &bad);
    partial->bad[at] = bad;
  }
}

int64_t blocks_of(const SegmentJob& job) { return (job.size + kSegmentBlock - 1) / kSegmentBlock; }

int64_t all_blocks(const SegmentCall& call) {
  int64_t blocks = 0;
  for (const SegmentJob& job : call.jobs) blocks += blocks_of(job);
  return blocks;
}

// tree_sum<kSegmentFinalLanes> without the zeros behind the last block: a square and zero add up to the square.
double tree_of_blocks(double* lane, int64_t used) {
  for (int half = kSegmentFinalLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half && l + half < used; ++l) lane[l] += lane[l + half];
  return used > 0 ? lane[0] : 0.0;
}

}  // namespace

size_t workspace_bytes(const SegmentCall& call) {
  return call.stats == nullptr ? 0 : size_t(all_blocks(call)) * call.program.size() * (sizeof(double) + 1);
}

void segment_sum(const SegmentCall& call, void* workspace, int threads) {
  const size_t steps = call.program.size();
  bool ones = true;
  for (size_t s = 0; s < steps; ++s) ones &= call.weights[s] == 1.0;
  if (call.redo && ones) return;
  int nodes = 0;
  for (const SegmentStep& step : call.program) nodes += step.emit;
  const Moves single = moves_of(call.program, false), several = moves_of(call.program, ones);
  Partial memory{static_cast<double*>(workspace), nullptr, all_blocks(call)};
  memory.bad = reinterpret_cast<uint8_t*>(memory.square + int64_t(steps) * memory.blocks);
  const Partial* partial = call.stats == nullptr ? nullptr : &memory;
  int64_t number = 0;
  for (const SegmentJob& job : call.jobs) {
    const int64_t blocks = blocks_of(job);
    bool absent = false;
    for (size_t s = 0; s < steps; ++s) absent |= job.slots[s] == nullptr;
    const Moves& moves = absent ? single : several;
#pragma omp parallel for num_threads(threads) if (threads > 1 && blocks > 8)
    for (int64_t b = 0; b < blocks; ++b)
      job.is_double ? block<double>(call, job, moves, nodes, b, number + b, partial)
                    : block<float>(call, job, moves, nodes, b, number + b, partial);
    number += blocks;
  }
  if (partial == nullptr) return;
  const int64_t used = memory.blocks < kSegmentFinalLanes ? memory.blocks : int64_t(kSegmentFinalLanes);
  for (size_t s = 0; s < steps; ++s) {
    double lane[kSegmentFinalLanes];
    for (int64_t l = 0; l < used; ++l) lane[l] = 0.0;
    uint8_t bad = 0;
    for (int64_t b = 0; b < memory.blocks; ++b) {
      lane[b % kSegmentFinalLanes] += memory.square[int64_t(s) * memory.blocks + b];
      bad |= memory.bad[int64_t(s) * memory.blocks + b];
    }
    call.stats[2 * s] = tree_of_blocks(lane, used);
    call.stats[2 * s + 1] = bad;
  }
}

}  // namespace cpu
}  // namespace lrtt
