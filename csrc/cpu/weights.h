// CPU entry points for pretrained weights.
#pragma once

#include "../dequantize.h"

namespace lrtt::cpu {

// `threads` is an upper bound; results do not depend on it. Throws std::invalid_argument for a type without decoder.
void dequantize(const blocks::Job& job, int threads);
int64_t skip_strings(const uint8_t* data, uint64_t size, uint64_t& at, int64_t count);

}  // namespace lrtt::cpu
