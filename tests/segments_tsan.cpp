// Workers as threads: each writes its slots, meets the others, adds up its part of all slots, meets them again and
// reads the result. ThreadSanitizer reports what the barrier does not order.
#include <cstdio>
#include <thread>

#include "../csrc/cpu/barrier.h"
#include "../csrc/cpu/kernels.h"

using namespace lrtt;
using namespace lrtt::cpu;

namespace {

constexpr int kWorkers = 4, kSize = 3000, kRounds = 50;

Barrier barrier;
float slots[kWorkers][kSize], result[kSize];
int wrong[kWorkers];

void meet(int rank) {
  const uint32_t meeting = barrier_arrive(&barrier, rank);
  if (barrier_wait(&barrier, meeting, 20000) != kMet) ++wrong[rank];
}

void work(int rank) {
  const double one = 1.0, weights[kWorkers] = {1.0, 1.0, 1.0, 1.0};
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < kSize; ++i) slots[rank][i] = float(rank * i + round);
    meet(rank);
    const int first = rank * kSize / kWorkers, last = (rank + 1) * kSize / kWorkers;
    const void* in[kWorkers];
    for (int w = 0; w < kWorkers; ++w) in[w] = slots[w] + first;
    void* out[1] = {result + first};
    SegmentCall call{{{in, out, last - first, 0, 0}}, {{0, 0}, {1, 0}, {0, 0}, {2, 1}}, weights, &one, nullptr, false};
    segment_sum(call, nullptr, 1);
    meet(rank);
    for (int i = 0; i < kSize; ++i) wrong[rank] += result[i] != float(6 * i + kWorkers * round);
    meet(rank);
  }
}

}  // namespace

int main() {
  barrier_init(&barrier, kWorkers);
  std::thread threads[kWorkers];
  for (int rank = 0; rank < kWorkers; ++rank) threads[rank] = std::thread(work, rank);
  int errors = 0;
  for (int rank = 0; rank < kWorkers; ++rank) {
    threads[rank].join();
    errors += wrong[rank];
  }
  // One that never comes, and one that gives up: both are noticed.
  const uint32_t meeting = barrier_arrive(&barrier, 0);
  if (barrier_wait(&barrier, meeting, 60) != kTimeout) ++errors;
  std::thread quitter([] { barrier_fail(&barrier, 3); });
  if (barrier_wait(&barrier, meeting, 5000) != kFailed) ++errors;
  quitter.join();
  if (errors) std::printf("%d errors\n", errors);
  return errors != 0;
}
