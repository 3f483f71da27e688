// Sums of segments along a fixed tree, shared by CPU and CUDA.
//
// A SLOT is one segment's gradient of one parameter. A program turns the slots of a worker into the tree nodes that the
// worker owns, and the same program form turns the nodes of all workers into the total: step i pushes slot i, then adds
// the two topmost values `adds` times, then, if `emit` is set, hands out the one value that is left. So the order of
// the additions is the tree's and nothing else's.
//
// NORMS are sums of squares in float64 over blocks of kSegmentBlock elements: lane l of a block adds the elements l,
// l + kSegmentLanes, ...; then tree_sum over the lanes; then the blocks, in order of the parameters, the same way.
#pragma once

#include <vector>

#include "jobs.h"

namespace lrtt {

constexpr int kSegmentBlock = 4096;
constexpr int kSegmentLanes = 256;
constexpr int kSegmentFinalLanes = 1024;
constexpr int kSegmentDepth = 12;  // of the stack; 12^3 segments need 10

struct SegmentStep {
  int adds, emit;
};

// One parameter: its slots and its nodes, `size` elements each. A null slot stands for zeros.
struct SegmentJob {
  const void* const* slots;  // [steps]
  void* const* out;          // [emitting steps]
  int64_t size;
  int is_double;
  int aligned;  // set by the CUDA code: all of them start at multiples of 16 bytes
};

// All parameters of a model.
struct SegmentCall {
  std::vector<SegmentJob> jobs;
  std::vector<SegmentStep> program;
  const double* weights;  // [steps], 0 leaves a slot out whatever it holds
  const double* scale;    // [1], a factor on every node
  double* stats;          // [steps, 2]: sum of squares, and 1 if an element is not finite; null: not wanted
  bool redo;              // do nothing if all weights are 1
};

LRTT_HD bool not_finite(float v) { return (to_bits(v) & 0x7fffffffu) >= 0x7f800000u; }

LRTT_HD bool not_finite(double v) {
  uint64_t u;
  memcpy(&u, &v, 8);
  return (u & 0x7fffffffffffffffull) >= 0x7ff0000000000000ull;
}

}  // namespace lrtt
