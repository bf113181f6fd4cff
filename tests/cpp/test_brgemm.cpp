// The register tile: every height and width that a tier allows, batches with offsets, tails of k, accumulation.
#include <vector>

#include "cpu/kernels/tiers.h"
#include "elements.h"

namespace pbm::test {
namespace {

struct Shape {
  Flavour flavour;
  int rows, panels;
  int64_t k, batch;
  bool accumulate, offsets;
};

struct Operands {
  Exact a, b, c;
  std::vector<int64_t> a_offset, b_offset;
  Brgemm p;
};

DType a_dtype(Flavour f) { return f == Flavour::f32 ? DType::f32 : f == Flavour::bf16 ? DType::bf16 : DType::u8; }
DType b_dtype(Flavour f) { return f == Flavour::f32 ? DType::f32 : f == Flavour::bf16 ? DType::bf16 : DType::s8; }

Operands make(Rng& rng, const Shape& s) {
  Operands o;
  const int64_t size = size_of(a_dtype(s.flavour)), groups = panel_groups(s.k, s.flavour);
  const int64_t lda = (s.k + rng.below(5)) * size, a_batch = (s.rows - 1) * lda + s.k * size;
  const int64_t b_panel = (groups + rng.below(3)) * kGroupBytes,
                b_batch = (s.panels - 1) * b_panel + groups * kGroupBytes;
  // The entries of a batch need not follow in memory in their order.
  for (int64_t i = 0; i < s.batch; i++) {
    o.a_offset.push_back((s.batch - 1 - i) * a_batch);
    o.b_offset.push_back((i + 1) % s.batch * b_batch);
  }
  o.a = random_elements(rng, a_dtype(s.flavour), s.batch * a_batch / size);
  o.b = random_elements(rng, b_dtype(s.flavour), s.batch * b_batch / size);
  for (int64_t i = 0; i < s.batch; i++)  // the zeros that packing puts behind k
    for (int64_t j = 0; j < s.panels * kPanel; j++)
      for (int64_t k = s.k; k < groups * k_per_lane(s.flavour); k++)
        put(b_dtype(s.flavour),
            o.b.data() + i * b_batch + j / kPanel * b_panel + k / k_per_lane(s.flavour) * kGroupBytes,
            j % kPanel * k_per_lane(s.flavour) + k % k_per_lane(s.flavour), 0);
  const int64_t ldc = s.panels * kPanel + rng.below(3) * kPanel;
  o.c = random_elements(rng, DType::f32, (s.rows - 1) * ldc + s.panels * kPanel);
  if (s.flavour == Flavour::u8s8)
    for (int64_t i = 0; i < o.c.bytes() / 4; i++) o.c.as<int32_t>()[i] = static_cast<int32_t>(rng.between(-1000, 1000));
  o.p = {o.a.data(), lda,          s.offsets ? o.a_offset.data() : nullptr,
         o.b.data(), b_panel,      s.offsets ? o.b_offset.data() : nullptr,
         s.batch,    s.k,          o.c.data(),
         ldc,        s.accumulate, o.b.data()};
  return o;
}

// The same rows of u8 in the 8-byte lanes of a tier that has them: 16 bits each, in the order 0, 2, 1, 3.
Exact widened(const Operands& o, const Shape& s, Brgemm* p, std::vector<int64_t>* offsets) {
  const int64_t lanes = panel_groups(s.k, s.flavour), lda = lanes * 8;
  Exact wide(s.batch * s.rows * lda);
  std::memset(wide.data(), 0, wide.bytes());
  constexpr int64_t kPlace[] = {0, 2, 1, 3};
  for (int64_t i = 0; i < s.batch; i++) {
    offsets->push_back(i * s.rows * lda);
    for (int64_t r = 0; r < s.rows; r++)
      for (int64_t k = 0; k < s.k; k++)
        wide.as<uint16_t>()[(offsets->back() + r * lda) / 2 + k / 4 * 4 + kPlace[k % 4]] =
            static_cast<uint8_t>(o.p.a[(o.p.a_offset ? o.p.a_offset[i] : 0) + r * o.p.lda + k]);
  }
  p->a = wide.data();
  p->lda = lda;
  if (p->a_offset) p->a_offset = offsets->data();
  return wide;
}

void test_one(Rng& rng, Isa isa, const Shape& s) {
  const Operands o = make(rng, s);
  const Brgemm& p = o.p;
  const DType t = s.flavour == Flavour::u8s8 ? DType::s32 : DType::f32;
  Exact before(o.c.bytes());
  std::memcpy(before.data(), o.c.data(), o.c.bytes());
  Brgemm run = p;
  Exact wide;
  std::vector<int64_t> wide_offsets;
  if (s.flavour == Flavour::u8s8 && kernels_of(isa).tile.u8_lane_bytes == 8) wide = widened(o, s, &run, &wide_offsets);
  kernels_of(isa).brgemm(run, s.flavour, s.rows, s.panels);
  const int64_t per_lane = k_per_lane(s.flavour);
  for (int r = 0; r < s.rows; r++) {
    for (int64_t j = 0; j < s.panels * kPanel; j++) {
      double sum = s.accumulate ? get(t, before.data(), r * p.ldc + j) : 0, size = std::fabs(sum);
      for (int64_t i = 0; i < s.batch; i++) {
        const char* a = p.a + (p.a_offset ? p.a_offset[i] : 0) + r * p.lda;
        const char* b = p.b + (p.b_offset ? p.b_offset[i] : 0) + j / kPanel * p.b_panel;
        for (int64_t k = 0; k < s.k; k++) {
          const double product = get(a_dtype(s.flavour), a, k) * get(b_dtype(s.flavour), b + k / per_lane * kGroupBytes,
                                                                     j % kPanel * per_lane + k % per_lane);
          sum += product;
          size += std::fabs(product);
        }
      }
      const double got = get(t, p.c, r * p.ldc + j);
      // Each product is rounded at most twice (the portable tier does not fuse), as is adding to C.
      const double bound = t == DType::s32 ? 0 : size * 0x1p-23 * static_cast<double>(s.batch * s.k + 2);
      CHECK(std::fabs(got - sum) <= bound, "%s: %s %dx%d, k %lld, batch %lld: C(%d, %lld) is %.9g, expected %.9g",
            isa_name(isa), name(s.flavour), s.rows, s.panels, (long long)s.k, (long long)s.batch, r, (long long)j, got,
            sum);
    }
    for (int64_t j = s.panels * kPanel; j < p.ldc && r + 1 < s.rows; j++)
      CHECK(std::memcmp(o.c.data() + (r * p.ldc + j) * 4, before.data() + (r * p.ldc + j) * 4, 4) == 0,
            "%s: wrote beside C(%d, %lld)", isa_name(isa), r, (long long)j);
  }
}

}  // namespace

void test_brgemm(const Options& options) {
  constexpr Flavour kFlavours[] = {Flavour::f32, Flavour::bf16, Flavour::u8s8};
  for (Isa isa : tiers()) {
    Rng rng(options.seed);
    const TileShape tile = kernels_of(isa).tile;
    CHECK(tile.max_rows >= 3, "three digits of a row must fit in a tile");
    for (Flavour flavour : kFlavours)
      for (int rows = 1; rows <= tile.max_rows; rows++)
        for (int panels = 1; panels <= (rows <= tile.wide_rows ? tile.wide_panels : tile.panels); panels++) {
          for (int64_t k : {0, 1, 2, 3, 4, 5, 7, 8, 9})
            test_one(rng, isa, {flavour, rows, panels, k, 1, k % 2 == 1, false});
          for (int i = 0; i < 1 + options.iterations / 50; i++)
            test_one(rng, isa, {flavour, rows, panels, rng.between(1, 90), rng.between(1, 4), rng.chance(2), true});
        }
  }
}

}  // namespace pbm::test
