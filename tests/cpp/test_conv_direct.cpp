// Direct convolution on every tier: forward, by rows of the kernel, and as the grids of a transposed convolution; in fp32,
// bf16 and u8·s8; cut into rows and panels as threads cut them, and at any row.
#include "conv_case.h"

namespace pbm::test {
namespace {

enum class Form { forward, rows, transposed, runs };  // runs: rows of an image without padding

bool by_rows(Form form) { return form == Form::rows || form == Form::runs; }

// What a tier's kernel is given.
struct Plan {
  Conv conv{};
  Exact x, zeros, packed;
  std::vector<std::vector<ConvTap>> taps;
  std::vector<ConvGrid> grids;
};

// Elements of one group's channels in a pixel of a copied image.
int64_t group_elements(const ConvCase& c) {
  return c.g.flavour == Flavour::u8s8 ? panel_groups(c.s.c, Flavour::u8s8) * 4 : c.s.c;
}

// Bytes of an element in a copied image, and where element i of a pixel is.
struct Element {
  int64_t size;
  DType dtype;
  bool widened;

  Element(const ConvCase& c, const Kernels& kernel)
      : size(c.g.flavour == Flavour::u8s8 ? kernel.tile.u8_lane_bytes / 4 : size_of(c.x.dtype)),
        dtype(c.x.dtype),
        widened(dtype == DType::u8 && size == 2) {}

