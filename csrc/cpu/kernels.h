// CPU entry points, one call for all tiles of a model. `threads` is an upper bound; results do not depend on it.
#pragma once

#include <cstddef>
#include <vector>

#include "../hopfield.h"
#include "../io.h"
#include "../jobs.h"
#include "../segments.h"

namespace lrtt::cpu {

// Bytes of scratch that a pulsed update of an m x n array needs.
size_t workspace_bytes(int64_t m, int64_t n, const PulseParams& pulse);

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
  float *w, *cells;  // Held; both null where nothing is touched
  LRTT_HD Held held() const { return Held{w, cells, int64_t(m) * n}; }
  LRTT_HD CellId id(int64_t i) const { return CellId{uint64_t(state[kKey]), uint32_t(array), uint32_t(i)}; }
};
void draw_cells(const CellsJob& job, float* out, int threads);
// Counts in *at_bound the cells at a bound; `write`: programs the cells to w, and counts what of w is at or beyond a
// bound.
void clip(const CellsJob& job, bool write, int64_t* at_bound, int threads);
// Resets cells in columns [first, last) with probability `share`; `number` tells the resets of a step apart.
struct ResetRange {
  int first, last;
  float share;
  uint32_t number;
};
void reset(const CellsJob& job, const ResetRange& range, int threads);

// Decay, diffusion and refresh, one optimizer step.
void relax(const std::vector<CellsJob>& jobs, int threads);

// Converters (io.h), and the number of a read: *ticket = 2 * reads[mode] + mode, reads[mode] += 1.
void take_ticket(int64_t* reads, int mode, int64_t* ticket);
void read_input(const InputJob& job, int threads);
void read_output(const OutputJob& job, int threads);

size_t workspace_bytes(const SegmentCall& call);
void segment_sum(const SegmentCall& call, void* workspace, int threads);

// A window of a Hopfield network (hopfield.h).
size_t hopfield_bytes(const HopfieldJob& job);
void hopfield_window(const HopfieldJob& job, void* workspace, int threads);

const char* instruction_set();

}  // namespace lrtt::cpu
