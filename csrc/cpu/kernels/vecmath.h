// exp, tanh and the activations on sixteen lanes. Coefficients: minimax fits (Lawson) of this project.
#pragma once

#include "cpu/kernels/types.h"
#include "cpu/kernels/vec.h"

namespace pbm::PBM_TIER {

// e^x, relative error below 2e-7; x below -104 gives 0, above 88.8 inf, NaN stays NaN.
PBM_INLINE Vec vexp(Vec x) {
  // The order of the operands keeps a NaN: min and max return the second one.
  const Vec c = vmax(set1(-150.f), vmin(set1(150.f), x));
  const Vec n = round_even(mul(c, set1(1.44269504f)));
  // ln 2 in two parts, the first with its low 9 bits zero, so that n·part is exact.
  Vec r = fmadd(n, set1(-0.693359375f), c);
  r = fmadd(n, set1(2.12194440e-4f), r);
  Vec p = set1(0x1.6ab972p-10f);
  p = fmadd(p, r, set1(0x1.126d1ap-7f));
  p = fmadd(p, r, set1(0x1.55589ap-5f));
  p = fmadd(p, r, set1(0x1.55540ap-3f));
  p = fmadd(p, r, set1(0x1.fffffap-2f));
  p = fmadd(p, r, set1(1.f));
  p = fmadd(p, r, set1(1.f));
  return scale_by_pow2(p, n);
}

// 2^x, relative error below 2e-7; exact for integers; −∞ gives 0, NaN stays NaN.
PBM_INLINE Vec vexp2(Vec x) {
#if PBM_TIER_LEVEL < 2
  x = vmax(set1(-160.f), x);  // NaN stays: the second operand is returned
#endif
  const Vec f = fraction(x);
  Vec p = set1(0x1.e974fap-10f);
  p = fmadd(p, f, set1(0x1.2778560p-7f));
  p = fmadd(p, f, set1(0x1.c91ce6p-5f));
  p = fmadd(p, f, set1(0x1.ebdb56p-3f));
  p = fmadd(p, f, set1(0x1.62e4bap-1f));
  p = fmadd(p, f, set1(1.f));
  return scale_by_pow2_floor(p, x);
}

// 2^x for what is rounded to bf16 next, relative error below 3e-6.
PBM_INLINE Vec vexp2_bf16(Vec x) {
#if PBM_TIER_LEVEL < 2
  x = vmax(set1(-160.f), x);
#endif
  const Vec f = fraction(x);
  Vec p = set1(0x1.b7f730p-7f);
  p = fmadd(p, f, set1(0x1.abf868p-5f));
  p = fmadd(p, f, set1(0x1.ee2450p-3f));
  p = fmadd(p, f, set1(0x1.62d6c6p-1f));
  p = fmadd(p, f, set1(1.f));
  return scale_by_pow2_floor(p, x);
}

// log2 of x > 0, normal and finite; error below 1 ulp of the result or 1e-7; NaN stays NaN.
PBM_INLINE Vec vlog2(Vec x) {
  const IVec bits = as_int(x);
  // x = 2^e·(1 + f), 1 + f in [√½, √2). The shift is of unsigned numbers: e is kept positive until then.
  const IVec e = isub(shr<23>(iadd(bits, iset1(0x3f800000 - 0x3f3504f3))), iset1(127));
  const Vec f = sub(as_float(isub(bits, shl<23>(e))), set1(1.f));
  Vec p = set1(0x1.01b6dcp-3f);
  p = fmadd(p, f, set1(-0x1.a87d0cp-3f));
  p = fmadd(p, f, set1(0x1.b9c91ap-3f));
  p = fmadd(p, f, set1(-0x1.e95be6p-3f));
  p = fmadd(p, f, set1(0x1.26d384p-2f));
  p = fmadd(p, f, set1(-0x1.715c4ep-2f));
  p = fmadd(p, f, set1(0x1.ec73d6p-2f));
  p = fmadd(p, f, set1(-0x1.715470p-1f));
  p = fmadd(p, f, set1(0x1.715476p+0f));
  return add(fmadd(p, f, to_float(e)), sub(x, x));
}

// e^(−2|x|) as 2^n·(1 + p), for |x| ≤ 43, and beyond as there.
struct Decay {
  Vec pow2, p;
};

PBM_INLINE Decay decay(Vec x) {
  // The order of the operands keeps a NaN.
  const Vec y = mul(vmin(set1(43.f), vabs(x)), set1(-2.f));
  const Vec magic = set1(0x1.8p23f);  // what is added to it is rounded to an integer, in its lowest bits
  const Vec shifted = fmadd(y, set1(1.44269504f), magic);
  const Vec n = sub(shifted, magic);
  Vec r = fmadd(n, set1(-0.693359375f), y);  // ln 2 in two parts, as above
  r = fmadd(n, set1(2.12194440e-4f), r);
  Vec q = set1(0x1.6beb9cp-10f);
  q = fmadd(q, r, set1(0x1.122a32p-7f));
  q = fmadd(q, r, set1(0x1.55567ap-5f));
  q = fmadd(q, r, set1(0x1.5554acp-3f));
  q = fmadd(q, r, set1(0x1.fffffep-2f));
  return {as_float(iadd(shl<23>(as_int(shifted)), iset1(0x3f800000))), fmadd(mul(r, r), q, r)};
}

PBM_INLINE Vec with_sign(Vec magnitude, Vec x) {
  return as_float(ior(as_int(magnitude), iand(as_int(x), iset1(INT32_MIN))));
}

// tanh x = −m/(m + 2) with m = e^(−2|x|) − 1, error below 2.5 ulp for every x. m is computed as such, not as e^… − 1,
// and so keeps its digits near 0. ±0, subnormals and NaN come out as they are.
PBM_INLINE Vec vtanh(Vec x) {
  const Decay e = decay(x);
  const Vec m = fmadd(e.pow2, e.p, sub(e.pow2, set1(1.f)));
  return with_sign(vabs(div(m, add(m, set1(2.f)))), x);
}

// tanh x within 4 ulp; sech² x = 4e/(1 + e)² with e = e^(−2|x|), relative error below 6e-7 for |x| ≤ 43 and 2e-37 beyond.
// 1 − tanh² would lose its digits.
struct TanhSech {
  Vec tanh, sech2;
};

PBM_INLINE TanhSech tanh_sech2(Vec x) {
  const Decay e = decay(x);
  const Vec m = fmadd(e.pow2, e.p, sub(e.pow2, set1(1.f))), inverse = div(set1(1.f), add(m, set1(2.f)));
  const Vec tanh = with_sign(vabs(mul(m, inverse)), x);
  return {tanh, mul(mul(fmadd(e.pow2, e.p, e.pow2), set1(4.f)), mul(inverse, inverse))};
}

// 1/d and c + n/d within 2 ulp, for d between 2^-100 and 2^100. With AVX-512 by an estimate of 14 bits and a Newton step,
// where a division of sixteen lanes takes up to 16 cycles (Intel; 2.5 on Zen 5).
PBM_INLINE Vec reciprocal(Vec d) {
#if PBM_TIER_LEVEL >= 2
  const Vec estimate = {_mm512_rcp14_ps(d.v)};
  return fmadd(estimate, fnmadd(d, estimate, set1(1.f)), estimate);
#else
  return div(set1(1.f), d);
#endif
}

PBM_INLINE Vec add_quotient(Vec c, Vec n, Vec d) {
#if PBM_TIER_LEVEL >= 2
  const Vec estimate = {_mm512_rcp14_ps(d.v)};
  const Vec q = mul(n, estimate);
  return fmadd(fnmadd(d, q, n), estimate, add(c, q));
#else
  return add(c, div(n, d));
#endif
}

// The lower tail of the normal distribution, Φ(−t) = e^(−t²/2)·Q(t) for t ≥ 0, with Q(t)/u a polynomial of degree 9
// in u = 1/(1 + 0.3 t): relative error of the fit 3.5e-9, in fp32 4e-7.
PBM_INLINE Vec normal_tail(Vec t) {
  const Vec u = div(set1(1.f), fmadd(set1(0.3f), t, set1(1.f)));
  Vec q = set1(-2.062346471e-02f);
  q = fmadd(q, u, set1(1.124355895e-01f));
  q = fmadd(q, u, set1(-2.282135443e-01f));
  q = fmadd(q, u, set1(1.917844609e-01f));
  q = fmadd(q, u, set1(-7.942343035e-02f));
  q = fmadd(q, u, set1(9.615680043e-02f));
  q = fmadd(q, u, set1(7.838966039e-02f));
  q = fmadd(q, u, set1(1.102354225e-01f));
  q = fmadd(q, u, set1(1.195718141e-01f));
  q = fmadd(q, u, set1(1.196866898e-01f));
  return mul(mul(q, u), vexp(mul(mul(t, t), set1(-0.5f))));
}

// slope: of leaky_relu below 0.
template <Activation A>
PBM_INLINE Vec activate(Vec x, float slope) {
  if constexpr (A == Activation::relu) {
    return vmax(zero(), x);  // NaN stays: the second operand is returned
  } else if constexpr (A == Activation::relu6) {
    return vmin(set1(6), vmax(zero(), x));
  } else if constexpr (A == Activation::hardswish) {
    return mul(x, mul(vmin(set1(6), vmax(zero(), add(x, set1(3)))), set1(1.f / 6)));
  } else if constexpr (A == Activation::leaky_relu) {
    return where_negative(x, mul(x, set1(slope)), x);
  } else if constexpr (A == Activation::gelu_erf) {
    const Vec tail = mul(x, normal_tail(vabs(x)));  // x·Φ(x) = x − x·Φ(−x)
    return where_negative(x, tail, sub(x, tail));
  } else if constexpr (A == Activation::gelu_tanh) {
    // 0.5·x·(1 + tanh u) = x / (1 + e^(−2u)), u = √(2/π)·(x + 0.044715·x³)
    const Vec cubic = fmadd(mul(x, x), set1(0.044715f), set1(1.f));
    const Vec e = vexp(mul(mul(x, set1(-1.5957691216f)), cubic));
    return div(x, add(e, set1(1.f)));
  } else if constexpr (A == Activation::silu) {
    return div(x, add(vexp(sub(zero(), x)), set1(1.f)));
  } else {
    return x;
  }
}

}  // namespace pbm::PBM_TIER
