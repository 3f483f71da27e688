// The kernel that makes the streams of the first round.
#include "streams.cuh"

namespace lrtt::cuda {
namespace {

// Resident blocks run through the tasks of all jobs.
template <bool any>
__global__ void __launch_bounds__(kWordThreads, any ? kWordBlocks - 1 : kWordBlocks)
    make_streams(const DevicePulse* table, int count, Predicate predicate) {
  if (!any_left(table, count, 0, predicate)) return;
  __shared__ uint4 loads[kMost * kWordThreads];
  make_round<any>(table, count, 0, predicate, Kept{loads});
}

}  // namespace

int64_t word_blocks(const DevicePulse& p) {
  if (p.form == kCounted) return blocks_of((groups_of(p.job.n) + groups_of(p.job.m)) * p.capacity, kWordThreads);
  return blocks_of((chunks_of(p.job.n) + chunks_of(p.job.m)) * int64_t(p.capacity), kWordThreads / 32);
}

void launch_streams(const DevicePulse* table, int count, int form, unsigned grid, Predicate predicate,
                    cudaStream_t stream) {
  const auto kernel = form == kShortBits ? make_streams<false> : make_streams<true>;
  kernel<<<grid, kWordThreads, 0, stream>>>(table, count, predicate);
}

}  // namespace lrtt::cuda
