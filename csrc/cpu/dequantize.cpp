// Decoding of quantised blocks on the CPU, split among threads, and the walk over string arrays of a GGUF header.
#include "weights.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "decode.h"
#include "kernels.h"

namespace lrtt {

extern const DecodeKernel decode_kernel_base;
#ifdef LRTT_X86_CLONES
extern const DecodeKernel decode_kernel_v3, decode_kernel_v4;
#endif

namespace {

// The same choice as that of the lanes.
const DecodeKernel& decode_kernel() {
#ifdef LRTT_X86_CLONES
  const char* name = cpu::instruction_set();
  if (!std::strcmp(name, "v4")) return decode_kernel_v4;
  if (!std::strcmp(name, "v3")) return decode_kernel_v3;
#endif
  return decode_kernel_base;
}

}  // namespace

namespace cpu {

void dequantize(const blocks::Job& job, int threads) {
  const DecodeKernel& kernel = decode_kernel();
  const int64_t total = job.row_count * job.row_blocks;
  if (!kernel.decode(job, 0, 0))
    throw std::invalid_argument("lrtt::dequantize_: type must be one that the core decodes, got " +
                                std::to_string(job.type));
  constexpr int64_t piece = 1024;  // blocks; every element is decoded alike in any piece
  const int64_t pieces = (total + piece - 1) / piece;
#pragma omp parallel for num_threads(threads) if (threads > 1 && pieces > 8)
  for (int64_t i = 0; i < pieces; ++i) kernel.decode(job, i * piece, std::min(total, (i + 1) * piece));
}

// Strings of a GGUF array: a 64-bit length and that many bytes each. Walks over up to `count` that lie whole in the
// window [at, size); returns how many there were and moves `at` behind them.
int64_t skip_strings(const uint8_t* data, uint64_t size, uint64_t& at, int64_t count) {
  int64_t walked = 0;
  while (walked < count && size - at >= 8) {
    uint64_t length;
    std::memcpy(&length, data + at, 8);
    if (length > size - at - 8) break;
    at += 8 + length;
    ++walked;
  }
  return walked;
}

}  // namespace cpu
}  // namespace lrtt
