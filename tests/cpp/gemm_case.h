// Random products for test_gemm: descriptors with exact-size operands, and what the operands are worth.
#pragma once

#include <cfloat>
#include <string>
#include <vector>

#include "cpu/kernels/tiers.h"
#include "epilogue_case.h"

namespace pbm::test {

// A row of A as the product sees it: rounded or quantised by a plain reading of the rules.
struct RowOperand {
  std::vector<double> x;
  double error = 0;  // digits: how far from x an element may be carried
  bool poisoned = false;
};

struct GemmCase : EpilogueOperands {
  Gemm g{};
  Exact a, b, packed;  // b: as given, before packing
  DType b_dtype = DType::f32;
  int64_t b_row = 0, b_col = 0;

  double b_value(int64_t p, int64_t j) const {
    const double w = get(b_dtype, b.data(), p * b_row + j * b_col);
    return g.flavour == Flavour::bf16 ? from_bf16(to_bf16(static_cast<float>(w))) : w;
  }

  RowOperand row(int64_t i) const {
    RowOperand r;
    double low = 0, high = 0;
    for (int64_t p = 0; p < g.k; p++) {
      const double x = get(g.a_dtype, g.a, i * g.a_row + p * g.a_col);
      r.x.push_back(x);
      low = std::fmin(low, x);
      high = std::fmax(high, x);
      r.poisoned = r.poisoned || !std::isfinite(x);
    }
    const double amax = std::fmax(high, -low);
    if (g.prepare == APrepare::digits) r.error = std::fmax(amax * 0x1p-23, 0x1p-123);
    if (g.prepare == APrepare::symmetric || g.prepare == APrepare::asymmetric) quantise(r, low, high);
    if (g.flavour == Flavour::bf16)
      for (double& x : r.x) x = from_bf16(to_bf16(static_cast<float>(x)));
    return r;
  }

  std::string describe() const {
    char text[200];
    std::snprintf(text, sizeof text,
                  "%s, A %s (%lld, %lld) prepare %d, B %s %s (%lld, %lld), C %s, m %lld n %lld k %lld, act %d%s%s",
                  name(g.flavour), name(g.a_dtype), (long long)g.a_row, (long long)g.a_col, static_cast<int>(g.prepare),
                  name(b_dtype), g.b_packed ? "packed" : "plain", (long long)b_row, (long long)b_col, name(g.c_dtype),
                  (long long)g.m, (long long)g.n, (long long)g.k, static_cast<int>(g.activation),
                  g.bias ? ", bias" : "", g.residual ? ", residual" : "");
    return text;
  }

 private:
  void quantise(RowOperand& r, double low, double high) const {
    const bool asymmetric = g.prepare == APrepare::asymmetric;
    const float l = static_cast<float>(low), h = static_cast<float>(high);
    float scale = asymmetric ? h / 255.f - l / 255.f : std::fmax(h, -l) / 127.f;
    scale = h == 0 && l == 0 ? 1.f : std::fmax(scale, FLT_MIN);
    const float inverse = 1.f / scale;
    const float zero = asymmetric ? std::fmin(std::nearbyint(-l * inverse), 255.f) : 0.f;
    for (double& x : r.x) {
      const float q = std::nearbyint(static_cast<float>(x) * inverse) + zero;
      const float kept = asymmetric ? std::fmin(std::fmax(q, 0.f), 255.f) : std::fmin(std::fmax(q, -127.f), 127.f);
      x = static_cast<double>(kept - zero) * scale;
    }
  }
};

inline void choose_a(Rng& rng, GemmCase& c) {
  Gemm& g = c.g;
  constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};
  if (g.flavour == Flavour::u8s8) {
    constexpr APrepare kInteger[] = {APrepare::symmetric, APrepare::asymmetric, APrepare::digits};
    g.prepare = rng.of(kInteger);
  } else {
    g.prepare = rng.chance(2) ? APrepare::none : APrepare::convert;
  }
  g.a_dtype = g.prepare != APrepare::none ? rng.of(kFloats) : g.flavour == Flavour::f32 ? DType::f32 : DType::bf16;
  const bool transposed = g.prepare == APrepare::convert && rng.chance(3);
  const int64_t lead = (transposed ? g.m : g.k) + rng.below(4);
  g.a_row = transposed ? 1 : rng.chance(20) ? 0 : lead;  // 0: one row expanded
  g.a_col = transposed ? lead : 1;
  c.a = random_elements(rng, g.a_dtype, g.k == 0 ? 0 : (g.m - 1) * g.a_row + (g.k - 1) * g.a_col + 1);
  g.a = c.a.data();
  const int64_t outlier = g.k ? rng.below(g.k) * g.a_col : 0;
  if (g.flavour == Flavour::u8s8 && g.k && rng.chance(4)) put(g.a_dtype, c.a.data(), outlier, rng.value() * 1e4f);
  if (g.flavour == Flavour::u8s8 && g.k && rng.chance(10))
    put(g.a_dtype, c.a.data(), outlier, rng.chance(2) ? NAN : INFINITY);
}

