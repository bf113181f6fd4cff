// Poolings on every tier, of images with gaps and of exactly their size: windows of any form, NaN and infinities.
#include "conv_case.h"
#include "cpu/kernels/pool.h"

namespace pbm::test {
namespace {

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16, DType::u8};

struct PoolCase {
  Pool p{};
  std::vector<PoolSpan> spans[2];
  Image x, y;

  Expected expected(int64_t b, int64_t h, int64_t w, int64_t c) const {
    const PoolSpan &row = spans[0][static_cast<size_t>(h)], &column = spans[1][static_cast<size_t>(w)];
    const double least = x.dtype == DType::u8 ? 0 : -INFINITY;
    double greatest = least, sum = 0, size = 0;
    bool nan = false;
    for (int64_t i = 0; i < row.count; i++)
      for (int64_t j = 0; j < column.count; j++) {
        const double v = x.at(b, 0, row.begin + i * p.step[0], column.begin + j * p.step[1], c);
        nan = nan || std::isnan(v);
        greatest = v > greatest ? v : greatest;
        sum += v;
        size += std::fabs(v);
      }
    if (!p.average) return {nan ? NAN : greatest, 0};
    const double divisor = p.divisor != 0 ? static_cast<double>(p.divisor)
                                          : static_cast<double>(row.divisor) * static_cast<double>(column.divisor);
    const double mean = sum / divisor, ulp = p.dtype == DType::f32    ? 0x1p-23
                                             : p.dtype == DType::bf16 ? 0x1p-8
                                                                      : 0x1p-10;
    return {mean, std::fabs(mean) * ulp + size / std::fabs(divisor) * 0x1p-19 + 0x1p-24};
  }
};

// Windows anywhere in an axis, in any order and with any overlap.
std::vector<PoolSpan> random_spans(Rng& rng, int64_t size, int64_t step, int64_t count) {
  std::vector<PoolSpan> spans;
  const int64_t most = rng.between(1, 6), apart = rng.between(1, 5);
  for (int64_t i = 0; i < count; i++) {
    const int64_t begin = rng.chance(10) ? rng.below(size) : i * apart % size, room = (size - 1 - begin) / step + 1;
    const int64_t taps = rng.chance(20) ? 0 : rng.between(1, most < room ? most : room);
    spans.push_back({taps ? begin : 0, taps, rng.between(1, 7)});
  }
  return spans;
}

void check_pool(uint64_t seed, Isa isa, DType dtype, bool average) {
  constexpr int64_t kChannels[] = {1, 2, 3, 15, 16, 17, 32, 33, 64, 65, 130, 200};
  Rng rng(seed);
  PoolCase c;
  Pool& p = c.p;
  const int64_t size[3] = {1, rng.between(1, 9), rng.between(1, 40)}, batch = rng.between(1, 2);
  p.average = average;
  p.dtype = dtype;
  p.channels = rng.of(kChannels);
  p.out_size[0] = rng.between(1, 4);
  p.out_size[1] = rng.between(1, 20);
  for (int i = 0; i < 2; i++) {
    p.step[i] = rng.chance(3) ? rng.between(1, 3) : 1;
    c.spans[i] = random_spans(rng, size[i + 1], p.step[i], p.out_size[i]);
  }
  p.rows = c.spans[0].data();
  p.columns = c.spans[1].data();
  p.shared = rng.chance(2);  // a matter of speed alone
  p.divisor = rng.chance(4) ? 3.f : 0.f;
  c.x = random_image(rng, dtype, batch, p.channels, size, rng.chance(2) ? Gaps::none : Gaps::all);
  if (dtype != DType::u8 && !average)
    c.x.each([&](int64_t b, int64_t d, int64_t h, int64_t w, int64_t channel) {
      const float special[] = {NAN, -NAN, INFINITY, -INFINITY, -0.f};
      if (rng.chance(12)) put(dtype, c.x.memory.data(), c.x.offset(b, d, h, w, channel), rng.of(special));
    });
  p.x = c.x.memory.data();
  p.x_batch = c.x.batch_stride;
  p.x_row = c.x.stride[1];
  p.x_pixel = c.x.stride[2];
  const int64_t out[3] = {1, p.out_size[0], p.out_size[1]};
  c.y = image_of(rng, dtype, batch, p.channels, out, Gaps::none);
  p.out = c.y.memory.data();
  clear(c.y);
  const int64_t lanes = 64 / size_of(dtype);
  for (const Range& rows : cut(rng, batch * p.out_size[0], 1))
    for (const Range& channels : cut(rng, p.channels, lanes)) kernels_of(isa).pool(p, rows, channels);
  std::vector<Expected> expected;
  c.y.each([&](int64_t b, int64_t, int64_t h, int64_t w, int64_t channel) {
    expected.push_back(c.expected(b, h, w, channel));
  });
  check_image(c.y, expected, isa,
              std::string(average ? "average of " : "greatest of ") + name(dtype) + (p.shared ? ", shared" : ""));
}

}  // namespace

void test_pool(const Options& options) {
  for (int i = 0; i < options.iterations; i++)
    for (DType dtype : kDTypes)
      for (int average = 0; average < (dtype == DType::u8 ? 1 : 2); average++)
        for (Isa isa : tiers()) check_pool(options.seed * 1000003 + static_cast<uint64_t>(i), isa, dtype, average != 0);
}

}  // namespace pbm::test
