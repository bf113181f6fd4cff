// How a product is cut over threads: everything once, in bounds, the same for the same product.
#include "check.h"
#include "cpu/kernels/gemm.h"

namespace pbm::test {
namespace {

void check_part(int64_t total, int64_t unit, int64_t parts) {
  int64_t at = 0;
  for (int64_t i = 0; i < parts; i++) {
    const Range r = part(total, unit, parts, i);
    CHECK(r.begin == at, "part %lld of %lld over %lld in units of %lld begins at %lld, expected %lld", (long long)i,
          (long long)parts, (long long)total, (long long)unit, (long long)r.begin, (long long)at);
    CHECK(r.begin <= r.end && (r.begin % unit == 0 || r.begin == total), "part [%lld, %lld) of %lld, unit %lld",
          (long long)r.begin, (long long)r.end, (long long)total, (long long)unit);
    at = r.end;
  }
  CHECK(at == total, "%lld parts of %lld end at %lld", (long long)parts, (long long)total, (long long)at);
}

}  // namespace

void test_partition(const Options& options) {
  for (int64_t total = 0; total < 70; total++)
    for (int64_t unit : {1, 16})
      for (int64_t parts = 1; parts < 9; parts++) check_part(total, unit, parts);

  // One row, or a few, of a layer that is worth two threads takes both, over its columns.
  for (int64_t m : {1, 8}) {
    Gemm g{};
    g.m = m;
    g.n = g.k = 768;
    g.flavour = Flavour::f32;
    g.b_packed = true;
    const Grid grid = partition(g, 2);
    CHECK(grid.m == 1 && grid.n == 2, "%lld rows of 768x768 over 2 threads: %lld x %lld", (long long)m,
          (long long)grid.m, (long long)grid.n);
  }

  Rng rng(options.seed);
  constexpr int64_t kSizes[] = {1, 2, 3, 4, 5, 8, 15, 16, 17, 48, 64, 65, 128, 768, 1000, 3072, 4096, 65793, 1 << 20};
  constexpr Flavour kFlavours[] = {Flavour::f32, Flavour::bf16, Flavour::u8s8};
  for (int i = 0; i < options.iterations * 50; i++) {
    Gemm g{};
    g.m = rng.of(kSizes);
    g.n = rng.of(kSizes);
    g.k = rng.chance(20) ? 0 : rng.of(kSizes);
    g.flavour = rng.of(kFlavours);
    g.prepare = static_cast<APrepare>(rng.below(5));
    g.b_packed = rng.chance(2);
    const int64_t threads = rng.between(1, 200);
    const Grid grid = partition(g, threads), again = partition(g, threads);
    CHECK(grid.m >= 1 && grid.n >= 1 && grid.m * grid.n <= threads, "grid %lld x %lld for %lld threads",
          (long long)grid.m, (long long)grid.n, (long long)threads);
    CHECK(grid.m == again.m && grid.n == again.n, "two answers for one product");
    check_part(g.m, 1, grid.m);
    check_part(g.n, kPanel, grid.n);
  }
}

}  // namespace pbm::test
