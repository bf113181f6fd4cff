#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {

extern const Kernels table;
const Kernels table = {
    .isa = static_cast<Isa>(PBM_TIER_LEVEL),
    .tile = kTile,
    .brgemm = brgemm,
    .gemm = gemm,
    .pack_b = pack_b,
    .quantize_rows = quantize_rows,
    .column_sum = column_sum,
    .attention_forward = attention_forward,
    .attention_backward = attention_backward,
    .attention_mask_gradient = attention_mask_gradient,
    .attention_decode = attention_decode,
    .attention_decode_merge = attention_decode_merge,
};

}  // namespace pbm::PBM_TIER
