// Attention over parts of long keys, as ops with few queries run it.
#pragma once

#include "cpu/attention.h"

namespace pbm {

// Sequence b has lengths[b] keys. On torch's threads; out and lse of p.a are written.
void run_attention_decode(const AttentionDecode& p, const std::vector<int64_t>& lengths);

}  // namespace pbm
