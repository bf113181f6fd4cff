// Direct convolution without an im2col buffer: a table says where each tap of each output pixel reads its channels
// (Dukhan, "The Indirect Convolution Algorithm", 2019), and the register tile takes its rows from there.
#include "common/scratch.h"
#include "cpu/kernels/impl.h"
#include "cpu/kernels/tile.h"

namespace pbm::PBM_TIER {
namespace {

// Output pixels whose table and accumulators are made at a time: the longer, the less often weights are read again.
constexpr int64_t kBlockRows = 144;
// Lanes that the accumulators take before they are added to memory, as in gemm.cpp.
constexpr int64_t sum_lanes(Flavour f) { return f == Flavour::bf16 && PBM_TIER_LEVEL < 3 ? 128 : 256; }
// Weights that one block of rows meets before the next part of them: they stay in L2.
constexpr int64_t kWeightBytes = int64_t{320} << 10;

// What is done to accumulators that need no more than this, while they are in registers.
struct Finish {
  float* out;
  int64_t out_row;
  const float* bias;
  const float* residual;
  int64_t residual_row;
  float low, high;  // what the activation cuts off
};

// A few rows times a few panels, over some taps and a part of their lanes.
struct RowProduct {
  const char* const* rows;  // [row][tap]
  int64_t rows_next;        // pointers from one row to the next
  int64_t a_offset;         // bytes from where a row points
  const char* b;            // the panel, and within a tap the same lane as a_offset
  int64_t b_panel, b_tap;   // bytes from one panel, one tap to the next
  const ConvTap* taps;
  int64_t tap_count;
  int64_t k;     // elements of each tap
  int64_t soon;  // from the first panel to what is read after this: fetched into L2 on the way; 0: nothing
  void* c;
  int64_t ldc;  // elements
  bool accumulate;
  const Finish* finish;  // null: the accumulators go to c
};

template <int MR, int NV>
PBM_INLINE void finish_rows(const RowProduct& p, Vec (&acc)[MR][NV]) {
  const Finish& f = *p.finish;
  const Vec low = set1(f.low), high = set1(f.high);
  const float* c = static_cast<const float*>(p.c);
  PBM_UNROLL for (int j = 0; j < NV; j++) {
    const Vec bias = f.bias ? load(f.bias + j * kWidth) : zero();
    PBM_UNROLL for (int i = 0; i < MR; i++) {
      Vec y = add(p.accumulate ? add(load(c + i * p.ldc + j * kWidth), acc[i][j]) : acc[i][j], bias);
      if (f.residual) y = add(y, load(f.residual + i * f.residual_row + j * kWidth));
      store(f.out + i * f.out_row + j * kWidth, vmin(high, vmax(low, y)));  // NaN stays: the second operand
    }
  }
}

template <Flavour F, int MR, int NV>
void row_product(const RowProduct& p) {
  using D = Dot<F>;
  constexpr int64_t kPerLane = k_per_lane(F);
  constexpr int64_t kLaneBytes = lane_bytes(F);
  constexpr bool filled_up = kLaneBytes > 4;
  typename D::Acc acc[MR][NV];
  PBM_UNROLL for (int i = 0; i < MR; i++) PBM_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = D::zero();
  const int64_t lanes = filled_up ? ceil_div(p.k, kPerLane) : p.k / kPerLane;
  const int64_t tail_bytes = filled_up ? 0 : p.k % kPerLane * (4 / kPerLane);
  const int64_t b_panel = p.b_panel, soon = p.soon;
  for (int64_t t = 0; t < p.tap_count; t++) {
    const char* a[MR];
    PBM_UNROLL for (int i = 0; i < MR; i++) a[i] = p.rows[i * p.rows_next + t] + p.a_offset;
    const char* b = p.b + p.taps[t].weight * p.b_tap;
    for (int64_t l = 0; l < lanes; l++) {
      if constexpr (MR >= 4) __builtin_prefetch(b + soon, 0, 2);
      multiply_rows<D, MR, NV>(acc, a, l * kLaneBytes, b, b_panel);
      b += kGroupBytes;
    }
    if (tail_bytes) {
      alignas(4) char last[MR][kLaneBytes] = {};
      const char* from[MR];
      PBM_UNROLL for (int i = 0; i < MR; i++) {
        uint32_t lane = 0;
        std::memcpy(&lane, a[i] + lanes * kLaneBytes, F == Flavour::bf16 ? 2 : tail_bytes);
        std::memcpy(last[i], &lane, 4);
        from[i] = last[i];
      }
      multiply_rows<D, MR, NV>(acc, from, 0, b, b_panel);
    }
  }
  if constexpr (F != Flavour::u8s8)
    if (p.finish) return finish_rows<MR, NV>(p, acc);
  PBM_UNROLL for (int i = 0; i < MR; i++) PBM_UNROLL for (int j = 0; j < NV; j++)
    D::put(static_cast<char*>(p.c) + (i * p.ldc + j * 16) * 4, acc[i][j], p.accumulate);
}

using ProductFn = void (*)(const RowProduct&);

template <Flavour F, int MR, int NV>
constexpr ProductFn product_or_null() {
  if constexpr (MR <= (NV <= kTile.panels ? kTile.max_rows : kTile.wide_rows)) return row_product<F, MR, NV>;
  return nullptr;
}

#define PBM_ROW(F, MR) \
  {product_or_null<F, MR, 1>(), product_or_null<F, MR, 2>(), product_or_null<F, MR, 3>(), product_or_null<F, MR, 4>()}
#define PBM_PRODUCTS(F)                                                                                     \
  {PBM_ROW(F, 1), PBM_ROW(F, 2), PBM_ROW(F, 3), PBM_ROW(F, 4), PBM_ROW(F, 5), PBM_ROW(F, 6), PBM_ROW(F, 7), \
   PBM_ROW(F, 8)}

void row_product(const RowProduct& p, Flavour flavour, int64_t rows, int64_t panels) {
  static const ProductFn products[3][8][4] = {PBM_PRODUCTS(Flavour::f32), PBM_PRODUCTS(Flavour::bf16),
                                              PBM_PRODUCTS(Flavour::u8s8)};
  products[static_cast<int>(flavour)][rows - 1][panels - 1](p);
}

// Consecutive pixels of a grid, as indices of their axes.
struct Pixels {
  int64_t batch, at[3];

