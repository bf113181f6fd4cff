// The choice of an algorithm and of how it is cut over threads: pure functions of the shape.
#include "conv_case.h"

namespace pbm::test {
namespace {

constexpr Flavour kFlavours[] = {Flavour::f32, Flavour::bf16, Flavour::u8s8};

ConvShape random_shape(Rng& rng) {
  constexpr int64_t kChannels[] = {1, 1, 3, 8, 15, 16, 17, 32, 64, 128, 512, 1024};
  ConvShape s = plain_shape();
  s.batch = rng.below(4);
  s.groups = rng.chance(3) ? rng.between(2, 64) : 1;
  s.c = rng.of(kChannels);
  s.n = rng.of(kChannels);
  if (rng.chance(4)) choose_axis(rng, s, 0, 9);
  choose_axis(rng, s, 1, 60);
  choose_axis(rng, s, 2, 60);
  if (rng.chance(2))
    for (int axis = 1; axis < 3; axis++) s.kernel[axis] = 3, s.stride[axis] = s.dilation[axis] = 1;
  return s;
}

// Outputs are the places where a kernel fits into the padded image.
void test_out(Rng& rng) {
  const ConvShape s = random_shape(rng);
  for (int axis = 0; axis < 3; axis++) {
    int64_t count = 0;
    const int64_t end = s.in[axis] + s.pad[axis] + s.pad_end[axis];
    for (int64_t at = 0; at + (s.kernel[axis] - 1) * s.dilation[axis] < end; at += s.stride[axis]) count++;
    CHECK(s.out(axis) == count, "out(%d) is %lld, expected %lld", axis, (long long)s.out(axis), (long long)count);
  }
}

void test_choice(Rng& rng) {
  const ConvShape s = random_shape(rng);
  for (Flavour flavour : kFlavours)
    for (int i = 0; i < 4; i++) {
      const bool exact = i & 1, planes = i & 2;
      const ConvAlgorithm a = choose_conv(s, flavour, exact, planes);
      const bool winograd = a == ConvAlgorithm::winograd2 || a == ConvAlgorithm::winograd4;
      CHECK(a != ConvAlgorithm::automatic, "%s: nothing was chosen", name(flavour));
      CHECK(conv_admits(s, flavour, a), "%s: algorithm %d was chosen, which cannot compute it", name(flavour),
            static_cast<int>(a));
      CHECK(!winograd || (!exact && flavour == Flavour::f32), "%s: Winograd was chosen, exact %d", name(flavour),
            exact);
      CHECK(a != ConvAlgorithm::planes || planes, "%s: planes were chosen for an image of pixels", name(flavour));
    }
  for (Flavour flavour : kFlavours)
    CHECK(conv_admits(s, flavour, ConvAlgorithm::direct), "%s: direct is refused", name(flavour));
}

// What each algorithm needs, taken away one by one.
void test_refusals() {
  const auto refuses = [](ConvAlgorithm a, const ConvShape& from, const char* what, auto change) {
    CHECK(conv_admits(from, Flavour::f32, a), "algorithm %d is refused", static_cast<int>(a));
    ConvShape s = from;
    change(s);
    CHECK(!conv_admits(s, Flavour::f32, a), "algorithm %d is admitted with %s", static_cast<int>(a), what);
  };
  ConvShape square = plain_shape();
  square.c = square.n = 64;
  square.in[1] = square.in[2] = 20;
  square.kernel[1] = square.kernel[2] = 3;
  for (ConvAlgorithm a : {ConvAlgorithm::winograd2, ConvAlgorithm::winograd4}) {
    refuses(a, square, "depth", [](ConvShape& s) { s.in[0] = 2; });
    refuses(a, square, "padded depth", [](ConvShape& s) { s.pad_end[0] = 1; });
    for (int axis = 1; axis < 3; axis++) {
      refuses(a, square, "a stride", [=](ConvShape& s) { s.stride[axis] = 2; });
      refuses(a, square, "a dilation", [=](ConvShape& s) { s.dilation[axis] = 2; });
      refuses(a, square, "another kernel", [=](ConvShape& s) { s.kernel[axis] = 5; });
    }
    CHECK(!conv_admits(square, Flavour::bf16, a) && !conv_admits(square, Flavour::u8s8, a), "Winograd is fp32's");
  }
  ConvShape few = square;
  few.c = few.n = 3;
  refuses(ConvAlgorithm::planes, few, "groups", [](ConvShape& s) { s.groups = 2; });
  refuses(ConvAlgorithm::planes, few, "a stride", [](ConvShape& s) { s.stride[2] = 2; });
  refuses(ConvAlgorithm::planes, few, "long sums", [](ConvShape& s) { s.c = 45; });
  refuses(ConvAlgorithm::planes, few, "an image beyond L2", [](ConvShape& s) { s.in[1] = s.in[2] = 1000; });
  refuses(ConvAlgorithm::direct_rows, few, "groups", [](ConvShape& s) { s.groups = 2; });
  refuses(ConvAlgorithm::direct_rows, few, "a dilation", [](ConvShape& s) { s.dilation[2] = 2; });
  ConvShape single = square;
  single.groups = 64;
  single.c = single.n = 1;
  refuses(ConvAlgorithm::depthwise, single, "two inputs", [](ConvShape& s) { s.c = 2; });
  refuses(ConvAlgorithm::depthwise, single, "two outputs", [](ConvShape& s) { s.n = 2; });
}

// Shapes whose algorithm docs/convolution.md names.
void test_known() {
  ConvShape s = plain_shape();
  const auto choice = [&](bool exact, bool planes) { return choose_conv(s, Flavour::f32, exact, planes); };
  s.c = s.n = 64;
  s.in[1] = s.in[2] = 56;
  CHECK(choice(false, false) == ConvAlgorithm::direct, "1×1 is direct");
  for (int axis = 1; axis < 3; axis++) s.kernel[axis] = 3, s.pad[axis] = s.pad_end[axis] = 1;
  CHECK(choice(false, false) == ConvAlgorithm::winograd4, "64×56 is F(4)");
  CHECK(choice(true, false) == ConvAlgorithm::direct, "exactly, 64×56 is direct");
  s.groups = 64, s.c = s.n = 1;
  CHECK(choice(false, false) == ConvAlgorithm::depthwise, "one filter a channel is depthwise");
  s.groups = 1, s.c = 3, s.n = 64;
  CHECK(choice(false, true) == ConvAlgorithm::direct_rows, "a first layer goes by rows");
  s.c = 1, s.n = 6;
  CHECK(choice(false, true) == ConvAlgorithm::planes, "LeNet's layers are planes");
}

// A cut has at most as many parts as threads, its parts are everything once, and no thread has more to do than if only
// rows were cut, but for what reading weights costs.
void check_cut(const char* what, Grid grid, int64_t rows, int64_t panels, int64_t threads, double most) {
  const bool fits = grid.m >= 1 && grid.n >= 1 && grid.m * grid.n <= threads, idle = (grid.m + 1) * grid.n <= threads;
  CHECK(fits && (!idle || (grid.m == 1 && grid.n == 1)), "%s: %lld×%lld parts for %lld threads", what,
        (long long)grid.m, (long long)grid.n, (long long)threads);
  int64_t covered = 0, busiest = 0;
  for (int64_t i = 0; i < grid.m; i++)
    for (int64_t j = 0; j < grid.n; j++) {
      const Range r = part(rows, 1, grid.m, i), p = part(panels, 1, grid.n, j);
      const int64_t items = (r.end - r.begin) * (p.end - p.begin);
      covered += items;
      busiest = std::max(busiest, items);
    }
  CHECK(covered == rows * panels, "%s: %lld of %lld items are covered", what, (long long)covered,
        (long long)(rows * panels));
  CHECK(static_cast<double>(busiest) <= most, "%s: %lld rows of %lld panels over %lld threads: one has %lld items",
        what, (long long)rows, (long long)panels, (long long)threads, (long long)busiest);
}

void test_cuts(Rng& rng) {
  const int64_t threads = rng.between(1, 40), panels = rng.between(1, 64), lanes = rng.between(1, 512);
  const int64_t rows = rng.chance(3) ? rng.between(1, 50) : rng.between(1, 20000), taps = rng.between(1, 25);
  const Grid grid = direct_grid(rows, 1, taps, lanes, panels, threads);
  const bool worth =
      static_cast<double>(rows * taps) * static_cast<double>(lanes * panels) >= 4096 * static_cast<double>(threads);
  const double height = static_cast<double>(ceil_div(rows, worth ? threads : 1));
  check_cut("direct_grid", grid, rows, panels, threads,
            height * 6 / static_cast<double>(lanes) + (height + 4) * static_cast<double>(panels));
  if (!worth) CHECK(grid.m * grid.n == 1, "direct_grid: %lld rows are not worth threads", (long long)rows);

  const ConvShape s = random_shape(rng);
  for (int m : {2, 4}) {
    const int64_t tiles = s.batch * ceil_div(s.out(1), m) * ceil_div(s.out(2), m), all = ceil_div(s.n, kPanel);
    const double c = static_cast<double>(s.c), p = static_cast<double>(all);
    const double high = static_cast<double>(ceil_div(ceil_div(tiles, threads), 6) * 6);
    check_cut("winograd_grid", winograd_grid(s, m, threads), tiles, all, threads,
              (high * (12 * c / 16 + p * 10) + (high + 4) * p * c) / c);
  }
}

}  // namespace

void test_conv_algorithm(const Options& options) {
  Rng rng(options.seed);
  test_refusals();
  test_known();
  for (int i = 0; i < options.iterations * 20; i++) {
    test_out(rng);
    test_choice(rng);
    test_cuts(rng);
  }
}

}  // namespace pbm::test
