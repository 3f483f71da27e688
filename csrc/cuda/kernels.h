// CUDA entry points: the jobs of cpu/kernels.h with device pointers. Each call enqueues on `stream` and returns; it
// allocates nothing (the caller gives scratch of workspace_bytes) and never synchronises, so it can be captured.
#pragma once

#include <vector>

#include "../cpu/kernels.h"

namespace lrtt::cuda {

using Stream = void*;  // cudaStream_t

size_t workspace_bytes(const std::vector<PulseJob>& jobs);
size_t workspace_bytes(const std::vector<TransferJob>& jobs);
size_t workspace_bytes(const std::vector<cpu::DigitalJob>& jobs);
size_t workspace_bytes(const std::vector<cpu::ScaleJob>& jobs);
size_t workspace_bytes(const std::vector<cpu::CellsJob>& jobs);  // of relax
size_t workspace_bytes(const SegmentCall& call);

void pulsed_update(const std::vector<PulseJob>& jobs, void* workspace, Stream stream);
void transfer(const std::vector<TransferJob>& jobs, bool force, void* workspace, Stream stream);
void reinit(const std::vector<TransferJob>& jobs, void* workspace, Stream stream);
void digital_update(const std::vector<cpu::DigitalJob>& jobs, void* workspace, Stream stream);
void pulse_scale(const std::vector<cpu::ScaleJob>& jobs, void* workspace, Stream stream);
void relax(const std::vector<cpu::CellsJob>& jobs, void* workspace, Stream stream);
void segment_sum(const SegmentCall& call, void* workspace, Stream stream);
void draw_cells(const cpu::CellsJob& job, float* out, Stream stream);
void clip(const cpu::CellsJob& job, bool write, int64_t* at_bound, Stream stream);
void reset(const cpu::CellsJob& job, const cpu::ResetRange& range, Stream stream);

void take_ticket(int64_t* reads, int mode, int64_t* ticket, Stream stream);
void read_input(const InputJob& job, Stream stream);
void read_output(const OutputJob& job, Stream stream);
void read_product(const ProductJob& job, Stream stream);

// out[d, k] = c[d, k] + alpha a[d, r] b[r, k], a_t[r, d] = a^T and b_out = b in ElementType `type`: contiguous, c, b
// and out aligned to 16 bytes, k a multiple of 4, r at most 32, d at most 2^20.
struct MergeJob {
  const float *c, *a, *b;
  void *out, *a_t, *b_out;
  int64_t d;
  int k, r;
  float alpha;
  int type;
};

void merge(const MergeJob& job, Stream stream);

// z[n, r] = x[n, k] w[r, k]^T in half precision, top[n] magnitude_bits of the largest |x| of that precision. x is
// float32 (`wide`; then `narrow` gets it in half precision) or of that half precision itself. k is a multiple of 32, r
// at most 16; rows of x, w and narrow begin at multiples of 16 bytes.
struct ProjectJob {
  const void *x, *w;
  void *narrow, *z;
  uint32_t* top;
  int64_t n, x_stride, narrow_stride, z_stride;
  int k, r, wide, bfloat;
};

void project(const ProjectJob& job, Stream stream);

// A small float32 layer: c[d, k], a[d, r], b[r, k], contiguous; d and k at most 1024, r at most 16: so many floats of
// shared memory there are.
struct SmallLayer {
  const float *c, *a, *b;
  int d, k, r;
  float alpha;
};

// y[n, d] = x (c + alpha a b)^T + bias (or none), z[n, r] = x b^T, top[n] magnitude_bits of each sample's largest |x|.
struct SmallForwardJob {
  SmallLayer layer;
  const float *x, *bias;
  float *y, *z;
  uint32_t* top;
  int64_t x_stride;
  int n;
};

void forward(const SmallForwardJob& job, Stream stream);

// Of an output gradient grad[n, d]: dz[n, r] = grad a, top[n] of |grad|, grad_a[d, r] = alpha grad^T z,
// grad_b[r, k] = alpha dz^T x, both twice, grad_bias[d] = sum of grad, and grad_x[n, k] = grad (c + alpha a b) unless
// it is null. n is at most 256.
struct SmallBackwardJob {
  SmallLayer layer;
  const float *grad, *x, *z;
  float *dz, *grad_a, *grad_b, *first_a, *first_b, *grad_bias, *grad_x;
  uint32_t* top;
  int64_t grad_stride, x_stride;
  int n;
};

void backward(const SmallBackwardJob& job, Stream stream);

// Whether a network of these groups can be relaxed by one kernel on the current device; scratch for so many samples.
bool hopfield_fits(int odd, int even);
size_t hopfield_bytes(int64_t samples);
void hopfield_window(const HopfieldJob& job, void* workspace, Stream stream);

int runtime_version();
int driver_version();

}  // namespace lrtt::cuda
