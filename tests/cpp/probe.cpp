// Compiled once per tier, with that tier's flags.
#include "probe.h"

#include "cpu/kernels/convert.h"
#include "cpu/kernels/vecmath.h"

namespace pbm::PBM_TIER {
namespace {

template <class F>
void over(const float* x, float* y, int64_t n, F f) {
  for (int64_t i = 0; i < n; i += kWidth) store(y + i, f(load(x + i)));
}

void exp_array(const float* x, float* y, int64_t n) {
  over(x, y, n, [](Vec v) { return vexp(v); });
}

void exp2_array(const float* x, float* y, int64_t n) {
  over(x, y, n, [](Vec v) { return vexp2(v); });
}

void exp2_bf16_array(const float* x, float* y, int64_t n) {
  over(x, y, n, [](Vec v) { return vexp2_bf16(v); });
}

void log2_array(const float* x, float* y, int64_t n) {
  over(x, y, n, [](Vec v) { return vlog2(v); });
}

void tanh_array(const float* x, float* y, int64_t n) {
  over(x, y, n, [](Vec v) { return vtanh(v); });
}

void tanh_sech2_array(const float* x, float* tanh, float* sech2, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const TanhSech f = tanh_sech2(load(x + i));
    store(tanh + i, f.tanh);
    store(sech2 + i, f.sech2);
  }
}

void quotient_array(const float* x, const float* y, float* inverse, float* sum, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) {
    store(inverse + i, reciprocal(load(y + i)));
    store(sum + i, add_quotient(set1(1.f), load(x + i), load(y + i)));
  }
}

void normal_tail_array(const float* x, float* y, int64_t n) {
  over(x, y, n, [](Vec v) { return normal_tail(v); });
}

template <Activation A>
void activate_with(const float* x, float* y, int64_t n) {
  over(x, y, n, [](Vec v) { return activate<A>(v, 0.1f); });
}

void activate_array(Activation a, const float* x, float* y, int64_t n) {
  switch (a) {
    case Activation::none: return activate_with<Activation::none>(x, y, n);
    case Activation::relu: return activate_with<Activation::relu>(x, y, n);
    case Activation::gelu_erf: return activate_with<Activation::gelu_erf>(x, y, n);
    case Activation::gelu_tanh: return activate_with<Activation::gelu_tanh>(x, y, n);
    case Activation::silu: return activate_with<Activation::silu>(x, y, n);
    case Activation::relu6: return activate_with<Activation::relu6>(x, y, n);
    case Activation::hardswish: return activate_with<Activation::hardswish>(x, y, n);
    case Activation::leaky_relu: return activate_with<Activation::leaky_relu>(x, y, n);
  }
}

void convert_array(DType from, DType to, const void* x, void* y, int64_t count) {
  with_float_dtype(from, [&]<DType From>() {
    with_float_dtype(to, [&]<DType To>() {
      for (int64_t i = 0; i < count; i += kWidth) {
        const int n = static_cast<int>(count - i < kWidth ? count - i : kWidth);
        store16_n<To>(y, i, load16_n<From>(x, i, n), n);
      }
    });
  });
}

void store_bf16_array(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) store_bf16(y + i, load(x + i));
}

void transpose_block(const int32_t* x, int32_t* y) {
  IVec r[16];
  for (int i = 0; i < 16; i++) r[i] = iload(x + 16 * i);
  transpose16(r);
  for (int i = 0; i < 16; i++) istore(y + 16 * i, r[i]);
}

}  // namespace

extern const test::Probe probe;
const test::Probe probe = {exp_array,      exp2_array,       exp2_bf16_array,  log2_array,
                           tanh_array,     tanh_sech2_array, quotient_array,   normal_tail_array,
                           activate_array, convert_array,    store_bf16_array, transpose_block};

}  // namespace pbm::PBM_TIER
