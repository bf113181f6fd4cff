// Depthwise convolutions on every tier: kernels of 1 to 7 taps an axis and of none, strides, dilations, paddings of any
// sign, outputs that lie apart; cut into rows and channels anywhere, to the same bits.
#include "conv_case.h"

namespace pbm::test {
namespace {

// Kernels, and as the parts of a transposed convolution have them: outputs that the input does not determine, no tap.
void choose_window(Rng& rng, ConvCase& c, int axis, int64_t longest) {
  ConvShape& s = c.s;
  choose_axis(rng, s, axis, longest);
  s.kernel[axis] = rng.chance(20) ? 0 : rng.between(1, 7);
  s.pad[axis] = rng.between(-2, s.kernel[axis]);
  c.out[axis] = rng.chance(4) ? rng.between(1, longest) : s.out(axis);
}

void random_case(Rng& rng, ConvCase& c) {
  constexpr int64_t kChannels[] = {1, 2, 7, 15, 16, 17, 31, 32, 33, 50};
  constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};
  ConvShape& s = c.s;
  do {
    s = plain_shape();
    s.batch = rng.between(1, 3);
    s.groups = rng.of(kChannels);
    for (int64_t& size : c.out) size = 1;
    if (rng.chance(3)) choose_window(rng, c, 0, 4);
    if (!rng.chance(4)) choose_window(rng, c, 1, 9);
    choose_window(rng, c, 2, 25);
  } while (c.rows() == 0 || c.steps() > 150000);
  choose_y_dtype(rng, c.g, false);
  choose_operands(rng, c, rng.of(kFloats), DType::f32, Gaps::all, Gaps::all);
  if (rng.chance(4)) poison(rng, c);
}

// [16 channels][tap][16]
Exact packed(const ConvCase& c) {
  const int64_t taps = c.s.taps();
  Exact weight(ceil_div(c.s.groups, kPanel) * taps * kGroupBytes, 0, 0);
  for (int64_t g = 0; g < c.s.groups; g++)
    for (int64_t t = 0; t < taps; t++)
      weight.as<float>()[(g / kPanel * taps + t) * kPanel + g % kPanel] = static_cast<float>(c.weight_at(g, t, 0));
  return weight;
}

Depthwise depthwise_of(const ConvCase& c, const Exact& weight) {
  Depthwise p{};
  p.conv.batch = c.s.batch;
  p.conv.groups = c.s.groups;
  p.conv.c = 1;
  p.conv.x = c.x.view();
  p.conv.weight = weight.data();
  p.conv.taps = c.s.taps();
  p.conv.out_rows = c.g;
  p.dtype = c.x.dtype;
  p.out_batch = c.y.batch_stride;
  for (int axis = 0; axis < 3; axis++) {
    p.conv.out[axis] = c.out[axis];
    p.kernel[axis] = c.s.kernel[axis];
    p.stride[axis] = c.s.stride[axis];
    p.pad[axis] = c.s.pad[axis];
    p.dilation[axis] = c.s.dilation[axis];
    p.out_stride[axis] = c.y.stride[axis];
  }
  return p;
}

void run(Rng& rng, const ConvCase& c, const Depthwise& p, const Kernels& kernel) {
  clear(c.y);
  for (const Range& rows : cut(rng, c.s.batch * c.out[0] * c.out[1], 1))
    for (const Range& blocks : cut(rng, ceil_div(c.s.groups, kPanel), 1)) kernel.conv_depthwise(p, rows, blocks);
}

void check_case(uint64_t seed, const ConvCase& c) {
  const Exact weight = packed(c);
  const double terms = static_cast<double>(c.s.taps()) + 4;
  const std::vector<Expected> expected = c.expected([&](int64_t, double size) { return size * terms * 0x1p-23; });
  for (Isa isa : tiers()) {
    Rng rng(seed);
    const Kernels& kernel = kernels_of(isa);
    const Depthwise p = depthwise_of(c, weight);
    const std::string what = std::string("depthwise of ") + name(c.x.dtype) + ", " + c.describe();
    run(rng, c, p, kernel);
    check_image(c.y, expected, isa, what);
    const std::vector<char> before = bytes_of(c.y);
    run(rng, c, p, kernel);
    CHECK(same(c.y, before), "%s: %s: depends on how it is cut", isa_name(isa), what.c_str());
  }
}

}  // namespace

void test_conv_depthwise(const Options& options) {
  for (int i = 0; i < options.iterations * 3; i++) {
    const uint64_t seed = options.seed * 1000003 + static_cast<uint64_t>(i);
    Rng rng(seed);
    ConvCase c;
    random_case(rng, c);
    check_case(seed, c);
  }
}

}  // namespace pbm::test