  static Pixels from(const ConvGrid& grid, int64_t row) {
    Pixels p;
    for (int axis = 2; axis >= 0; axis--) {
      p.at[axis] = row % grid.count[axis];
      row /= grid.count[axis];
    }
    p.batch = row;
    return p;
  }
  void next(const ConvGrid& grid) {
    for (int axis = 2; axis >= 0; axis--) {
      if (++at[axis] < grid.count[axis]) return;
      at[axis] = 0;
    }
    batch++;
  }
};

// From one group's channels to the next's.
int64_t group_bytes(const Conv& conv) {
  const Flavour f = conv.out_rows.flavour;
  return f == Flavour::u8s8 ? panel_groups(conv.c, f) * lane_bytes(f) : conv.c * (4 / k_per_lane(f));
}

// Where the taps of rows [begin, end) read the group's channels, table[row][tap], and whether all are in the image.
class Table {
 public:
  Table(const Conv& conv, const ConvGrid& grid, int64_t group)
      : conv_(conv), grid_(grid), size_(4 / k_per_lane(conv.out_rows.flavour)) {
    const ConvImage& x = conv.x;
    data_ = static_cast<const char*>(x.data) + group * group_bytes(conv);
    offsets_ = static_cast<int64_t*>(
        scratch(ScratchSlot::b_panels, static_cast<size_t>(max64(grid.tap_count, 1)) * sizeof(int64_t)));
    for (int axis = 0; axis < 3; axis++) {
      low_[axis] = 0;
      high_[axis] = x.size[axis];
    }
    for (int64_t t = 0; t < grid.tap_count; t++) {
      const int64_t* at = grid.taps[t].at;
      offsets_[t] = (at[0] * x.stride[0] + at[1] * x.stride[1] + at[2] * x.stride[2]) * size_;
      for (int axis = 0; axis < 3; axis++) {
        low_[axis] = max64(low_[axis], -at[axis]);
        high_[axis] = min64(high_[axis], x.size[axis] - at[axis]);
      }
    }
  }

