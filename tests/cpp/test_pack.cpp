// Packed B against the definition of its layout, and sums of columns.
#include "cpu/kernels/tiers.h"
#include "elements.h"

namespace pbm::test {
namespace {

constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};

struct Matrix {
  Exact data;
  int64_t row, col;
};

// B (k×n) with one of its strides 1, like a weight (n, k) or its transpose.
Matrix random_b(Rng& rng, DType t, int64_t k, int64_t n, bool k_contiguous) {
  const int64_t lead = (k_contiguous ? k : n) + rng.below(3);
  const int64_t count = k * n == 0 ? 0 : ((k_contiguous ? n : k) - 1) * lead + (k_contiguous ? k : n);
  return {random_elements(rng, t, count), k_contiguous ? 1 : lead, k_contiguous ? lead : 1};
}

// The element of packed B that holds B(p, j).
double packed(Flavour f, const char* out, int64_t panel_bytes, int64_t p, int64_t j) {
  const int64_t per_lane = k_per_lane(f);
  const char* group = out + j / kPanel * panel_bytes + p / per_lane * kGroupBytes;
  const DType t = f == Flavour::f32 ? DType::f32 : f == Flavour::bf16 ? DType::bf16 : DType::s8;
  return get(t, group, j % kPanel * per_lane + p % per_lane);
}

void test_one(Rng& rng, Isa isa) {
  PackB b{};
  b.flavour = static_cast<Flavour>(rng.below(3));
  const bool int8 = b.flavour == Flavour::u8s8;
  b.k = rng.chance(20) ? 0 : rng.between(1, rng.chance(4) ? 300 : 70);
  b.n = rng.between(1, 70);
  b.b_dtype = int8 ? DType::s8 : rng.of(kFloats);
  const Matrix m = random_b(rng, b.b_dtype, b.k, b.n, int8 || rng.chance(2));
  b.b = m.data.data();
  b.b_row = m.row;
  b.b_col = m.col;
  b.column_sums = int8;
  const int64_t per_lane = k_per_lane(b.flavour), groups = panel_groups(b.k, b.flavour);
  const int64_t panels = ceil_div(b.n, kPanel), panel_bytes = (groups + int8) * kGroupBytes;
  const Exact out(panels * panel_bytes);
  b.out = out.data();
  const int64_t cut = rng.between(0, panels);
  kernels_of(isa).pack_b(b, 0, cut);
  kernels_of(isa).pack_b(b, cut, panels);
  for (int64_t j = 0; j < panels * kPanel; j++) {
    int32_t sum = 0;
    for (int64_t p = 0; p < groups * per_lane; p++) {
      const bool inside = j < b.n && p < b.k;
      double expected = inside ? get(b.b_dtype, b.b, p * b.b_row + j * b.b_col) : 0;
      sum += static_cast<int32_t>(expected);
      if (b.flavour == Flavour::bf16) expected = from_bf16(to_bf16(static_cast<float>(expected)));
      const double got = packed(b.flavour, out.data(), panel_bytes, p, j);
      CHECK(got == expected, "%s: %s from %s, k %lld, n %lld: B(%lld, %lld) is %g, expected %g", isa_name(isa),
            name(b.flavour), name(b.b_dtype), (long long)b.k, (long long)b.n, (long long)p, (long long)j, got,
            expected);
    }
    if (int8) {
      const double got = get(DType::s32, out.data() + j / kPanel * panel_bytes + groups * kGroupBytes, j % kPanel);
      CHECK(got == sum, "%s: sum of column %lld is %g, expected %d", isa_name(isa), (long long)j, got, sum);
    }
  }
}

void test_column_sum(Rng& rng, Isa isa) {
  ColumnSum s{};
  s.rows = rng.chance(20) ? 0 : rng.between(1, rng.chance(4) ? 500 : 70);
  s.columns = rng.between(1, 70);
  s.dtype = rng.of(kFloats);
  s.out_dtype = rng.of(kFloats);
  s.row = rng.chance(10) ? 0 : s.columns + rng.below(3);
  const Exact x = random_elements(rng, s.dtype, s.rows ? (s.rows - 1) * s.row + s.columns : 0);
  const Exact out(s.columns * size_of(s.out_dtype));
  s.x = x.data();
  s.out = out.data();
  const int64_t cut = rng.between(0, ceil_div(s.columns, kPanel)) * kPanel;
  const int64_t middle = cut < s.columns ? cut : s.columns;
  kernels_of(isa).column_sum(s, 0, middle);
  kernels_of(isa).column_sum(s, middle, s.columns);
  for (int64_t j = 0; j < s.columns; j++) {
    double sum = 0, size = 0;
    for (int64_t i = 0; i < s.rows; i++) {
      const double v = get(s.dtype, s.x, i * s.row + j);
      sum += v;
      size += std::fabs(v);
    }
    const double bound = size * 0x1p-24 * (64 + static_cast<double>(s.rows) / 64) + rounding(s.out_dtype, sum);
    const double got = get(s.out_dtype, s.out, j);
    CHECK(std::fabs(got - sum) <= bound, "%s: sum of column %lld of %lld over %lld rows is %g, expected %g",
          isa_name(isa), (long long)j, (long long)s.columns, (long long)s.rows, got, sum);
  }
}

}  // namespace

void test_pack(const Options& options) {
  for (Isa isa : tiers()) {
    Rng rng(options.seed);
    for (int i = 0; i < options.iterations; i++) {
      test_one(rng, isa);
      test_column_sum(rng, isa);
    }
  }
}

}  // namespace pbm::test
