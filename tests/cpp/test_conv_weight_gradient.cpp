// Sums of outer products of pixels, and those of one channel at a time, on every tier: added to what is there, cut into
// filters and channels anywhere, to the same bits.
#include "conv_case.h"

namespace pbm::test {
namespace {

// Sums, and that they are the same however they are cut: run(rng, kernel, sums) adds to them.
template <class Run, class Value>
void check_sums(uint64_t seed, int64_t count, const char* what, const Run& run, const Value& expected) {
  Rng start(seed);
  const Exact initial = random_elements(start, DType::f32, count);
  for (Isa isa : tiers()) {
    Rng rng(seed);
    const Kernels& kernel = kernels_of(isa);
    const Exact sums(count * 4), again(count * 4);
    for (const Exact* e : {&sums, &again}) {
      std::memcpy(e->data(), initial.data(), static_cast<size_t>(count) * 4);
      run(rng, kernel, e->as<float>());
    }
    CHECK(std::memcmp(sums.data(), again.data(), static_cast<size_t>(count) * 4) == 0,
          "%s: %s: depends on how it is cut", isa_name(isa), what);
    for (int64_t i = 0; i < count; i++) {
      const Expected e = expected(i, static_cast<double>(initial.as<float>()[i]));
      const double got = sums.as<float>()[i];
      CHECK(e.admits(got), "%s: %s: sum %lld is %.9g, expected %.9g ± %.2g", isa_name(isa), what, (long long)i, got,
            e.y, e.bound);
    }
  }
}

// A sum of `terms` products, and of what was there.
Expected summed(double initial, double sum, double size, double terms) {
  return {initial + sum, size * (terms + 2) * 0x1p-23 + std::fabs(initial + sum) * 0x1p-23};
}

void check_stretches(uint64_t seed) {
  constexpr int64_t kChannels[] = {1, 3, 15, 16, 17, 31, 33, 48, 50, 65, 70},
                    kFilters[] = {1, 2, 5, 7, 8, 9, 13, 17, 26};
  Rng rng(seed);
  const int64_t n = rng.of(kFilters), c = rng.of(kChannels), panels = ceil_div(c, kPanel), pixels = rng.between(1, 40);
  const int64_t dy_lane = n + rng.below(3), x_pixel = c + rng.below(3), step = rng.between(1, 2);
  // Pixel i of dy beside pixels i·step + 0 or 1 of x: the last of each ends where its memory does.
  const int64_t x_pixels = (pixels - 1) * step + 2;
  const Exact dy = random_elements(rng, DType::f32, (pixels - 1) * dy_lane + n);
  const Exact x = random_elements(rng, DType::f32, (x_pixels - 1) * x_pixel + c);
  struct Stretch {
    int64_t first, tap, lanes;
  };
  std::vector<Stretch> of;
  std::vector<WeightSum::Stretch> stretches;
  for (int64_t i = rng.below(6); i > 0; i--) {
    const int64_t first = rng.below(pixels), lanes = rng.chance(2) ? pixels - first : rng.below(pixels - first + 1);
    of.push_back({first, rng.below(2), lanes});
    stretches.push_back(
        {dy.as<float>() + first * dy_lane, x.as<float>() + (first * step + of.back().tap) * x_pixel, lanes});
  }
  const int64_t sum_row = panels * kPanel + kPanel * rng.below(2);
  WeightSum p{stretches.data(), static_cast<int64_t>(stretches.size()), dy_lane, step * x_pixel, c, nullptr, sum_row};
  const auto run = [&](Rng& cuts, const Kernels& kernel, float* sums) {
    p.sum = sums;
    for (const Range& rows : cut(cuts, n, 1))
      for (const Range& columns : cut(cuts, panels, 1)) kernel.conv_weight_sum(p, rows, columns);
  };
  const auto expected = [&](int64_t at, double initial) -> Expected {
    const int64_t k = at / sum_row, i = at % sum_row;
    double sum = 0, size = 0, terms = 0;
    for (const Stretch& s : of)
      for (int64_t l = s.first; l < s.first + s.lanes && i < c; l++) {
        const double v = static_cast<double>(dy.as<float>()[l * dy_lane + k]) *
                         static_cast<double>(x.as<float>()[(l * step + s.tap) * x_pixel + i]);
        sum += v, size += std::fabs(v), terms++;
      }
    return summed(initial, sum, size, terms);
  };
  check_sums(seed, (n - 1) * sum_row + panels * kPanel, "conv_weight_sum", run, expected);
}

void check_depthwise(uint64_t seed) {
  constexpr int64_t kChannels[] = {1, 5, 15, 16, 17, 32, 35};
  constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};
  Rng rng(seed);
  ConvCase c;  // its reads() are those of the forward
  ConvShape& s = c.s;
  do {
    s = plain_shape();
    s.batch = rng.between(1, 2);
    s.groups = rng.of(kChannels);
    if (rng.chance(3)) choose_axis(rng, s, 0, 3);
    if (!rng.chance(4)) choose_axis(rng, s, 1, 8);
    choose_axis(rng, s, 2, 20);
    s.kernel[2] = rng.between(1, 9);  // more than the seven that are in registers
    for (int axis = 0; axis < 3; axis++) c.out[axis] = s.out(axis);
  } while (c.rows() == 0 || c.steps() > 30000);
  const DType dtype = rng.of(kFloats);
  const Image x = random_image(rng, dtype, s.batch, s.groups, s.in, Gaps::all);
  const Image dy = random_image(rng, dtype, s.batch, s.groups, c.out, Gaps::all);
  DepthwiseWeightSum p{};
  p.batch = s.batch;
  p.channels = s.groups;
  p.dtype = dtype;
  p.x = x.view();
  p.dy = dy.view();
  for (int axis = 0; axis < 3; axis++) {
    p.out[axis] = c.out[axis];
    p.kernel[axis] = s.kernel[axis];
    p.stride[axis] = s.stride[axis];
    p.pad[axis] = s.pad[axis];
    p.dilation[axis] = s.dilation[axis];
  }
  const int64_t blocks = ceil_div(s.groups, kPanel);
  const auto run = [&](Rng& cuts, const Kernels& kernel, float* sums) {
    p.sum = sums;
    for (const Range& r : cut(cuts, blocks, 1)) kernel.depthwise_weight_sum(p, r);
  };
  const auto expected = [&](int64_t at, double initial) -> Expected {
    const int64_t channel = at / (s.taps() * kPanel) * kPanel + at % kPanel, tap = at / kPanel % s.taps();
    const int64_t i = tap / (s.kernel[1] * s.kernel[2]), j = tap / s.kernel[2] % s.kernel[1], q = tap % s.kernel[2];
    double sum = 0, size = std::fabs(initial);
    for (int64_t row = 0; row < c.rows() && channel < s.groups; row++) {
      const int64_t o[3] = {row / (c.out[1] * c.out[2]) % c.out[0], row / c.out[2] % c.out[1], row % c.out[2]};
      const int64_t b = row / (c.out[0] * c.out[1] * c.out[2]);
      const int64_t d = c.reads(0, o[0], i), h = c.reads(1, o[1], j), w = c.reads(2, o[2], q);
      if (d < 0 || h < 0 || w < 0) continue;
      const double v = dy.at(b, o[0], o[1], o[2], channel) * x.at(b, d, h, w, channel);
      sum += v, size += std::fabs(v);
    }
    return summed(initial, sum, size, static_cast<double>(c.rows()));
  };
  check_sums(seed, blocks * s.taps() * kPanel, "depthwise_weight_sum", run, expected);
}

}  // namespace

void test_conv_weight_gradient(const Options& options) {
  for (int i = 0; i < options.iterations * 3; i++) {
    const uint64_t seed = options.seed * 1000003 + static_cast<uint64_t>(i);
    check_stretches(seed);
    if (i % 4 == 0) check_depthwise(seed);
  }
}

}  // namespace pbm::test