  void put(char* pixel, int64_t i, float value) const {
    constexpr int64_t kOrder[] = {0, 2, 1, 3};
    if (!widened) return test::put(dtype, pixel, i, value);
    const uint16_t wide = static_cast<uint16_t>(value);
    std::memcpy(pixel + (i / 4 * 4 + kOrder[i % 4]) * 2, &wide, 2);
  }
};

// The image with its rows' padding, or as whole lanes of bytes. What fills lanes up meets weights of zero: any bytes.
void copy_image(const ConvCase& c, const Kernels& kernel, int64_t before, int64_t after, Plan* plan) {
  const Element element(c, kernel);
  const int64_t group = group_elements(c), pixel = c.s.groups * group, wide = before + c.s.in[2] + after;
  plan->x = Exact(c.x.batch * c.s.in[0] * c.s.in[1] * wide * pixel * element.size, 0, 0x7f);
  ConvImage& view = plan->conv.x;
  view = {plan->x.data(), {c.s.in[0], c.s.in[1], wide}, 0, {}};
  view.stride[2] = pixel * (c.x.dtype == DType::u8 ? element.size : 1);  // of bytes: in bytes
  view.stride[1] = view.stride[2] * wide;
  view.stride[0] = view.stride[1] * c.s.in[1];
  view.batch_stride = view.stride[0] * c.s.in[0];
  const float zero = static_cast<float>(c.x_zero);
  for (int64_t row = 0; row < c.x.batch * c.s.in[0] * c.s.in[1]; row++)
    for (int64_t w = -before; w < c.s.in[2] + after; w++)
      for (int64_t k = 0; k < c.s.c_all(); k++) {
        const int64_t h = row % c.s.in[1], d = row / c.s.in[1] % c.s.in[0], b = row / (c.s.in[1] * c.s.in[0]);
        const bool there = w >= 0 && w < c.s.in[2];
        element.put(plan->x.data() + (row * wide + before + w) * pixel * element.size, k / c.s.c * group + k % c.s.c,
                    there ? static_cast<float>(c.x.at(b, d, h, w, k)) : zero);
      }
}

// Filters as rows of taps, each tap (of rows: each row of them) filled up to whole lanes, packed.
void pack(const ConvCase& c, Form form, Plan* plan) {
  const ConvShape& s = c.s;
  const Flavour flavour = c.g.flavour;
  const int64_t per_lane = k_per_lane(flavour), merged = by_rows(form) ? s.kernel[2] : 1, tap = group_elements(c);
  const int64_t run = ceil_div(merged * tap, per_lane) * per_lane, k = s.taps() / merged * run;
  const int64_t panels = ceil_div(s.n, kPanel);
  const bool sums = flavour == Flavour::u8s8;
  const Exact rows(s.n_all() * k * size_of(c.weight_dtype), 0, 0);
  for (int64_t n = 0; n < s.n_all(); n++)
    for (int64_t t = 0; t < s.taps(); t++)
      for (int64_t i = 0; i < s.c; i++)
        put(c.weight_dtype, rows.data(), n * k + t / merged * run + t % merged * tap + i,
            static_cast<float>(c.weight_at(n, t, i)));
  const int64_t bytes = panels * (panel_groups(k, flavour) + sums) * kGroupBytes;
  plan->packed = Exact(s.groups * bytes);
  for (int64_t g = 0; g < s.groups; g++)
    kernels_of(Isa::scalar)
        .pack_b({s.n, k, flavour, rows.data() + g * s.n * k * size_of(c.weight_dtype), c.weight_dtype, 1, k, sums,
                 plan->packed.data() + g * bytes},
                0, panels);
  plan->conv.c = merged * tap;
  if (flavour == Flavour::u8s8 && !by_rows(form)) plan->conv.c = s.c;
  plan->conv.taps = s.taps() / merged;
  plan->conv.weight = plan->packed.data();
}

// The outputs r + i·stride of a transposed convolution for each remainder r; forward: all at once.
void make_grids(const ConvCase& c, Form form, Plan* plan) {
  const ConvShape& s = c.s;
  const int64_t merged = by_rows(form) ? s.kernel[2] : 1;
  const bool transposed = form == Form::transposed;
  const int64_t phases = transposed ? s.stride[0] * s.stride[1] * s.stride[2] : 1;
  for (int64_t phase = 0; phase < phases; phase++) {
    ConvGrid grid{};
    const int64_t first[3] = {phase / (s.stride[1] * s.stride[2]), phase / s.stride[2] % s.stride[1],
                              phase % s.stride[2]};
    for (int axis = 0; axis < 3; axis++) {
      grid.out_begin[axis] = transposed ? first[axis] : 0;
      grid.out_step[axis] = transposed ? s.stride[axis] : 1;
      grid.in_step[axis] = transposed ? 1 : s.stride[axis];
      const int64_t left = c.out[axis] - grid.out_begin[axis];
      grid.count[axis] = left > 0 ? ceil_div(left, grid.out_step[axis]) : 0;
    }
    std::vector<ConvTap> taps;
    for (int64_t t = 0; t < s.taps(); t += merged) {
      const int64_t tap[3] = {t / (s.kernel[1] * s.kernel[2]), t / s.kernel[2] % s.kernel[1], t % s.kernel[2]};
      ConvTap to{{}, t / merged};
      bool seen = true;
      for (int axis = 0; axis < 3; axis++) {
        const int64_t along = tap[axis] * s.dilation[axis];
        const int64_t spread = first[axis] + s.pad[axis] - along;
        seen = seen && (!transposed || spread % s.stride[axis] == 0);
        to.at[axis] = transposed ? spread / s.stride[axis] : along - s.pad[axis];
      }
      if (form == Form::rows) to.at[2] = 0;
      if (form == Form::runs) grid.run = merged;
      if (seen) taps.push_back(to);
    }
    grid.tap_count = static_cast<int64_t>(taps.size());
    plan->taps.push_back(taps);
    plan->grids.push_back(grid);
  }
  for (size_t i = 0; i < plan->grids.size(); i++) plan->grids[i].taps = plan->taps[i].data();
}

Plan plan_of(const ConvCase& c, Form form, const Kernels& kernel) {
  Plan p;
  Conv& conv = p.conv;
  conv.batch = c.s.batch;
  conv.groups = c.s.groups;
  conv.x = c.x.view();
  if (form == Form::rows) {
    copy_image(c, kernel, c.s.pad[2], c.s.pad_end[2], &p);
  } else if (c.g.flavour == Flavour::u8s8 || form == Form::runs) {
    copy_image(c, kernel, 0, 0, &p);
  }
  pack(c, form, &p);
  make_grids(c, form, &p);
  const Element element(c, kernel);
  p.zeros = Exact(ceil_div(conv.c, k_per_lane(c.g.flavour)) * k_per_lane(c.g.flavour) * element.size, 0, 0);
  if (c.g.flavour != Flavour::u8s8) p.zeros = Exact(conv.c * element.size, 0, 0);
  for (int64_t i = 0; i < conv.c && c.x_zero; i++) element.put(p.zeros.data(), i, static_cast<float>(c.x_zero));
  for (int axis = 0; axis < 3; axis++) conv.out[axis] = c.out[axis];
  conv.zeros = p.zeros.data();
  conv.x_scale = c.x_scale;
  conv.x_zero = c.x_zero;
  conv.out_rows = c.g;
  return p;
}

// Rows at multiples of a row of the image, or anywhere.
void run(Rng& rng, const Plan& p, const Kernels& kernel, const std::vector<Range>& panels, bool anywhere) {
  for (const ConvGrid& grid : p.grids) {
    const int64_t rows = p.conv.batch * grid.count[0] * grid.count[1] * grid.count[2];
    for (int64_t group = 0; group < p.conv.groups; group++)
      for (const Range& r : cut(rng, rows, anywhere ? 1 : grid.count[2]))
        for (const Range& columns : panels) kernel.conv_direct(p.conv, grid, group, r, columns);
  }
}

void check_case(Rng& rng, const ConvCase& c, Form form, const std::vector<Expected>& expected, Isa isa) {
  static const char* const kForms[] = {"", ", by rows", ", transposed", ", by runs"};
  const Kernels& kernel = kernels_of(isa);
  const Plan plan = plan_of(c, form, kernel);
  const std::string what = c.describe() + kForms[static_cast<int>(form)];
  // Integers in a tile with a panel that is not whole are finished in memory, where they are rounded in other places than
  // in registers: they depend on the panels beside them.
  const bool integers = c.g.flavour == Flavour::u8s8, fixed = integers && c.s.n % kPanel;
  const std::vector<Range> panels = cut(rng, ceil_div(c.s.n, kPanel), 1);
  const auto other_panels = [&] { return fixed ? panels : cut(rng, ceil_div(c.s.n, kPanel), 1); };
  clear(c.y);
  run(rng, plan, kernel, panels, false);
  check_image(c.y, expected, isa, what);
  const std::vector<char> before = bytes_of(c.y);
  clear(c.y);
  run(rng, plan, kernel, other_panels(), false);
  CHECK(same(c.y, before), "%s: %s: depends on how it is cut", isa_name(isa), what.c_str());
  // A tile that holds pixels of two rows of the image adds in another order, but integers.
  clear(c.y);
  run(rng, plan, kernel, other_panels(), true);
  if (integers) CHECK(same(c.y, before), "%s: %s: depends on where rows are cut", isa_name(isa), what.c_str());
  check_image(c.y, expected, isa, what + ", cut at any row");
}

void check_on_all_tiers(uint64_t seed, ConvCase& c, Form form) {
  // Chains of at most 512 terms, one of each tap at least, then the chains; each product is rounded at most twice.
  const double k = static_cast<double>(c.s.c * c.s.taps()), taps = static_cast<double>(c.s.taps());
  const double terms = (k < 512 ? k : 512) + k / 256 + taps + 4;
  const bool exact = c.g.flavour == Flavour::u8s8;
  const std::vector<Expected> expected =
      c.expected([&](int64_t, double size) { return size * (exact ? 2 : terms) * 0x1p-23; });
  for (Isa isa : tiers()) {
    Rng rng(seed);  // the same cuts on every tier
    check_case(rng, c, form, expected, isa);
  }
}

void give_operands(Rng& rng, ConvCase& c) {
  constexpr DType kValues[] = {DType::f32, DType::bf16, DType::u8}, kWeights[] = {DType::f32, DType::bf16, DType::s8};
  const int flavour = static_cast<int>(c.g.flavour);
  choose_y_dtype(rng, c.g, true);
  choose_operands(rng, c, kValues[flavour], kWeights[flavour], Gaps::all, Gaps::pixels);
}

ConvCase random_case(Rng& rng, Form form) {
  constexpr int64_t kIn[] = {1, 1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 70}, kOut[] = {1, 2, 8, 15, 16, 17, 33, 50, 65};
  ConvCase c;
  ConvShape& s = c.s;
  c.transposed = form == Form::transposed;
  c.g.flavour = static_cast<Flavour>(rng.below(form == Form::runs ? 2 : 3));
  do {
    s = plain_shape();
    s.batch = rng.between(1, 3);
    s.groups = !by_rows(form) && rng.chance(3) ? rng.between(2, 3) : 1;
    s.c = rng.of(kIn);
    s.n = rng.of(kOut);
    if (rng.chance(4)) choose_axis(rng, s, 0, 3);
    if (!rng.chance(4)) choose_axis(rng, s, 1, 8);
    choose_axis(rng, s, 2, 20);
    if (by_rows(form)) s.dilation[2] = 1, s.pad_end[2] = std::max(s.pad_end[2], int64_t{0});
    for (int axis = 0; axis < 3; axis++) {
      const int64_t reach = (s.kernel[axis] - 1) * s.dilation[axis] + 1;
      c.out[axis] = c.transposed ? (s.in[axis] - 1) * s.stride[axis] + reach - s.pad[axis] - s.pad_end[axis] +
                                       (rng.chance(3) ? s.stride[axis] - 1 : 0)
                                 : s.out(axis);
      if (c.out[axis] < 0) c.out[axis] = 0;
    }
  } while (c.rows() == 0 || c.steps() > 150000);
  give_operands(rng, c);
  if (rng.chance(4)) poison(rng, c);
  return c;
}

// Sums of more than one chain, weights that come in parts, more rows than a block, narrow images of many taps.
void test_long(uint64_t seed) {
  struct Long {
    Flavour flavour;
    int64_t batch, c, n, h, w, kernel, pad, stride;
  };
  constexpr Long kLong[] = {{Flavour::f32, 1, 300, 17, 5, 7, 3, 1, 1},  {Flavour::f32, 3, 100, 48, 4, 4, 5, 2, 1},
                            {Flavour::bf16, 2, 530, 40, 3, 6, 3, 1, 1}, {Flavour::bf16, 3, 190, 60, 5, 3, 5, 2, 1},
                            {Flavour::u8s8, 1, 600, 33, 3, 7, 3, 1, 1}, {Flavour::f32, 1, 7, 20, 11, 160, 3, 1, 1},
                            {Flavour::f32, 2, 20, 33, 30, 13, 3, 1, 1}, {Flavour::u8s8, 1, 20, 33, 40, 13, 3, 2, 2},
                            {Flavour::f32, 1, 120, 49, 9, 9, 5, 4, 2},  {Flavour::bf16, 1, 33, 16, 170, 1, 7, 3, 1}};
  for (const Long& l : kLong) {
    Rng rng(seed++);
    ConvCase c;
    c.g.flavour = l.flavour;
    c.s = plain_shape();
    c.s.batch = l.batch;
    c.s.c = l.c;
    c.s.n = l.n;
    const int64_t size[2] = {l.h, l.w};
    for (int i = 0; i < 2; i++) {
      const int axis = i + 1;
      c.s.in[axis] = size[i];
      c.s.kernel[axis] = l.kernel;
      c.s.pad[axis] = c.s.pad_end[axis] = l.pad;
      c.s.stride[axis] = l.stride;
    }
    for (int axis = 0; axis < 3; axis++) c.out[axis] = c.s.out(axis);
    give_operands(rng, c);
    check_on_all_tiers(seed, c, Form::forward);
  }
}

// No pixel, no channel, no tap: nothing is read, and of an output that sees nothing the epilogue remains.
void test_nothing(uint64_t seed) {
  for (Flavour flavour : {Flavour::f32, Flavour::bf16, Flavour::u8s8})
    for (int empty = 0; empty < 3; empty++) {
      Rng rng(seed++);
      ConvCase c;
      c.g.flavour = flavour;
      c.s = plain_shape();
      c.s.n = 17;
      c.s.in[2] = c.s.kernel[2] = 2;
      c.s.batch = empty == 0 ? 0 : 2;
      if (empty == 1) c.s.c = 0;
      c.transposed = empty == 2;  // stride 3: every third output has no tap
      c.s.stride[2] = c.transposed ? 3 : 1;
      c.s.pad[2] = c.s.pad_end[2] = c.transposed ? 0 : 1;
      c.out[0] = c.out[1] = 1;
      c.out[2] = c.transposed ? 5 : 3;
      give_operands(rng, c);
      check_on_all_tiers(seed, c, c.transposed ? Form::transposed : Form::forward);
      for (Isa isa : tiers()) {
        const Plan p = plan_of(c, Form::forward, kernels_of(isa));
        clear(c.y);
        kernels_of(isa).conv_direct(p.conv, p.grids[0], 0, {0, 0}, {0, 2});
        for (char byte : bytes_of(c.y))
          CHECK(static_cast<unsigned char>(byte) == kGuard, "%s: wrote for no row", isa_name(isa));
      }
    }
}

// One row of taps that begins in the image and ends beyond it, over more rows than a block has; rows in pieces.
void test_runs(uint64_t seed) {
  for (const int64_t width : {50, 1300})
    for (const Flavour flavour : {Flavour::f32, Flavour::bf16})
      for (const Form form : {Form::forward, Form::rows, Form::runs}) {
        Rng rng(seed++);
        ConvCase c;
        c.g.flavour = flavour;
        c.s = plain_shape();
        c.s.batch = 4;
        c.s.c = 3;
        c.s.n = 20;
        c.s.in[2] = width;
        c.s.kernel[2] = 2;
        c.s.pad_end[2] = 1;
        for (int axis = 0; axis < 3; axis++) c.out[axis] = c.s.out(axis);
        give_operands(rng, c);
        check_on_all_tiers(seed, c, form);
      }
}

}  // namespace

void test_conv_direct(const Options& options) {
  test_long(options.seed);
  test_runs(options.seed);
  test_nothing(options.seed);
  for (int i = 0; i < options.iterations; i++) {
    const uint64_t seed = options.seed * 1000003 + static_cast<uint64_t>(i);
    Rng rng(seed);
    const Form form = static_cast<Form>(i % 4);
    ConvCase c = random_case(rng, form);
    check_on_all_tiers(seed, c, form);
  }
}

}  // namespace pbm::test