inline void choose_b(Rng& rng, GemmCase& c) {
  Gemm& g = c.g;
  constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};
  const bool int8 = g.flavour == Flavour::u8s8, k_contiguous = int8 || rng.chance(2);
  c.b_dtype = int8 ? DType::s8 : rng.of(kFloats);
  const int64_t lead = (k_contiguous ? g.k : g.n) + rng.below(4);
  c.b_row = k_contiguous ? 1 : lead;
  c.b_col = k_contiguous ? lead : 1;
  c.b = random_elements(rng, c.b_dtype, g.k == 0 ? 0 : (g.k - 1) * c.b_row + (g.n - 1) * c.b_col + 1);
  g.b_packed = int8 || rng.chance(2);
  g.b = c.b.data();
  g.b_dtype = c.b_dtype;
  g.b_row = c.b_row;
  g.b_col = c.b_col;
  if (!g.b_packed) return;
  const int64_t panels = ceil_div(g.n, kPanel), groups = panel_groups(g.k, g.flavour) + int8;
  c.packed = Exact(panels * groups * kGroupBytes);
  kernels_of(Isa::scalar)
      .pack_b({g.n, g.k, g.flavour, g.b, g.b_dtype, g.b_row, g.b_col, int8, c.packed.data()}, 0, panels);
  g.b = c.packed.data();
}

inline void choose_c(Rng& rng, GemmCase& c) {
  Gemm& g = c.g;
  choose_c_dtype(rng, g);
  g.c_row = g.n + rng.below(3);
  c.c = Exact(((g.m - 1) * g.c_row + g.n) * size_of(g.c_dtype), rng.chance(2) ? size_of(g.c_dtype) : 0);
  g.c = c.c.data();
  choose_epilogue(rng, g, c, g.m, g.n);
}

inline GemmCase random_case(Rng& rng) {
  GemmCase c;
  Gemm& g = c.g;
  constexpr int64_t kRows[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 19, 24, 25, 31};
  constexpr int64_t kColumns[] = {1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 113};
  constexpr int64_t kDepths[] = {1,  2,  3,  4,   5,   7,   8,   15,  16,  17,  31,
                                 63, 64, 65, 127, 129, 255, 256, 257, 300, 511, 513};
  g.flavour = static_cast<Flavour>(rng.below(3));
  g.m = rng.of(kRows);
  g.n = rng.of(kColumns);
  g.k = rng.chance(40) ? 0 : rng.of(kDepths);
  if (rng.chance(25)) {  // long panels are cut along k at 4096 lanes
    g.m = rng.between(1, 9);
    g.n = rng.between(1, 20);
    g.k = (4096 + rng.between(-1, 1)) * k_per_lane(g.flavour) * rng.between(1, 2) + rng.between(-1, 3);
  } else if (rng.chance(40)) {  // more rows than one chunk
    g.m = rng.between(383, 400);
    g.n = rng.between(1, 20);
    g.k = rng.between(1, 40);
  }
  choose_a(rng, c);
  choose_b(rng, c);
  choose_c(rng, c);
  return c;
}

}  // namespace pbm::test
