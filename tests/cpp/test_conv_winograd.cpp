// Winograd's convolutions on every tier: packed filters, outputs, the tiles of a weight gradient and what comes of their
// products, against the definitions in double; tiles and panels cut anywhere, to the same bits.
#include "conv_case.h"

namespace pbm::test {
namespace {

struct Matrix {
  int rows, columns;
  double m[6][6];
};

// Bᵀ, Aᵀ and G of Lavin and Gray.
Matrix input_of(int m) {
  if (m == 2) return {4, 4, {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}}};
  return {6,
          6,
          {{4, 0, -5, 0, 1, 0},
           {0, -4, -4, 1, 1, 0},
           {0, 4, -4, -1, 1, 0},
           {0, -2, -1, 2, 1, 0},
           {0, 2, -1, -2, 1, 0},
           {0, 4, 0, -5, 0, 1}}};
}

Matrix output_of(int m) {
  if (m == 2) return {2, 4, {{1, 1, 1, 0}, {0, 1, -1, -1}}};
  return {4, 6, {{1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0}, {0, 1, -1, 8, -8, 1}}};
}

Matrix filter_of(int m) {
  if (m == 2) return {4, 3, {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}}};
  return {6,
          3,
          {{1. / 4, 0, 0},
           {-1. / 6, -1. / 6, -1. / 6},
           {-1. / 6, 1. / 6, -1. / 6},
           {1. / 24, 1. / 12, 1. / 6},
           {1. / 24, -1. / 12, 1. / 6},
           {0, 0, 1}}};
}

Matrix transpose(const Matrix& a) {
  Matrix t{a.columns, a.rows, {}};
  for (int i = 0; i < a.rows; i++)
    for (int j = 0; j < a.columns; j++) t.m[j][i] = a.m[i][j];
  return t;
}

// Element (i, j) of L d Lᵀ, which fp32 may have off by a few roundings of every product.
template <class F>
Expected sandwich(const Matrix& l, int i, int j, const F& d) {
  double sum = 0, size = 0;
  for (int p = 0; p < l.columns; p++)
    for (int q = 0; q < l.columns; q++) {
      const double x = l.m[i][p] * d(p, q) * l.m[j][q];
      sum += x;
      size += std::fabs(x);
    }
  return {sum, size * 16 * 0x1p-24 + 0x1p-140};
}

// A case of fp32 and its packed weight, which is read with strides of any sign.
struct WinogradCase : ConvCase {
  Winograd p{};
  Exact packed;

  int64_t tiles() const { return s.batch * ceil_div(out[1], p.m) * ceil_div(out[2], p.m); }
  int64_t panels() const { return ceil_div(s.n, kPanel); }
  // The first output of a tile.
  void tile(int64_t i, int64_t* b, int64_t* h, int64_t* w) const {
    const int64_t across = ceil_div(out[2], p.m), down = ceil_div(out[1], p.m);
    *b = i / (across * down), *h = i / across % down * p.m, *w = i % across * p.m;
  }
  double x_at(int64_t b, int64_t h, int64_t w, int64_t channel) const {
    return h < 0 || h >= s.in[1] || w < 0 || w >= s.in[2] ? 0 : x.at(b, 0, h, w, channel);
  }
};

// deep: sums in parts of 256.
void random_case(Rng& rng, WinogradCase& c, bool deep) {
  constexpr int64_t kIn[] = {1, 3, 15, 16, 17, 33}, kOut[] = {1, 15, 16, 17, 40, 70};
  ConvShape& s = c.s;
  c.p.m = rng.chance(2) ? 2 : 4;
  do {
    s = plain_shape();
    s.batch = rng.between(1, 3);
    s.groups = rng.chance(3) ? 2 : 1;
    s.c = deep ? rng.between(257, 530) : rng.chance(20) ? 0 : rng.of(kIn);
    s.n = deep ? rng.between(1, 18) : rng.of(kOut);
    for (int axis = 1; axis < 3; axis++) {
      s.kernel[axis] = 3;
      s.in[axis] = rng.between(1, deep ? 4 : 13);
      s.pad[axis] = rng.below(4);
      s.pad_end[axis] = rng.chance(2) ? s.pad[axis] : rng.between(-1, 3);
    }
    for (int axis = 0; axis < 3; axis++) c.out[axis] = s.out(axis);
  } while (c.rows() == 0 || c.steps() > 500000);
  choose_y_dtype(rng, c.g, true);
  choose_operands(rng, c, DType::f32, DType::f32, Gaps::all, Gaps::pixels);
}