  void make(Range rows, const char** table, bool* whole) const {
    const int64_t taps = grid_.tap_count;
    Pixels p = Pixels::from(grid_, rows.begin);
    for (int64_t r = rows.begin; r < rows.end; r++, p.next(grid_), table += taps) {
      const int64_t at[3] = {p.at[0] * grid_.in_step[0], p.at[1] * grid_.in_step[1], p.at[2] * grid_.in_step[2]};
      const ConvImage& x = conv_.x;
      const char* first =
          data_ + (p.batch * x.batch_stride + at[0] * x.stride[0] + at[1] * x.stride[1] + at[2] * x.stride[2]) * size_;
      bool inside = true;
      for (int axis = 0; axis < 3; axis++) inside = inside && at[axis] >= low_[axis] && at[axis] < high_[axis];
      for (int64_t t = 0; t < taps; t++) table[t] = first + offsets_[t];
      if (!inside) hide(at, table);
      *whole++ = inside;
    }
  }

 private:
  // Taps outside the image read zeros.
  void hide(const int64_t (&at)[3], const char** table) const {
    for (int64_t t = 0; t < grid_.tap_count; t++)
      for (int axis = 0; axis < 3; axis++)
        if (static_cast<uint64_t>(at[axis] + grid_.taps[t].at[axis]) >= static_cast<uint64_t>(conv_.x.size[axis]))
          table[t] = static_cast<const char*>(conv_.zeros);
  }

  const Conv& conv_;
  const ConvGrid& grid_;
  const int64_t size_;
  const char* data_;
  int64_t* offsets_;
  int64_t low_[3], high_[3];  // where all taps are inside
};

// Accumulators of a group to the output, whose pixels may lie apart.
class Output {
 public:
  Output(const Conv& conv, const ConvGrid& grid, int64_t group)
      : conv_(conv), grid_(grid), g_(group_epilogue(conv, group)) {
    for (int axis = 0; axis < 3; axis++)
      whole_ = whole_ && grid.out_step[axis] == 1 && grid.count[axis] == conv.out[axis];
    for (int r = 0; r < kTile.max_rows; r++) {
      scale_[r] = conv.x_scale;
      zero_[r] = conv.x_zero;
    }
  }

  // Whether columns [col, col + columns) of rows from `row` on can be finished in registers, and how.
  bool finish(int64_t row, int64_t col, int64_t columns, Finish* f) const {
    const bool clamps =
        g_.activation == Activation::none || g_.activation == Activation::relu || g_.activation == Activation::relu6;
    if (!whole_ || !clamps || g_.c_dtype != DType::f32 || col + columns > g_.n ||
        (g_.bias && g_.bias_dtype != DType::f32) || (g_.residual && !g_.residual_first))
      return false;
    constexpr float kInfinity = __builtin_inff();
    f->out = static_cast<float*>(g_.c) + row * g_.c_row + col;
    f->out_row = g_.c_row;
    f->bias = g_.bias ? static_cast<const float*>(g_.bias) + col : nullptr;
    f->residual =
        g_.residual ? static_cast<const float*>(g_.residual) + row * g_.residual_row + col : nullptr;
    f->residual_row = g_.residual_row;
    f->low = g_.activation == Activation::none ? -kInfinity : 0.f;
    f->high = g_.activation == Activation::relu6 ? 6.f : kInfinity;
    return true;
  }

  // Rows from `row` of the grid on, at most a tile of them.
  void put(int64_t row, int64_t rows, int64_t col, int64_t columns, const char* acc, const int32_t* sums,
           int64_t sums_panel) const {
    EpilogueTile e;
    e.acc = acc;
    e.ld_acc = columns;
    e.rows = static_cast<int>(whole_ ? rows : 1);
    e.row = row;
    e.col = col;
    e.columns = min64(columns, g_.n - col);
    e.row_scale = scale_;
    e.row_zero = zero_;
    e.column_sums = sums;
    e.column_sums_panel = sums_panel;
    if (whole_) return epilogue(g_, e);
    Pixels p = Pixels::from(grid_, row);
    for (int64_t r = 0; r < rows; r++, p.next(grid_)) {
      e.row = p.batch;
      for (int axis = 0; axis < 3; axis++)
        e.row = e.row * conv_.out[axis] + grid_.out_begin[axis] + p.at[axis] * grid_.out_step[axis];
      e.acc = acc + r * columns * 4;
      epilogue(g_, e);
    }
  }

