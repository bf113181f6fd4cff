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
    .value_range = value_range,
    .quantize_image = quantize_image,
    .column_sum = column_sum,
    .attention_forward = attention_forward,
    .attention_backward = attention_backward,
    .attention_mask_gradient = attention_mask_gradient,
    .attention_decode = attention_decode,
    .attention_decode_merge = attention_decode_merge,
    .additive = {additive_prepare, additive_forward, additive_score_gradients, additive_hidden_gradients,
                 additive_value_gradients, additive_mask_gradient, additive_few_scores, additive_few_output,
                 additive_few_score_gradients, additive_few_gradients, additive_few_sums},
    .conv_direct = conv_direct,
    .conv_winograd = conv_winograd,
    .conv_depthwise = conv_depthwise,
    .conv_planes = conv_planes,
    .conv_planes_gradient = conv_planes_gradient,
    .conv_spread = conv_spread,
    .conv_weight_sum = conv_weight_sum,
    .winograd_gradient_tiles = winograd_gradient_tiles,
    .winograd_gradient_output = winograd_gradient_output,
    .depthwise_weight_sum = depthwise_weight_sum,
    .conv_copy = conv_copy,
    .pack_winograd = pack_winograd,
    .pool = pool,
};

}  // namespace pbm::PBM_TIER
