// The vector loops of segment sums. segment_lanes.cpp is compiled once for each instruction set; the numbers do not
// depend on the choice.
#pragma once

#include "../segments.h"

namespace lrtt {

// Adds `slots` neighbouring slots (4, 2 or 1) along the tree, then `adds` values that wait before them; hands the
// result out, or lets it wait.
struct SegmentMove {
  int first, slots, adds, emit;
};

// Up to kSegmentBlock elements of one parameter. Pointers are to the first of them.
template <class T>
struct SegmentPart {
  const T* const* slots;  // [steps]; null: zeros
  T* const* out;          // [nodes]
  int64_t size;           // elements
  const SegmentMove* move;
  int moves;
  const double* weights;  // [steps], of moves of one slot
  double scale;
};

struct SegmentLanes {
  const char* name;
  // Of the n elements of one slot: the sum of squares, and whether a double is not finite (of floats the sum tells).
  double (*norm_float)(const float* slot, int64_t n);
  double (*norm_double)(const double* slot, int64_t n, bool* bad);
  void (*sum_float)(const SegmentPart<float>& part);
  void (*sum_double)(const SegmentPart<double>& part);
};

}  // namespace lrtt