// Filters to U, from a copy in which the taps, the channels or neither come first, and may be turned around.
void check_pack(Rng& rng, WinogradCase& c, const Kernels& kernel) {
  const ConvShape& s = c.s;
  const int places = (c.p.m + 2) * (c.p.m + 2);
  const bool turned = rng.chance(2), taps_inside = rng.chance(2);
  WinogradPack p{c.p.m, s.groups, s.n, s.c, nullptr, 9 * s.c * s.n, 9 * s.c, 1, 3 * s.c, s.c, nullptr};
  if (taps_inside) p.w_c = 9, p.w_h = 3, p.w_w = 1;
  const Exact filters(9 * s.c * s.n_all() * 4);
  if (turned) p.w_h = -p.w_h, p.w_w = -p.w_w;
  p.w = filters.as<float>() + (turned && s.c ? -2 * (p.w_h + p.w_w) : 0);
  for (int64_t n = 0; n < s.n_all(); n++)
    for (int64_t i = 0; i < s.c; i++)
      for (int64_t t = 0; t < 9; t++)
        const_cast<float*>(p.w)[n * p.w_n + i * p.w_c + t / 3 * p.w_h + t % 3 * p.w_w] =
            static_cast<float>(c.weight_at(n, t, i));
  c.packed = Exact(s.groups * c.panels() * places * s.c * kGroupBytes);
  p.out = c.packed.as<float>();
  for (const Range& r : cut(rng, s.groups * c.panels(), 1)) kernel.pack_winograd(p, r.begin, r.end);
  const Matrix g = filter_of(c.p.m);
  for (int64_t panel = 0; panel < s.groups * c.panels(); panel++)
    for (int place = 0; place < places; place++)
      for (int64_t i = 0; i < s.c; i++)
        for (int64_t j = 0; j < kPanel; j++) {
          const int64_t n = panel % c.panels() * kPanel + j, channel = panel / c.panels() * s.n + n;
          const Expected e = n < s.n ? sandwich(
                                           g, place / (c.p.m + 2), place % (c.p.m + 2),
                                           [&](int h, int w) { return c.weight_at(channel, h * 3 + w, i); })
                                     : Expected{0, 0};
          const float got = p.out[((panel * places + place) * s.c + i) * kPanel + j];
          CHECK(e.admits(got), "%s: F(%d): U of filter %lld, channel %lld, place %d is %g, expected %g",
                isa_name(kernel.isa), c.p.m, (long long)channel, (long long)i, place, static_cast<double>(got), e.y);
        }
}

void attach(WinogradCase& c) {
  Conv& conv = c.p.conv;
  conv.batch = c.s.batch;
  conv.groups = c.s.groups;
  conv.c = c.s.c;
  conv.x = c.x.view();
  conv.weight = c.packed.data();
  conv.taps = 9;
  conv.out_rows = c.g;
  for (int axis = 0; axis < 3; axis++) conv.out[axis] = c.out[axis];
  for (int i = 0; i < 2; i++) c.p.pad[i] = c.s.pad[i + 1];
}

void run(Rng& rng, const WinogradCase& c, const Kernels& kernel) {
  clear(c.y);
  for (int64_t group = 0; group < c.s.groups; group++)
    for (const Range& tiles : cut(rng, c.tiles(), 1))
      for (const Range& panels : cut(rng, c.panels(), 1)) kernel.conv_winograd(c.p, group, tiles, panels);
}

