// Segment sums on the CPU: one pass over the slots for the tree, the norms and the finite flags.
#include <cstring>

#include "kernels.h"

// The same operations in the same order on wider registers.
#if defined(LRTT_X86_CLONES) && defined(__GNUC__) && !defined(__clang__)
#  define LRTT_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#  define LRTT_CLONES
#endif

namespace lrtt::cpu {
namespace {

// Elements that pass through the tree together. Few, so that all slots are read side by side, as streams that the
// processor fetches ahead; long strips of one slot after the other were 1.5 to 2 times slower.
constexpr int kStrip = 64;
static_assert(kSegmentBlock % kStrip == 0 && kSegmentLanes % kStrip == 0);

struct Partial {
  double* square;  // [steps, blocks]
  uint8_t* bad;    // [steps, blocks]
  int64_t blocks;
};

template <class T>
struct Stack {
  T zero[kStrip] = {};
  T buffer[kSegmentDepth + 1][kStrip];
  const T* top[kSegmentDepth + 1];
};

// The strips of one block, elements begin to end of a parameter. `n` is a constant but in the last strip, so that the
// loops over it are unrolled.
template <class T>
inline __attribute__((always_inline)) void strip(const SegmentCall& call, const SegmentJob& job, int64_t first,
                                                 const int n, Stack<T>& stack, double* lanes, uint8_t* bad) {
  const T scale = T(*call.scale);
  int depth = 0, node = 0;
  const int steps = int(call.program.size());
  const SegmentStep* program = call.program.data();
  for (int s = 0; s < steps; ++s) {
    const T* slot = static_cast<const T*>(job.slots[s]);
    const T* value = slot == nullptr ? stack.zero : slot + first;
    if (lanes != nullptr && slot != nullptr) {
      double* lane = lanes + s * kSegmentLanes + first % kSegmentLanes;
      for (int i = 0; i < n; ++i) lane[i] += double(value[i]) * double(value[i]);
      if (sizeof(T) == sizeof(double)) {  // squares of finite floats cannot overflow a double: their sum tells
        int any = 0;
        for (int i = 0; i < n; ++i) any |= int(!(value[i] - value[i] == T(0)));
        bad[s] |= uint8_t(any);
      }
    }
    const double weight = call.weights[s];
    if (weight != 1.0) {
      T* scaled = stack.buffer[depth];
      for (int i = 0; i < n; ++i) scaled[i] = value[i] * T(weight);
      value = weight == 0.0 ? stack.zero : scaled;  // not a product with 0: the slot may hold NaN
    }
    for (int a = 0; a < program[s].adds; ++a) {
      --depth;
      T* sum = stack.buffer[depth];
      const T* left = stack.top[depth];
      for (int i = 0; i < n; ++i) sum[i] = left[i] + value[i];
      value = sum;
    }
    stack.top[depth++] = value;
    if (program[s].emit) {
      T* out = static_cast<T*>(job.out[node++]) + first;
      --depth;
      for (int i = 0; i < n; ++i) out[i] = value[i] * scale;
    }
  }
}

#define LRTT_STRIPS(T)                                                                                                 \
  LRTT_CLONES void strips(const SegmentCall& call, const SegmentJob& job, int64_t begin, int64_t end, Stack<T>& stack, \
                          double* lanes, uint8_t* bad) {                                                               \
    int64_t first = begin;                                                                                             \
    for (; first + kStrip <= end; first += kStrip) strip<T>(call, job, first, kStrip, stack, lanes, bad);              \
    if (first < end) strip<T>(call, job, first, int(end - first), stack, lanes, bad);                                  \
  }
LRTT_STRIPS(float)
LRTT_STRIPS(double)

template <class T>
void block(const SegmentCall& call, const SegmentJob& job, int64_t index, int64_t number, const Partial* partial) {
  thread_local Stack<T> stack;
  thread_local std::vector<double> lanes;
  thread_local std::vector<uint8_t> bad;
  const size_t steps = call.program.size();
  if (partial != nullptr) {
    lanes.assign(steps * kSegmentLanes, 0.0);
    bad.assign(steps, 0);
  }
  const int64_t begin = index * kSegmentBlock;
  const int64_t end = begin + kSegmentBlock < job.size ? begin + kSegmentBlock : job.size;
  strips(call, job, begin, end, stack, partial == nullptr ? nullptr : lanes.data(), bad.data());
  if (partial == nullptr) return;
  for (size_t s = 0; s < steps; ++s) {
    const double square = tree_sum<kSegmentLanes>(lanes.data() + s * kSegmentLanes);
    if (!job.is_double) bad[s] = not_finite(square);
    partial->square[int64_t(s) * partial->blocks + number] = square;
    partial->bad[int64_t(s) * partial->blocks + number] = bad[s];
  }
}

int64_t blocks_of(const SegmentJob& job) { return (job.size + kSegmentBlock - 1) / kSegmentBlock; }

int64_t all_blocks(const SegmentCall& call) {
  int64_t blocks = 0;
  for (const SegmentJob& job : call.jobs) blocks += blocks_of(job);
  return blocks;
}

}  // namespace

size_t workspace_bytes(const SegmentCall& call) {
  return call.stats == nullptr ? 0 : size_t(all_blocks(call)) * call.program.size() * (sizeof(double) + 1);
}

void segment_sum(const SegmentCall& call, void* workspace, int threads) {
  const size_t steps = call.program.size();
  if (call.redo) {
    bool ones = true;
    for (size_t s = 0; s < steps; ++s) ones &= call.weights[s] == 1.0;
    if (ones) return;
  }
  Partial memory{static_cast<double*>(workspace), nullptr, all_blocks(call)};
  memory.bad = reinterpret_cast<uint8_t*>(memory.square + int64_t(steps) * memory.blocks);
  const Partial* partial = call.stats == nullptr ? nullptr : &memory;
  int64_t number = 0;
  for (const SegmentJob& job : call.jobs) {
    const int64_t blocks = blocks_of(job);
#pragma omp parallel for num_threads(threads) if (threads > 1 && blocks > 8)
    for (int64_t b = 0; b < blocks; ++b)
      job.is_double ? block<double>(call, job, b, number + b, partial)
                    : block<float>(call, job, b, number + b, partial);
    number += blocks;
  }
  if (partial == nullptr) return;
  for (size_t s = 0; s < steps; ++s) {
    double lane[kSegmentFinalLanes] = {};
    uint8_t bad = 0;
    for (int64_t b = 0; b < memory.blocks; ++b) {
      lane[b % kSegmentFinalLanes] += memory.square[int64_t(s) * memory.blocks + b];
      bad |= memory.bad[int64_t(s) * memory.blocks + b];
    }
    call.stats[2 * s] = tree_sum<kSegmentFinalLanes>(lane);
    call.stats[2 * s + 1] = bad;
  }
}

}  // namespace lrtt::cpu
