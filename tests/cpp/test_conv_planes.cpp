// Convolutions of few channels in planes, forward and the weight's gradient, on every tier: rows and images cut anywhere,
// to the same bits.
#include "conv_case.h"

namespace pbm::test {
namespace {

struct PlanesCase : ConvCase {
  ConvPlanes p{};
  Exact packed, residual_planes;  // the epilogue's residual as the output lies
};

void random_case(Rng& rng, PlanesCase& c) {
  constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};
  constexpr int64_t kChannels[] = {1, 2, 3, 6, 7, 8, 9, 16, 17};
  ConvShape& s = c.s;
  do {
    s = plain_shape();
    s.batch = rng.between(1, 3);
    s.c = rng.chance(20) ? 0 : rng.of(kChannels);
    s.n = rng.of(kChannels);
    choose_axis(rng, s, 1, 9);
    choose_axis(rng, s, 2, 60);
    s.kernel[2] = rng.between(1, 7);  // tiles of a gradient take five of a row
    s.stride[2] = 1;
    s.pad[1] = rng.between(-1, s.kernel[1]);
    s.pad[2] = rng.between(-1, s.kernel[2]);
    if (rng.chance(4)) s.pad_end[2] = -rng.below(20);
    for (int axis = 0; axis < 3; axis++) c.out[axis] = s.out(axis);
  } while (c.rows() == 0 || c.steps() > 150000);
  c.x = random_image(rng, rng.of(kFloats), s.batch, s.c, s.in, Gaps::all, true);
  c.weight = random_elements(rng, DType::f32, s.n * s.taps() * s.c);
  c.g.n = s.n;
  c.g.c_dtype = c.x.dtype;
  choose_epilogue(rng, c.g, c, c.rows(), s.n);
  c.g.residual_first = true;
  c.y = image_of(rng, c.x.dtype, s.batch, s.n, c.out, Gaps::none, true);
  if (rng.chance(4)) poison(rng, c);
}

// Filters as [eight of them][c][tap][8], and what the case says otherwise.
void attach(PlanesCase& c) {
  const ConvShape& s = c.s;
  c.packed = Exact(ceil_div(s.n, 8) * s.c * s.taps() * 32, 0, 0);
  for (int64_t n = 0; n < s.n; n++)
    for (int64_t i = 0; i < s.c; i++)
      for (int64_t t = 0; t < s.taps(); t++)
        c.packed.as<float>()[((n / 8 * s.c + i) * s.taps() + t) * 8 + n % 8] = static_cast<float>(c.weight_at(n, t, i));
  ConvPlanes& p = c.p;
  p.c = s.c, p.n = s.n;
  p.dtype = c.x.dtype;
  p.x = c.x.memory.data();
  p.h = s.in[1], p.w = s.in[2];
  p.x_batch = c.x.batch_stride, p.x_channel = c.x.channel_stride, p.x_row = c.x.stride[1];
  p.kernel_h = s.kernel[1], p.kernel_w = s.kernel[2];
  p.stride_h = s.stride[1];
  p.pad_h = s.pad[1], p.pad_w = s.pad[2];
  p.dilation_h = s.dilation[1], p.dilation_w = s.dilation[2];
  p.weight = c.packed.as<float>();
  p.out = c.y.memory.data();
  p.out_h = c.out[1], p.out_w = c.out[2];
  p.bias = c.g.bias;
  p.bias_dtype = c.g.bias_dtype;
  p.activation = c.g.activation;
  p.slope = c.g.slope;
  if (!c.g.residual) return;
  c.residual_planes = Exact(c.y.memory.bytes());
  const int64_t plane = c.out[1] * c.out[2];
  for (int64_t row = 0; row < c.rows(); row++)
    for (int64_t n = 0; n < s.n; n++)
      put(c.g.c_dtype, c.residual_planes.data(), (row / plane * s.n + n) * plane + row % plane,
          static_cast<float>(get(c.g.c_dtype, c.g.residual, row * c.g.residual_row + n)));
  p.residual = c.residual_planes.data();
}

void check_forward(uint64_t seed, const PlanesCase& c) {
  const double terms = static_cast<double>(c.s.c * c.s.taps()) + 4;  // one chain
  const std::vector<Expected> expected = c.expected([&](int64_t, double size) { return size * terms * 0x1p-23; });
  const std::string what = std::string("planes of ") + name(c.x.dtype) + ", " + c.describe();
  const auto run = [&](Rng& rng, const Kernels& kernel) {
    clear(c.y);
    for (int64_t image = 0; image < c.s.batch; image++)
      for (const Range& rows : cut(rng, c.out[1], 1)) kernel.conv_planes(c.p, image, rows);
  };
  for (Isa isa : tiers()) {
    Rng rng(seed);
    const Kernels& kernel = kernels_of(isa);
    run(rng, kernel);
    check_image(c.y, expected, isa, what);
    const std::vector<char> before = bytes_of(c.y);
    run(rng, kernel);
    CHECK(same(c.y, before), "%s: %s: depends on how it is cut", isa_name(isa), what.c_str());
  }
}

// Sums of sixteen lanes for each weight; dy lies as the output does. A NaN in it spoils its own filter only.
void check_gradient(uint64_t seed, const PlanesCase& c) {
  Rng operands(seed);
  const ConvShape& s = c.s;
  const Image dy = random_image(operands, c.x.dtype, s.batch, s.n, c.out, Gaps::none, true);
  const int64_t count = s.n * s.c * s.taps(), pixels = c.rows(), bad = operands.chance(3) ? operands.below(s.n) : -1;
  if (bad >= 0) put(dy.dtype, dy.memory.data(), dy.offset(0, 0, 0, 0, bad), NAN);
  std::vector<Expected> expected;
  for (int64_t i = 0; i < count; i++) {
    const int64_t n = i / (s.c * s.taps()), channel = i / s.taps() % s.c, tap = i % s.taps();
    double sum = 0, size = 0;
    for (int64_t row = 0; row < pixels; row++) {
      const int64_t b = row / (c.out[1] * c.out[2]), y = row / c.out[2] % c.out[1], x = row % c.out[2];
      const int64_t h = c.reads(1, y, tap / s.kernel[2]), w = c.reads(2, x, tap % s.kernel[2]);
      if (h < 0 || w < 0) continue;
      const double v = dy.at(b, 0, y, x, n) * c.x.at(b, 0, h, w, channel);
      sum += v, size += std::fabs(v);
    }
    expected.push_back({sum, size * static_cast<double>(pixels / kPanel + 4) * 0x1p-23});
  }
  for (Isa isa : tiers()) {
    Rng rng(seed);
    const Exact sums(count * kGroupBytes, 4), again(count * kGroupBytes, 4);
    for (const Exact* e : {&sums, &again}) {
      std::memset(e->data(), 0, static_cast<size_t>(e->bytes()));
      for (const Range& images : cut(rng, s.batch, 1))
        kernels_of(isa).conv_planes_gradient(c.p, dy.memory.data(), images, e->as<float>());
    }
    CHECK(std::memcmp(sums.data(), again.data(), static_cast<size_t>(sums.bytes())) == 0,
          "%s: the gradient of %s depends on how it is cut", isa_name(isa), c.describe().c_str());
    for (int64_t i = 0; i < count; i++) {
      double got = 0;
      for (int64_t lane = 0; lane < kPanel; lane++) got += static_cast<double>(sums.as<float>()[i * kPanel + lane]);
      const Expected& e = expected[static_cast<size_t>(i)];
      CHECK(i / (s.c * s.taps()) == bad || e.admits(got),
            "%s: the gradient of %s at %lld is %.9g, expected %.9g ± %.2g", isa_name(isa), c.describe().c_str(),
            (long long)i, got, e.y, e.bound);
    }
  }
}

}  // namespace

void test_conv_planes(const Options& options) {
  for (int i = 0; i < options.iterations * 3; i++) {
    const uint64_t seed = options.seed * 1000003 + static_cast<uint64_t>(i);
    Rng rng(seed);
    PlanesCase c;
    random_case(rng, c);
    attach(c);
    check_forward(seed, c);
    if (i % 2 == 0) check_gradient(seed, c);
  }
}

}  // namespace pbm::test