// A bad pixel spoils the outputs that see it, perhaps others of the tiles that read it, and no more.
void check_spread(Rng& rng, const WinogradCase& c, const Kernels& kernel) {
  if (c.s.c == 0) return;
  run(rng, c, kernel);
  const std::vector<char> clean = bytes_of(c.y);
  const int64_t b = rng.below(c.s.batch), h = rng.below(c.s.in[1]), w = rng.below(c.s.in[2]),
                k = rng.below(c.x.channels);
  float& pixel = c.x.memory.as<float>()[c.x.offset(b, 0, h, w, k)];
  const float kept = pixel;
  pixel = rng.chance(2) ? NAN : INFINITY;
  run(rng, c, kernel);
  pixel = kept;
  const int m = c.p.m;
  c.y.each([&](int64_t image, int64_t, int64_t i, int64_t j, int64_t n) {
    const int64_t down = h - (i - c.p.pad[0]), across = w - (j - c.p.pad[1]);  // from the output's first pixel
    const int64_t tile_down = h - (i / m * m - c.p.pad[0]), tile_across = w - (j / m * m - c.p.pad[1]);
    const bool here = image == b && n / c.s.n == k / c.s.c;
    const bool read = here && tile_down >= 0 && tile_down < m + 2 && tile_across >= 0 && tile_across < m + 2;
    const bool seen = here && down >= 0 && down < 3 && across >= 0 && across < 3;
    const int64_t at = c.y.offset(image, 0, i, j, n);
    const float got = c.y.memory.as<float>()[at];
    float before;
    std::memcpy(&before, &clean[static_cast<size_t>(at) * 4], 4);
    CHECK(read || got == before, "%s: %s: F(%d): a bad pixel came to output (%lld, %lld)", isa_name(kernel.isa),
          c.describe().c_str(), m, (long long)i, (long long)j);
    CHECK(!seen || !std::isfinite(got), "%s: %s: F(%d): output (%lld, %lld) hides a bad pixel", isa_name(kernel.isa),
          c.describe().c_str(), m, (long long)i, (long long)j);
  });
}

void check_forward(uint64_t seed, WinogradCase& c) {
  double largest = 0;
  c.x.each([&](int64_t b, int64_t d, int64_t h, int64_t w, int64_t k) {
    largest = std::fmax(largest, std::fabs(c.x.at(b, d, h, w, k)));
  });
  std::vector<double> weights(static_cast<size_t>(c.s.n_all()));
  for (int64_t n = 0; n < c.s.n_all(); n++)
    for (int64_t i = 0; i < 9 * c.s.c; i++) weights[n] += std::fabs(c.weight_at(n, i % 9, i / 9));
  // The bounds of docs/numerics.md.
  const double off = c.p.m == 2 ? 1e-6 : 4e-5;
  const std::vector<Expected> expected =
      c.expected([&](int64_t n, double) { return off * largest * weights[static_cast<size_t>(n)]; });
  for (Isa isa : tiers()) {
    Rng rng(seed);
    const Kernels& kernel = kernels_of(isa);
    const std::string what = c.describe() + (c.p.m == 2 ? ", F(2)" : ", F(4)");
    check_pack(rng, c, kernel);
    attach(c);
    run(rng, c, kernel);
    check_image(c.y, expected, isa, what);
    const std::vector<char> before = bytes_of(c.y);
    run(rng, c, kernel);
    CHECK(same(c.y, before), "%s: %s: depends on how it is cut", isa_name(isa), what.c_str());
    if (c.g.c_dtype == DType::f32 && c.g.activation == Activation::none) check_spread(rng, c, kernel);
  }
}

// [place][tile][channel], rows filled up to whole registers.
struct Tiles {
  Exact memory;
  int64_t channels, row, next;

  Tiles(Rng& rng, int64_t places, int64_t tiles, int64_t n)
      : channels(ceil_div(n, kPanel) * kPanel),
        row(channels + rng.below(3)),
        next(tiles * row - (row - channels) + rng.below(3)) {
    memory = Exact(((places - 1) * next + (tiles - 1) * row + channels) * 4, 4, kGuard);
  }
  float at(int64_t place, int64_t tile, int64_t i) const { return memory.as<float>()[place * next + tile * row + i]; }
  bool guarded(int64_t places, int64_t tiles) const {
    const float guard = float_of(0xa5a5a5a5u);
    bool all = true;
    for (int64_t i = 0; i < memory.bytes() / 4; i++) {
      const int64_t place = std::min(i / next, places - 1), rest = i - place * next;
      const bool tile = rest < tiles * row && rest % row < channels;
      all = all && (tile || memory.as<float>()[i] == guard);
    }
    return all;
  }
};

