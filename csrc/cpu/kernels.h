// CPU entry points, one call for all tiles of a model. `threads` is an upper bound; results do not depend on it.
#pragma once

#include <cstddef>
#include <vector>

#include "../jobs.h"
#include "../segments.h"

namespace lrtt::cpu {

// Bytes of scratch that an update of an m x n array with trains of `bl` slots needs.
size_t workspace_bytes(int64_t m, int64_t n, int bl);

void pulsed_update(const std::vector<PulseJob>& jobs, void* workspace, int threads);
void transfer(const std::vector<TransferJob>& jobs, bool force, void* workspace, int threads);
void reinit(const std::vector<TransferJob>& jobs, int threads);

// w -= lr * scale * grad, or nothing where a gradient is not finite (counted).
struct DigitalJob {
  void* w;
  const void* grad;
  int64_t size;
  int is_double;
  double scale;
  const double* lr;
  const int64_t* state;
  int64_t* counts;
};
void digital_update(const std::vector<DigitalJob>& jobs, int threads);

// eta = lr * scale * <grad, first> / <first, first>, the pulse learning rate that follows what clipping,
// unscaling and averaging did to the gradient after `first` was taken.
struct ScaleJob {
  float* eta;
  const float *grad, *first;
  int64_t size;
  double scale;
  const double* lr;
};
void pulse_scale(const std::vector<ScaleJob>& jobs, int threads);

// Draws the cells of an m x n array: out[kCellNumbers, m, n] = b_max, b_min, s_up, s_dn, e0, e1, e2.
struct CellsJob {
  const int64_t* state;
  DeviceParams device;
  int array, m, n;
};
void draw_cells(const CellsJob& job, float* out, int threads);
// Clips w to its cells' bounds in place; returns through *at_bound how many cells stood at a bound before.
void clip(const CellsJob& job, float* w, bool write, int64_t* at_bound, int threads);

// Decay and diffusion of w, one optimizer step.
struct RelaxJob {
  CellsJob cells;
  float* w;
};
void relax(const std::vector<RelaxJob>& jobs, int threads);

size_t workspace_bytes(const SegmentCall& call);
void segment_sum(const SegmentCall& call, void* workspace, int threads);

const char* instruction_set();

}  // namespace lrtt::cpu
