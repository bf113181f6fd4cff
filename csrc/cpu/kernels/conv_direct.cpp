// Direct convolution without an im2col buffer: a table says where each tap of each output pixel reads its channels
// (Dukhan, "The Indirect Convolution Algorithm", 2019), and the register tile takes its rows from there.
#include "common/scratch.h"
#include "cpu/kernels/conv_rows.h"

namespace pbm::PBM_TIER {
namespace {

// Output pixels whose table and accumulators are made at a time: the longer, the less often weights are read again.
constexpr int64_t kBlockRows = 144;
// Lanes that the accumulators take before they are added to memory, as in gemm.cpp.
constexpr int64_t sum_lanes(Flavour f) { return f == Flavour::bf16 && PBM_TIER_LEVEL < 3 ? 128 : 256; }
// Weights that one block of rows meets before the next part of them: they stay in L2.
constexpr int64_t kWeightBytes = int64_t{320} << 10;

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
    in_registers_ = whole_ && finish_of(g_, conv, &first_);
    here_ = first_;
  }

  // How columns [col, col + columns) of rows from `row` on are finished in registers; null where they are not.
  const Finish* finish(int64_t row, int64_t col, int64_t columns, const int32_t* sums, int64_t sums_panel) {
    if (!in_registers_ || col + columns > g_.n) return nullptr;
    move_finish(first_, row, col, &here_);
    here_.sums = sums;
    here_.sums_panel = sums_panel;
    return &here_;
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
  bool whole_ = true, in_registers_;
  Finish first_{}, here_;
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

// A tile of the rows of a block.
struct Cut {
  int64_t row, height;
  bool inside;  // whether all taps of all of them are in the image
};

// The rows of a block in tiles; how many.
int64_t cut_rows(const Tiling& tiling, int64_t count, const bool* whole, Cut* cuts) {
  int64_t tiles = 0;
  for (int64_t begin = 0; begin < count;) {
    const int64_t end = tiling.unit == 1 ? count : min64(begin + tiling.unit, count);
    for (int64_t r = begin; r < end;) {
      Cut c{r, even(end - r, tiling.height), true};
      for (int64_t i = 0; i < c.height; i++) c.inside = c.inside && whole[r + i];
      cuts[tiles++] = c;
      r += c.height;
    }
    begin = end;
  }
  return tiles;
}

// How one tile is summed: some taps, some of their lanes at a time.
class TileSum {
 public:
  TileSum(const Conv& conv, const ConvGrid& grid, int64_t lanes, int64_t panel_bytes)
      : flavour_(conv.out_rows.flavour),
        c_(conv.c),
        lanes_(lanes),
        grid_(grid),
        zeros_(static_cast<const char*>(conv.zeros)) {
    const int64_t all = max64(lanes, 1) * max64(grid.tap_count, 1);
    const int64_t most = flavour_ == Flavour::u8s8 ? all : sum_lanes(flavour_);  // int32 is exact
    taps_at_once_ = max64(most / max64(lanes, 1), 1);
    lanes_at_once_ = lanes <= most ? max64(lanes, 1) : ceil_div(lanes, ceil_div(lanes, most));
    p_.rows_next = grid.tap_count;
    p_.b_panel = panel_bytes;
    p_.b_tap = lanes * kGroupBytes;
  }

  // The tile's first row in the table, its panels, its accumulators.
  void begin(const char* const* table, const char* b, void* c, int64_t ldc, bool accumulate, int64_t soon) {
    table_ = table;
    b_ = b;
    c_tile_ = static_cast<char*>(c);
    p_.ldc = ldc;
    p_.accumulate = accumulate;
    p_.soon = soon;
  }

  // Taps [tap, tap_end) of rows [row, row_end); `finish`, where it is not null, after the last.
  void add(int64_t tap, int64_t tap_end, int64_t row, int64_t row_end, int64_t panels, const Finish* finish = nullptr) {
    const int64_t per_lane = k_per_lane(flavour_);
    p_.c = c_tile_ + row * p_.ldc * 4;
    for (int64_t t = tap; t < tap_end; t += taps_at_once_)
      for (int64_t lane = 0; lane == 0 || lane < lanes_; lane += lanes_at_once_) {
        p_.rows = table_ + row * grid_.tap_count + t;
        p_.taps = grid_.taps + t;
        p_.tap_count = min64(taps_at_once_, tap_end - t);
        p_.a_offset = lane * lane_bytes(flavour_);
        p_.b = b_ + lane * kGroupBytes;
        p_.k = min64(lanes_at_once_ * per_lane, c_ - lane * per_lane);
        p_.finish = t + taps_at_once_ >= tap_end && lane + lanes_at_once_ >= lanes_ ? finish : nullptr;
        row_product(p_, flavour_, row_end - row, panels);
        p_.accumulate = true;
      }
  }

  // The same where some taps of some rows lie outside: of each tap the rows from the first to the last that see it.
  void add_visible(int64_t tap, int64_t tap_end, int64_t rows, int64_t panels) {
    if (!p_.accumulate) std::memset(c_tile_, 0, static_cast<size_t>(rows * p_.ldc) * 4);
    p_.accumulate = true;
    const int64_t tap_count = grid_.tap_count;
    for (int64_t t = tap, whole = tap; t < tap_end; t++) {
      int64_t row = 0, row_end = rows;
      while (row < rows && table_[row * tap_count + t] == zeros_) row++;
      while (row_end > row && table_[(row_end - 1) * tap_count + t] == zeros_) row_end--;
      const bool all = row_end > row && (row_end - row == rows || lanes_ < kWorthACall);
      if (!all || t + 1 == tap_end) {
        add(whole, all ? t + 1 : t, 0, rows, panels);
        whole = t + 1;
      }
      if (!all && row_end > row) add(t, t + 1, row, row_end, panels);
    }
  }

 private:
  Flavour flavour_;
  int64_t c_, lanes_, taps_at_once_, lanes_at_once_;
  const ConvGrid& grid_;
  const char* zeros_;
  const char* const* table_;
  const char* b_;
  char* c_tile_;
  RowProduct p_{};
};

}  // namespace

void conv_direct(const Conv& conv, const ConvGrid& grid, int64_t group, Range rows, Range panels) {
  static const char* const kNames[3] = {"conv_direct_f32." PBM_TIER_NAME, "conv_direct_bf16." PBM_TIER_NAME,
                                        "conv_direct_u8s8." PBM_TIER_NAME};
  const Flavour flavour = conv.out_rows.flavour;
  note_kernel(kNames[static_cast<int>(flavour)]);
  const int64_t lanes = panel_groups(conv.c, flavour), taps = grid.tap_count, tap_bytes = lanes * kGroupBytes;
  const int64_t panel_bytes = conv.taps * tap_bytes + (flavour == Flavour::u8s8 ? kGroupBytes : 0);
  const char* weight = static_cast<const char*>(conv.weight) + group * ceil_div(conv.out_rows.n, kPanel) * panel_bytes;
  Output output(conv, grid, group);
  const Table where(conv, grid, group);
  TileSum sum(conv, grid, lanes, panel_bytes);
  const Tiling tiling = tiling_of(grid.count[2], rows.end - rows.begin, panels.end - panels.begin);
  // Taps whose weights stay in L2 while the rows of a block pass by.
  const int64_t taps_at_once = max64(kWeightBytes / max64(tap_bytes * tiling.width, 1), 1);
  // What hides taps from a quantised image is its zero point, which the sums of the weights count on. Narrow images share
  // a tile with the next one: the order of a pixel's sum would depend on where the tile begins.
  const bool may_skip = flavour != Flavour::u8s8 && tiling.unit > 1;

  for (int64_t r0 = rows.begin; r0 < rows.end;) {
    const int64_t left = ceil_div(rows.end - r0, tiling.unit), fit = max64(kBlockRows / tiling.unit, 1);
    const int64_t count = min64(ceil_div(left, ceil_div(left, fit)) * tiling.unit, rows.end - r0);
    const size_t row_bytes = static_cast<size_t>(taps) * sizeof(char*) + sizeof(Cut) + 1;
    const char** table =
        static_cast<const char**>(scratch(ScratchSlot::a_rows, static_cast<size_t>(count) * row_bytes));
    Cut* cuts = reinterpret_cast<Cut*>(table + taps * count);
    bool* whole = reinterpret_cast<bool*>(cuts + count);
    where.make({r0, r0 + count}, table, whole);
    const int64_t tiles = cut_rows(tiling, count, whole, cuts);
    char* acc = static_cast<char*>(scratch(ScratchSlot::accumulators, static_cast<size_t>(count * tiling.width) * 64));
    for (int64_t j = panels.begin, width; j < panels.end; j += width) {
      width = even(panels.end - j, tiling.width);
      const int64_t columns = width * kPanel;
      const char* b = weight + j * panel_bytes;
      const int32_t* sums = reinterpret_cast<const int32_t*>(b + conv.taps * tap_bytes);
      for (int64_t tap = 0; tap == 0 || tap < taps; tap += taps_at_once) {
        const int64_t tap_end = min64(tap + taps_at_once, taps);
        // The next tiles' share of what comes after: more taps of these panels, or the first of the next.
        const bool more_taps = tap_end < taps, more = more_taps || j + 2 * width <= panels.end;
        const int64_t next = more_taps ? taps_at_once * tap_bytes : width * panel_bytes - tap * tap_bytes;
        for (int64_t i = 0; i < tiles; i++) {
          const Cut& cut = cuts[i];
          char* c = acc + cut.row * columns * 4;
          sum.begin(table + cut.row * taps, b, c, columns, tap > 0, i < width && more ? next + i * panel_bytes : 0);
          const bool all_taps = taps > 0 && (cut.inside || !may_skip), last = tap_end == taps;
          const Finish* finish =
              last && all_taps ? output.finish(r0 + cut.row, j * kPanel, columns, sums, panel_bytes / 4) : nullptr;
          if (all_taps)
            sum.add(tap, tap_end, 0, cut.height, width, finish);
          else
            sum.add_visible(tap, tap_end, cut.height, width);
          if (last && !finish) output.put(r0 + cut.row, cut.height, j * kPanel, columns, c, sums, panel_bytes / 4);
        }
      }
    }
    r0 += count;
  }
}

}  // namespace pbm::PBM_TIER