// Bᵀ d B and A dy Aᵀ; then, from their products, the gradient of the weight.
void check_gradient(uint64_t seed, WinogradCase& c) {
  Rng operands(seed);
  const ConvShape& s = c.s;
  const int64_t size[3] = {1, c.out[1], c.out[2]}, m = c.p.m, t = m + 2, places = t * t, tiles = c.tiles();
  const Image dy = random_image(operands, DType::f32, s.batch, s.n_all(), size, Gaps::all);
  const Matrix in = input_of(c.p.m), out = transpose(output_of(c.p.m)), filter = transpose(filter_of(c.p.m));
  for (Isa isa : tiers()) {
    Rng rng(seed);
    const Kernels& kernel = kernels_of(isa);
    const int64_t group = rng.below(s.groups);
    Tiles x_tiles(rng, places, tiles, s.c), dy_tiles(rng, places, tiles, s.n);
    WinogradTiles g{c.p, dy.view(), s.n, nullptr, nullptr, x_tiles.row, dy_tiles.row, x_tiles.next, dy_tiles.next};
    for (const Range& r : cut(rng, tiles, 1)) {
      g.x_tiles = x_tiles.memory.as<float>() + r.begin * x_tiles.row;
      g.dy_tiles = dy_tiles.memory.as<float>() + r.begin * dy_tiles.row;
      kernel.winograd_gradient_tiles(g, group, r);
    }
    CHECK(x_tiles.guarded(places, tiles) && dy_tiles.guarded(places, tiles), "%s: tiles wrote beside their rows",
          isa_name(isa));
    for (int64_t i = 0; i < tiles * places; i++) {
      int64_t b, h, w;
      c.tile(i / places, &b, &h, &w);
      const int place = static_cast<int>(i % places), down = place / static_cast<int>(t),
                across = place % static_cast<int>(t);
      for (int64_t k = 0; k < x_tiles.channels; k++) {
        const Expected e =
            k < s.c ? sandwich(
                          in, down, across,
                          [&](int p, int q) { return c.x_at(b, h - s.pad[1] + p, w - s.pad[2] + q, group * s.c + k); })
                    : Expected{0, 0};
        CHECK(e.admits(x_tiles.at(place, i / places, k)), "%s: F(%d): Bᵀ d B at %d is %g, expected %g", isa_name(isa),
              c.p.m, place, static_cast<double>(x_tiles.at(place, i / places, k)), e.y);
      }
      for (int64_t k = 0; k < dy_tiles.channels; k++) {
        const auto dy_at = [&](int p, int q) {
          return h + p < c.out[1] && w + q < c.out[2] ? dy.at(b, 0, h + p, w + q, group * s.n + k) : 0;
        };
        const Expected e = k < s.n ? sandwich(out, down, across, dy_at) : Expected{0, 0};
        CHECK(e.admits(dy_tiles.at(place, i / places, k)), "%s: F(%d): A dy Aᵀ at %d is %g, expected %g", isa_name(isa),
              c.p.m, place, static_cast<double>(dy_tiles.at(place, i / places, k)), e.y);
      }
    }
    // Gᵀ M G of any sums.
    const int64_t count = kPanel * rng.between(1, 3), next = count + rng.below(3), out_next = count + rng.below(3);
    const Exact sums = random_elements(rng, DType::f32, (places - 1) * next + count), nine((8 * out_next + count) * 4);
    kernel.winograd_gradient_output(c.p.m, sums.as<float>(), next, nine.as<float>(), out_next, count);
    for (int64_t i = 0; i < 9 * count; i++) {
      const int64_t tap = i / count, at = i % count;
      const Expected e = sandwich(filter, static_cast<int>(tap / 3), static_cast<int>(tap % 3),
                                  [&](int p, int q) { return sums.as<float>()[(p * t + q) * next + at]; });
      const float got = nine.as<float>()[tap * out_next + at];
      CHECK(e.admits(got), "%s: F(%d): Gᵀ M G at %lld is %g, expected %g", isa_name(isa), c.p.m, (long long)tap,
            static_cast<double>(got), e.y);
    }
  }
}

}  // namespace

void test_conv_winograd(const Options& options) {
  for (int i = 0; i < options.iterations / 2; i++) {
    const uint64_t seed = options.seed * 1000003 + static_cast<uint64_t>(i);
    Rng rng(seed);
    WinogradCase c;
    random_case(rng, c, i % 8 == 7);
    check_forward(seed, c);
    if (i % 2 == 0) check_gradient(seed, c);
  }
}

}  // namespace pbm::test
