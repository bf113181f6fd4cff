// Transposed convolutions to few channels on every tier: strides, paddings and kernels beyond the image, rows cut
// anywhere, to the same bits; what is not finite reaches only the outputs that see it.
#include "conv_case.h"

namespace pbm::test {
namespace {

struct SpreadCase : ConvCase {
  ConvSpread p{};
  Exact packed;
};

void random_case(Rng& rng, SpreadCase& c) {
  constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};
  ConvShape& s = c.s;
  c.transposed = true;
  do {
    s = plain_shape();
    s.batch = rng.between(1, 3);
    s.c = rng.chance(20) ? 0 : rng.between(1, 40);
    choose_axis(rng, s, 1, 9);
    choose_axis(rng, s, 2, 40);
    s.dilation[2] = 1;
    s.kernel[2] = rng.between(1, 7);
    s.n = rng.between(1, kSpreadVectors * kPanel / s.kernel[2]);
    for (int axis = 0; axis < 3; axis++)
      c.out[axis] = axis == 0 ? 1 : rng.between(1, (s.in[axis] - 1) * s.stride[axis] + s.kernel[axis] + 2);
  } while (c.steps() > 300000);
  c.x = random_image(rng, DType::f32, s.batch, s.c, s.in, Gaps::all);
  c.weight = random_elements(rng, DType::f32, s.n * s.taps() * s.c);
  c.g.n = s.n;
  c.g.c_dtype = rng.of(kFloats);
  c.y = image_of(rng, c.g.c_dtype, s.batch, s.n, c.out, Gaps::none);
  if (rng.chance(4)) poison(rng, c);
  c.g.activation = Activation::none;
}

// Filters as [tap row][c][vectors of (tap, n)], and what the case says otherwise.
void attach(SpreadCase& c) {
  const ConvShape& s = c.s;
  const int64_t lanes = ceil_div(s.kernel[2] * s.n, kPanel) * kPanel;
  c.packed = Exact(s.kernel[1] * s.c * lanes * 4, 0, 0);
  for (int64_t i = 0; i < s.kernel[1]; i++)
    for (int64_t k = 0; k < s.c; k++)
      for (int64_t j = 0; j < s.kernel[2]; j++)
        for (int64_t n = 0; n < s.n; n++)
          c.packed.as<float>()[(i * s.c + k) * lanes + j * s.n + n] =
              static_cast<float>(c.weight_at(n, i * s.kernel[2] + j, k));
  ConvSpread& p = c.p;
  p.n = s.c, p.c = s.n;
  p.dy = c.x.view();
  p.kernel_h = s.kernel[1], p.kernel_w = s.kernel[2];
  p.stride_h = s.stride[1], p.stride_w = s.stride[2];
  p.pad_h = s.pad[1], p.pad_w = s.pad[2];
  p.dilation_h = s.dilation[1];
  p.weight = c.packed.as<float>();
  p.out = c.y.memory.data();
  p.dtype = c.y.dtype;
  p.out_h = c.out[1], p.out_w = c.out[2];
}

}  // namespace

void test_conv_spread(const Options& options) {
  for (int i = 0; i < options.iterations * 3; i++) {
    const uint64_t seed = options.seed * 1000003 + static_cast<uint64_t>(i);
    Rng start(seed);
    SpreadCase c;
    random_case(start, c);
    attach(c);
    const double terms = static_cast<double>(c.s.c * c.s.kernel[1] + c.s.kernel[2]) + 2;  // chains, then their sum
    const std::vector<Expected> expected = c.expected([&](int64_t, double size) { return size * terms * 0x1p-23; });
    const std::string what = std::string("spread to ") + name(c.y.dtype) + ", " + c.describe();
    const auto run = [&](Rng& rng, const Kernels& kernel) {
      clear(c.y);
      for (const Range& rows : cut(rng, c.s.batch * c.out[1], 1)) kernel.conv_spread(c.p, rows.begin, rows.end);
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
}

}  // namespace pbm::test
