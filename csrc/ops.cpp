// The schema of every op: the table of contents of the library. All are functional; docstrings are in pybigmodel/ops.
#include "common/checks.h"

// clang-format off
STABLE_TORCH_LIBRARY(pybigmodel, m) {
  // --- linear: y = act(x·Wᵀ + bias) + residual. activation: 0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu; precision: 0 fp32, 1 bf16
  m.def("linear(Tensor input, Tensor weight, Tensor? bias, int precision) -> Tensor");
  m.def("linear_backward(Tensor grad_output, Tensor input, Tensor weight, int precision, bool need_input, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def("pack_linear_weight(Tensor weight, int precision) -> Tensor");
  m.def("linear_packed(Tensor input, Tensor packed_weight, int out_features, Tensor? bias, Tensor? residual, int activation) -> Tensor");

  // --- int8: y = act(scale_row·scale_col·Σ(q − zero_point)·w + bias) + residual
  m.def("quantize_per_token(Tensor input, bool symmetric) -> (Tensor, Tensor, Tensor)");
  m.def("pack_int8_linear_weight(Tensor weight) -> Tensor");
  m.def("int8_linear(Tensor input, Tensor packed_weight, Tensor weight_scale, Tensor? bias, Tensor? residual, int activation, bool symmetric) -> Tensor");
  m.def("int8_weight_only_linear(Tensor input, Tensor packed_weight, Tensor weight_scale, Tensor? bias, Tensor? residual, int activation) -> Tensor");

  // --- convolution: act(x * w + bias) over (N, C, spatial…); padding: before and after, axis by axis; algorithm: csrc/cpu/kernels/conv_algorithm.h
  m.def("pack_conv_weight(Tensor weight, int groups, int precision, int algorithm) -> Tensor");
  m.def("conv_packed(Tensor input, Tensor packed_weight, int out_channels, int[] kernel_size, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups, int activation, float slope, int algorithm, bool channels_last) -> Tensor");
  // several, one after another: program has for each step input, packed_weight, bias, residual (places among tensors and then the results of steps before; -1: none), out_channels, groups, activation, algorithm, channels_last, the number of axes, and axis by axis kernel, stride, padding before and after, dilation
  m.def("conv_sequence(Tensor[] tensors, int[] program, float[] slopes, int[] outputs) -> Tensor[]");
  m.def("conv(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, int precision, int algorithm, bool channels_last) -> Tensor");
  m.def("conv_backward(Tensor grad_output, Tensor input, Tensor weight, int[] stride, int[] padding, int[] dilation, int groups, int precision, int algorithm, bool channels_last, bool need_input, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def("conv_transpose(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] output_padding, int[] dilation, int groups, int precision, bool exact, bool channels_last) -> Tensor");
  m.def("conv_transpose_backward(Tensor grad_output, Tensor input, Tensor weight, int[] stride, int[] padding, int[] dilation, int groups, int precision, bool exact, bool channels_last, bool need_input, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");

  // --- int8 convolution: act(w_scale·x_scale·Σ(q − zero_point)·w + bias + residual); window: kernel, stride, padding before and after, dilation, axis by axis; a scale of 0: of the input, one is found; of residual and output, these are float
  m.def("pack_int8_conv_weight(Tensor weight, int groups) -> Tensor");
  m.def("int8_conv(Tensor input, Tensor packed_weight, Tensor weight_scale, Tensor? bias, Tensor? residual, int[] window, int groups, int activation, float slope, float input_scale, int input_zero_point, float residual_scale, int residual_zero_point, float output_scale, int output_zero_point, bool channels_last) -> Tensor");

  // --- pooling of (N, C, H, W): the greatest or the mean value of each window; padding: on both sides; divisor 0: the size of the window
  m.def("max_pool2d(Tensor input, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode, bool channels_last) -> Tensor");
  m.def("avg_pool2d(Tensor input, int[] kernel_size, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, int divisor, bool channels_last) -> Tensor");
  m.def("adaptive_avg_pool2d(Tensor input, int[] output_size, bool channels_last) -> Tensor");

  // --- attention: softmax(scale·q·kᵀ + …)·v, its log-sum-exp, and the rows' maxima and sums for backward. window: negative is unbounded; precision: 0 fp32, 1 bf16
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? dropout_seed, int window_left, int window_right, bool bottom_right, float softcap, float dropout_p, float scale, int precision, bool for_backward) -> (Tensor, Tensor, Tensor)");
  m.def("attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? alibi_slopes, Tensor? dropout_seed, int window_left, int window_right, bool bottom_right, float softcap, float dropout_p, float scale, int precision) -> (Tensor, Tensor, Tensor)");
  m.def("attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? dropout_seed, int window_left, int window_right, bool bottom_right, float softcap, float dropout_p, float scale, int precision, bool need_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("attention_varlen_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? alibi_slopes, Tensor? dropout_seed, int window_left, int window_right, bool bottom_right, float softcap, float dropout_p, float scale, int precision) -> (Tensor, Tensor, Tensor)");

  // --- decoding: new tokens into a cache of keys and values, in place; attention of a few queries over it
  m.def("attention_append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor k, Tensor v, Tensor cache_seqlens, Tensor? block_table) -> ()");
  m.def("attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table, Tensor? k_scale, Tensor? v_scale, Tensor? alibi_slopes, int new_tokens, int window_left, float softcap, float scale) -> (Tensor, Tensor)");

  // --- additive attention: softmax(Σ v·tanh(query + key))·value and its log-sum-exp
  m.def("additive_attention(Tensor query, Tensor key, Tensor value, Tensor v, Tensor? attn_mask, Tensor? dropout_seed, float dropout_p) -> (Tensor, Tensor)");
  m.def("additive_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor v, Tensor? attn_mask, Tensor? dropout_seed, float dropout_p, bool need_hidden, bool need_value, bool need_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
// clang-format on