 private:
  const Conv& conv_;
  const ConvGrid& grid_;
  Gemm g_;
  bool whole_ = true;
  float scale_[8];
  int32_t zero_[8];
};

// How rows are cut into tiles. A tile of pixels beside each other has its hidden taps at an end, where they can be left
// out; images narrower than a tile are not cut so.
struct Tiling {
  int64_t unit;    // rows that are cut for themselves
  int64_t height;  // at most
  int64_t width;   // panels, at most
};

// Equal parts of a total: the first of them.
int64_t even(int64_t total, int64_t most) { return ceil_div(total, ceil_div(total, most)); }

// Half cycles of a step of one lane, over all tiles of a unit: a product each, and two a tile for what is around them.
int64_t cost_of(const Tiling& t, int64_t panels) {
  int64_t cost = 0;
  for (int64_t r = 0, h; r < t.unit; r += h) {
    h = even(t.unit - r, t.height);
    for (int64_t j = 0, w; j < panels; j += w) {
      w = even(panels - j, t.width);
      cost += max64(h * w, 8) + 2;  // 8: the latency of a fused multiply-add
    }
  }
  return cost;
}

Tiling tiling_of(int64_t across, int64_t rows, int64_t panels) {
  const int64_t unit = across >= kTile.wide_rows ? across : min64(rows, 24);
  const Tiling tall = {unit, kTile.max_rows, kTile.panels}, wide = {unit, kTile.wide_rows, kTile.wide_panels};
  Tiling t = cost_of(wide, panels) <= cost_of(tall, panels) ? wide : tall;
  if (across < kTile.wide_rows) t.unit = 1;
  return t;
}

// Lanes fewer than these are not worth a call of their own for the rows that see a tap.
constexpr int64_t kWorthACall = 48;

// One tile's part of the reduction.
struct TileSum {
  Flavour flavour;
  int64_t c, lanes;
  const ConvTap* taps;
  const char* const* table;  // of the tile's first row
  int64_t tap_count;
  const char* zeros;
  RowProduct p;  // of the tile's first row

  // Taps [tap, tap_end) of rows [row, row_end); `finish`, where it is not null, after the last.
  void add(int64_t tap, int64_t tap_end, int64_t row, int64_t row_end, int64_t panels, const Finish* finish = nullptr) {
    const int64_t per_lane = k_per_lane(flavour);
    const int64_t most = flavour == Flavour::u8s8 ? lanes * (tap_end - tap) : sum_lanes(flavour);  // int32 is exact
    const int64_t taps_at_once = max64(most / max64(lanes, 1), 1);
    const int64_t lanes_at_once = lanes <= most ? max64(lanes, 1) : ceil_div(lanes, ceil_div(lanes, most));
    for (int64_t t = tap; t < tap_end; t += taps_at_once)
      for (int64_t lane = 0; lane == 0 || lane < lanes; lane += lanes_at_once) {
        RowProduct x = p;
        x.rows = table + row * tap_count + t;
        x.taps = taps + t;
        x.tap_count = min64(taps_at_once, tap_end - t);
        x.a_offset = lane * lane_bytes(flavour);
        x.b += lane * kGroupBytes;
        x.k = min64(lanes_at_once * per_lane, c - lane * per_lane);
        x.c = static_cast<char*>(p.c) + row * p.ldc * 4;
        x.finish = t + taps_at_once >= tap_end && lane + lanes_at_once >= lanes ? finish : nullptr;
        row_product(x, flavour, row_end - row, panels);
        p.accumulate = true;
      }
  }

