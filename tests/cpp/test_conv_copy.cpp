// Images between layouts and dtypes on every tier: each pair of floats both ways and bytes, special values, zeros around rows.
#include "conv_case.h"

namespace pbm::test {
namespace {

constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};

// Values whose conversion is not an ordinary one: ties, the ends of the ranges of bf16 and half, subnormals.
float special(Rng& rng) {
  constexpr float kSpecial[] = {INFINITY, -INFINITY, NAN,        -0.f,      65504.f,     65519.9f, 65520.f, -1e6f,
                                0x1p-24f, 0x1p-25f,  0x1.8p-25f, 0x1p-140f, 1.00390625f, 3.4e38f,  2049.f};
  return rng.of(kSpecial);
}

void check_copy(uint64_t seed, Isa isa, DType from, DType to, bool x_planes, bool y_planes) {
  constexpr int64_t kChannels[] = {1, 2, 3, 15, 16, 17, 31, 32, 33, 50};
  Rng rng(seed);
  const int64_t channels = rng.of(kChannels), batch = rng.between(1, 2);
  const int64_t size[3] = {rng.between(1, 2), rng.between(1, 3), rng.chance(4) ? 1 : rng.between(1, 40)};
  Image x = random_image(rng, from, batch, channels, size, Gaps::all, x_planes);
  x.each([&](int64_t b, int64_t d, int64_t h, int64_t w, int64_t c) {
    if (from != DType::u8 && rng.chance(10)) put(from, x.memory.data(), x.offset(b, d, h, w, c), special(rng));
  });
  // Zeros are pixels of an image whose pixels lie side by side.
  const int64_t before = y_planes ? 0 : rng.below(3), after = y_planes ? 0 : rng.below(3);
  const int64_t wide[3] = {size[0], size[1], before + size[2] + after};
  const Image y = image_of(rng, to, batch, channels, wide, before + after ? Gaps::none : Gaps::all, y_planes);
  ConvCopy p{};
  p.batch = batch;
  p.channels = channels;
  p.x = x.memory.data();
  p.x_dtype = from;
  p.x_batch = x.batch_stride;
  p.x_channel = x.channel_stride;
  p.out = y.memory.data() + before * y.stride[2] * size_of(to);
  p.out_dtype = to;
  p.out_batch = y.batch_stride;
  p.out_channel = y.channel_stride;
  p.zeros_before = before;
  p.zeros_after = after;
  for (int axis = 0; axis < 3; axis++) {
    p.size[axis] = size[axis];
    p.x_stride[axis] = x.stride[axis];
    p.out_stride[axis] = y.stride[axis];
  }
  clear(y);
  for (const Range& rows : cut(rng, batch * size[0] * size[1], 1)) kernels_of(isa).conv_copy(p, rows.begin, rows.end);
  std::vector<Expected> expected;
  y.each([&](int64_t b, int64_t d, int64_t h, int64_t w, int64_t c) {
    const bool there = w >= before && w < before + size[2];
    char element[4];
    put(to, element, 0, there ? static_cast<float>(x.at(b, d, h, w - before, c)) : 0.f);
    expected.push_back({get(to, element, 0), 0});
  });
  check_image(y, expected, isa,
              std::string("copy of ") + name(from) + (x_planes ? " planes" : " pixels") + " to " + name(to) +
                  (y_planes ? " planes" : " pixels"));
}

}  // namespace

void test_conv_copy(const Options& options) {
  for (int i = 0; i < options.iterations / 10; i++) {
    for (int planes = 0; planes < 4; planes++)
      for (Isa isa : tiers())
        check_copy(options.seed * 1000003 + static_cast<uint64_t>(i), isa, DType::u8, DType::u8, planes & 1,
                   planes & 2);
    for (DType from : kFloats)
      for (DType to : kFloats)
        for (int planes = 0; planes < 4; planes++)
          for (Isa isa : tiers())
            check_copy(options.seed * 1000003 + static_cast<uint64_t>(i), isa, from, to, planes & 1, planes & 2);
  }
}

}  // namespace pbm::test
