// Whole products, cut over threads as the ops cut them: every way to prepare A, packed and unpacked B, strides, tails,
// long k, epilogues. Against sums in double, with the rounding-error bound of the algorithm as the tolerance.
#include <vector>

#include "cpu/kernels/tiers.h"
#include "elements.h"
#include "gemm_case.h"

namespace pbm::test {
namespace {

Expected expected(const GemmCase& c, const RowOperand& row, int64_t i, int64_t j) {
  const Gemm& g = c.g;
  double sum = 0, size = 0, weights = 0;
  for (int64_t p = 0; p < g.k; p++) {
    const double w = c.b_value(p, j), x = row.x[static_cast<size_t>(p)];
    sum += x * w;
    size += std::fabs(x * w);
    weights += std::fabs(w);
  }
  double bound;
  if (g.flavour == Flavour::u8s8) {
    const double scale = g.col_scale[j];
    sum *= scale;
    // Digits: every element is off by at most `error`, and the sum of the upper digits is rounded to 24 bits.
    bound =
        (std::fabs(sum) * 0x1p-22 + row.error * weights * scale * 1.02) + size * scale * (row.error > 0 ? 0x1p-22 : 0);
  } else {
    // Blocks of at most 512 terms, then the blocks; each product is rounded at most twice.
    const double terms = static_cast<double>(g.k < 512 ? g.k : 512) + static_cast<double>(g.k) / 256 + 4;
    bound = size * terms * 0x1p-23;
  }
  return finished(g, i, j, sum, bound);
}

void run(Isa isa, const Gemm& g, int64_t threads) {
  const Grid grid = partition(g, threads);
  for (int64_t i = 0; i < grid.m * grid.n; i++) {
    const Range m = part(g.m, 1, grid.m, i / grid.n), n = part(g.n, kPanel, grid.n, i % grid.n);
    if (m.begin < m.end && n.begin < n.end) kernels_of(isa).gemm(g, m, n);
  }
}

void check_case(Isa isa, GemmCase& c, int64_t threads) {
  const Gemm& g = c.g;
  std::memset(c.c.data(), 0xa5, static_cast<size_t>(c.c.bytes()));
  run(isa, g, threads);
  for (int64_t i = 0; i < g.m; i++) {
    const RowOperand row = c.row(i);
    for (int64_t j = 0; j < g.n; j++) {
      const double got = get(g.c_dtype, g.c, i * g.c_row + j);
      if (row.poisoned) {
        CHECK(g.c_dtype == DType::u8 ? got == 0 : std::isnan(got), "%s: %s: row %lld has a NaN, C(.., %lld) is %g",
              isa_name(isa), c.describe().c_str(), (long long)i, (long long)j, got);
        continue;
      }
      const Expected e = expected(c, row, i, j);
      CHECK(std::fabs(got - e.y) <= e.bound, "%s: %s: C(%lld, %lld) is %.9g, expected %.9g ± %.2g", isa_name(isa),
            c.describe().c_str(), (long long)i, (long long)j, got, e.y, e.bound);
    }
    const int64_t size = size_of(g.c_dtype);
    for (int64_t at = (i * g.c_row + g.n) * size; i + 1 < g.m && at < (i + 1) * g.c_row * size; at++)
      CHECK(static_cast<unsigned char>(c.c.data()[at]) == 0xa5, "%s: %s: wrote beside row %lld", isa_name(isa),
            c.describe().c_str(), (long long)i);
  }
}

// The longest k that int32 sums allow, at the largest magnitudes: 255·128·65793 is 2^31 less 10,368.
void test_largest_sum(Isa isa) {
  const int64_t k = kMaxInt8K, groups = panel_groups(k, Flavour::u8s8);
  const Exact a(k * 4), w(k, 0, 0x80), panel((groups + 1) * kGroupBytes), c(4);
  for (int64_t p = 0; p < k; p++) a.as<float>()[p] = 1;
  kernels_of(isa).pack_b({1, k, Flavour::u8s8, w.data(), DType::s8, 1, k, true, panel.data()}, 0, 1);
  const float one = 1;
  Gemm g{};
  g.m = g.n = g.a_col = g.b_row = g.c_row = 1;
  g.k = g.a_row = g.b_col = k;
  g.flavour = Flavour::u8s8;
  g.a = a.data();
  g.b = panel.data();
  g.b_packed = true;
  g.b_dtype = DType::s8;
  g.c = c.data();
  g.col_scale = &one;
  for (APrepare prepare : {APrepare::asymmetric, APrepare::symmetric, APrepare::digits}) {
    g.prepare = prepare;
    run(isa, g, 1);
    const double exact = -128.0 * static_cast<double>(k), got = c.as<float>()[0];
    CHECK(std::fabs(got - exact) <= -exact * 0x1p-22, "%s: prepare %d: the largest sum is %.9g, expected %.9g",
          isa_name(isa), static_cast<int>(prepare), got, exact);
  }
}

}  // namespace

void test_gemm(const Options& options) {
  for (Isa isa : tiers()) test_largest_sum(isa);
  for (int i = 0; i < options.iterations * 3; i++) {
    const uint64_t seed = options.seed * 1000003 + static_cast<uint64_t>(i);
    for (Isa isa : tiers()) {
      Rng rng(seed);  // the same case on every tier
      GemmCase c = random_case(rng);
      check_case(isa, c, rng.between(1, 5));
    }
  }
}

}  // namespace pbm::test