  // The same where some taps of some rows lie outside: of each tap the rows from the first to the last that see it.
  void add_visible(int64_t tap, int64_t tap_end, int64_t rows, int64_t panels) {
    if (!p.accumulate) std::memset(p.c, 0, static_cast<size_t>(rows * p.ldc) * 4);
    p.accumulate = true;
    for (int64_t t = tap, whole = tap; t < tap_end; t++) {
      int64_t row = 0, row_end = rows;
      while (row < rows && table[row * tap_count + t] == zeros) row++;
      while (row_end > row && table[(row_end - 1) * tap_count + t] == zeros) row_end--;
      const bool all = row_end > row && (row_end - row == rows || lanes < kWorthACall);
      if (!all || t + 1 == tap_end) {
        add(whole, all ? t + 1 : t, 0, rows, panels);
        whole = t + 1;
      }
      if (!all && row_end > row) add(t, t + 1, row, row_end, panels);
    }
  }
};

}  // namespace

void conv_direct(const Conv& conv, const ConvGrid& grid, int64_t group, Range rows, Range panels) {
  static const char* const kNames[3] = {"conv_direct_f32." PBM_TIER_NAME, "conv_direct_bf16." PBM_TIER_NAME,
                                        "conv_direct_u8s8." PBM_TIER_NAME};
  const Flavour flavour = conv.out_rows.flavour;
  note_kernel(kNames[static_cast<int>(flavour)]);
  const int64_t lanes = panel_groups(conv.c, flavour), taps = grid.tap_count, tap_bytes = lanes * kGroupBytes;
  const int64_t panel_bytes = conv.taps * tap_bytes + (flavour == Flavour::u8s8 ? kGroupBytes : 0);
  const char* weight =
      static_cast<const char*>(conv.weight) + group * ceil_div(conv.out_rows.n, kPanel) * panel_bytes;
  const Output output(conv, grid, group);
  const Table where(conv, grid, group);
  const Tiling tiling = tiling_of(grid.count[2], rows.end - rows.begin, panels.end - panels.begin);
  // Taps whose weights stay in L2 while the rows of a block pass by.
  const int64_t taps_at_once = max64(kWeightBytes / max64(tap_bytes * tiling.width, 1), 1);
  // What hides taps from a quantised image is its zero point, which the sums of the weights count on. Narrow images share
  // a tile with the next one: the order of a pixel's sum would depend on where the tile begins.
  const bool quantised = flavour == Flavour::u8s8, may_skip = !quantised && tiling.unit > 1;

  for (int64_t r0 = rows.begin; r0 < rows.end;) {
    const int64_t left = ceil_div(rows.end - r0, tiling.unit), fit = max64(kBlockRows / tiling.unit, 1);
    const int64_t count = min64(ceil_div(left, ceil_div(left, fit)) * tiling.unit, rows.end - r0);
    const char** table = static_cast<const char**>(
        scratch(ScratchSlot::a_rows, static_cast<size_t>(count) * (static_cast<size_t>(taps) * sizeof(char*) + 1)));
    bool* whole = reinterpret_cast<bool*>(table + taps * count);
    where.make({r0, r0 + count}, table, whole);
    char* acc = static_cast<char*>(scratch(ScratchSlot::accumulators, static_cast<size_t>(count * tiling.width) * 64));
    for (int64_t j = panels.begin, width; j < panels.end; j += width) {
      width = even(panels.end - j, tiling.width);
      const char* b = weight + j * panel_bytes;
      for (int64_t tap = 0; tap == 0 || tap < taps; tap += taps_at_once) {
        const int64_t tap_end = min64(tap + taps_at_once, taps);
        // The next tiles' share of what comes after: more taps of these panels, or the first of the next.
        const bool more_taps = tap_end < taps, more_panels = j + 2 * width <= panels.end;
        const int64_t next = more_taps ? taps_at_once * tap_bytes : width * panel_bytes - tap * tap_bytes;
        for (int64_t r = 0, tile = 0; r < count; tile++) {
          const int64_t row_end = min64((r / tiling.unit + 1) * tiling.unit, count);
          const int64_t to_cut = tiling.unit == 1 ? count - r : row_end - r;
          const int64_t height = even(to_cut, tiling.height);
          TileSum sum{flavour, conv.c, lanes, grid.taps, table + r * taps, taps, static_cast<const char*>(conv.zeros), {}};
          sum.p.rows_next = taps;
          sum.p.b = b;
          sum.p.b_panel = panel_bytes;
          sum.p.b_tap = tap_bytes;
          sum.p.c = acc + r * width * 64;
          sum.p.ldc = width * kPanel;
          sum.p.soon = tile < width && (more_taps || more_panels) ? next + tile * panel_bytes : 0;
          sum.p.accumulate = tap > 0;
          bool inside = taps > 0;
          for (int64_t i = 0; i < height; i++) inside = inside && whole[r + i];
          const bool all_taps = inside || (taps > 0 && !may_skip);
          Finish finish;
          const bool at_once = tap_end == taps && all_taps && !quantised &&
                               output.finish(r0 + r, j * kPanel, width * kPanel, &finish);
          if (all_taps)
            sum.add(tap, tap_end, 0, height, width, at_once ? &finish : nullptr);
          else
            sum.add_visible(tap, tap_end, height, width);
          if (tap_end == taps && !at_once)
            output.put(r0 + r, height, j * kPanel, width * kPanel, static_cast<char*>(sum.p.c),
                       reinterpret_cast<const int32_t*>(b + conv.taps * tap_bytes), panel_bytes / 4);
          r += height;
        }
      }
    }
    r0 += count;
  }
}

}  // namespace pbm::PBM_TIER
