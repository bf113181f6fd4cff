// Direct convolution without an im2col buffer: a table says where each tap of each output pixel reads its channels
// (Dukhan, "The Indirect Convolution Algorithm", 2019), and the register tile takes its rows from there.
#include "common/scratch.h"
#include "cpu/kernels/conv_rows.h"
#include "cpu/kernels/conv_table.h"

namespace pbm::PBM_TIER {
namespace {

// Output pixels whose table and accumulators are made at a time: the longer, the less often weights are read again.
constexpr int64_t kBlockRows = 144;
// Lanes that the accumulators take before they are added to memory, as in gemm.cpp.
constexpr int64_t sum_lanes(Flavour f) { return f == Flavour::bf16 && PBM_TIER_LEVEL < 3 ? 128 : 256; }
// Weights that one block of rows meets before the next part of them: they stay in L2.
constexpr int64_t kWeightBytes = int64_t{320} << 10;
// Weights that every tile may read anew: they stay in L1, or nearly.
constexpr int64_t kShortWeights = int64_t{64} << 10;

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
    in_registers_ = whole_ && finish_of(g_, conv, &finish_, &first_);
  }

  // How tiles are finished in registers; null where they are not.
  const Finish* finish() const { return in_registers_ ? &finish_ : nullptr; }
  void set_sums_panel(int64_t ints) { finish_.sums_panel = ints; }
  FinishAt at(int64_t row, int64_t col, const int32_t* sums) const {
    FinishAt here = first_;
    here.sums = sums;
    here.move(finish_, row, col, 0);
    return here;
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
  Finish finish_{};
  FinishAt first_{};
  float scale_[8];
  int32_t zero_[8];
};

// How rows are cut into tiles. A tile of pixels beside each other has its hidden taps at an end, where they can be left
// out; images narrower than a tile, and those of which nothing is hidden, are not cut so.
struct Tiling {
  int64_t unit;    // rows that are cut for themselves; 1: those of a block are
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

Tiling tiling_of(bool hides, int64_t across, int64_t rows, int64_t panels) {
  const bool by_row = hides && across >= kTile.wide_rows;
  const int64_t unit = by_row ? RowCut(across).piece : min64(rows, 24);
  const Tiling tall = {unit, kTile.max_rows, kTile.panels}, wide = {unit, kTile.wide_rows, kTile.wide_panels};
  Tiling t = cost_of(wide, panels) <= cost_of(tall, panels) ? wide : tall;
  if (!by_row) t.unit = 1;
  return t;
}

// Lanes fewer than these are not worth a call of their own for the rows that see a tap.
constexpr int64_t kWorthACall = 48;

// A tile of the rows of a block.
struct Tile {
  int64_t row, height;
  bool inside;  // whether all taps of all of them are in the image
};

// The rows of a block in tiles; how many.
int64_t cut_rows(const Tiling& tiling, int64_t count, const bool* whole, Tile* cuts) {
  int64_t tiles = 0;
  for (int64_t begin = 0; begin < count;) {
    const int64_t end = tiling.unit == 1 ? count : min64(begin + tiling.unit, count);
    for (int64_t r = begin; r < end;) {
      Tile c{r, even(end - r, tiling.height), true};
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

  // Bytes from where the table points to where it means.
  void shift_rows(int64_t bytes) { shift_ = bytes; }

  // The tile's first row in the table, its panels, its accumulators.
  void begin(const char* const* table, const char* b, void* c, int64_t ldc, bool accumulate) {
    table_ = table;
    p_.repeats = 1;
    b_ = b;
    c_tile_ = static_cast<char*>(c);
    p_.ldc = ldc;
    p_.accumulate = accumulate;
  }

  // What is read after the tile, from here on: each of its lanes fetches so many bytes.
  void fetch(const char* from, int64_t bytes_a_lane) {
    p_.ahead = from;
    p_.ahead_step = bytes_a_lane;
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
        p_.a_offset = shift_ + lane * lane_bytes(flavour_);
        p_.b = b_ + lane * kGroupBytes;
        p_.k = min64(lanes_at_once_ * per_lane, c_ - lane * per_lane);
        p_.finish = t + taps_at_once_ >= tap_end && lane + lanes_at_once_ >= lanes_ ? finish : nullptr;
        row_product(p_, flavour_, row_end - row, panels);
        p_.ahead += p_.tap_count * ceil_div(p_.k, per_lane) * p_.ahead_step;
        p_.accumulate = true;
      }
  }

  // Where add's finish puts the tile, and how many groups of panels it does so; of more than one the sum is one piece.
  void finish_at(const FinishAt& at, int64_t repeats) {
    p_.at = at;
    p_.repeats = repeats;
  }
  bool is_one_piece() const { return taps_at_once_ >= grid_.tap_count && lanes_at_once_ >= lanes_; }

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
  int64_t c_, lanes_, taps_at_once_, lanes_at_once_, shift_ = 0;
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
  if (rows.begin >= rows.end || panels.begin >= panels.end) return;
  const int64_t lanes = panel_groups(conv.c, flavour), taps = grid.tap_count, tap_bytes = lanes * kGroupBytes;
  const int64_t panel_bytes = conv.taps * tap_bytes + (flavour == Flavour::u8s8 ? kGroupBytes : 0);
  const char* weight = static_cast<const char*>(conv.weight) + group * ceil_div(conv.out_rows.n, kPanel) * panel_bytes;
  Output output(conv, grid, group);
  const Table where(conv, grid, group);
  TileSum sum(conv, grid, lanes, panel_bytes);
  // For all panels, not for those of this call: the order of a sum at the border depends on the height of its tile, and
  // must not depend on the number of threads.
  const Tiling tiling =
      tiling_of(where.hides(), grid.count[2], rows.end - rows.begin, ceil_div(conv.out_rows.n, kPanel));
  // Taps whose weights stay in L2 while the rows of a block pass by: whole chains, so that a sum does not depend on the
  // width of its tile.
  const int64_t chain = max64(sum_lanes(flavour) / max64(lanes, 1), 1);
  const int64_t taps_at_once = max64(kWeightBytes / max64(tap_bytes * tiling.width * chain, 1), 1) * chain;
  // What hides taps from a quantised image is its zero point, which the sums of the weights count on. Narrow images share
  // a tile with the next one: the order of a pixel's sum would depend on where the tile begins.
  const bool may_skip = flavour != Flavour::u8s8 && tiling.unit > 1;
  // Short panels pass by a tile all at once.
  output.set_sums_panel(panel_bytes / 4);
  const int64_t all_bytes = (panels.end - panels.begin) * panel_bytes;
  const bool at_once = output.finish() && sum.is_one_piece() && taps_at_once >= taps && all_bytes <= kShortWeights;
  const int64_t distance = where.distance();

  const RowCut cut(grid.count[2]);
  const auto block_rows = [&](int64_t row) {  // a piece of a row, or equal parts of what is left
    const int64_t left = rows.end - row;
    if (cut.is_long()) return min64(cut.left(row), left);
    const int64_t units = ceil_div(left, tiling.unit), fit = max64(kBlockRows / tiling.unit, 1);
    return min64(even(units, fit) * tiling.unit, left);
  };
  const int64_t most = cut.is_long() ? cut.piece : block_rows(rows.begin);
  const size_t row_bytes = static_cast<size_t>(taps) * sizeof(char*) + sizeof(Tile) + 1;
  const size_t copied = static_cast<size_t>(where.copied_bytes(most));
  const char** table =
      static_cast<const char**>(scratch(ScratchSlot::a_rows, static_cast<size_t>(most) * row_bytes + copied));
  Tile* cuts = reinterpret_cast<Tile*>(table + taps * most);
  char* copies = reinterpret_cast<char*>(cuts + most);
  bool* whole = reinterpret_cast<bool*>(copies + copied);
  char* acc = static_cast<char*>(scratch(ScratchSlot::accumulators, static_cast<size_t>(most * tiling.width) * 64));

  Range known = {rows.begin, rows.begin};  // what the table is of
  for (int64_t r0 = rows.begin, count; r0 < rows.end; r0 += count) {
    count = block_rows(r0);
    // Where all rows lie at one distance the first block's table serves the others.
    const bool made = distance != 0 && count <= known.end - known.begin;
    if (!made) where.make(known = {r0, r0 + count}, table, whole, copies);
    sum.shift_rows((r0 - known.begin) * distance);
    const int64_t tiles = cut_rows(tiling, count, whole, cuts);
    bool all_inside = taps > 0;
    for (int64_t i = 0; i < tiles; i++) all_inside = all_inside && (cuts[i].inside || !may_skip);
    for (int64_t j = panels.begin, width, repeats; j < panels.end; j += width * repeats) {
      width = even(panels.end - j, tiling.width);
      repeats = 1;
      if (all_inside && at_once)
        while (j + width * repeats < panels.end && even(panels.end - j - width * repeats, tiling.width) == width)
          repeats++;
      const int64_t columns = width * kPanel;
      const char* b = weight + j * panel_bytes;
      const int32_t* sums = reinterpret_cast<const int32_t*>(b + conv.taps * tap_bytes);
      for (int64_t tap = 0; tap == 0 || tap < taps; tap += taps_at_once) {
        const int64_t tap_end = min64(tap + taps_at_once, taps);
        // The next tiles' share of what comes after: more taps of these panels, or the first of the next.
        const bool more_taps = tap_end < taps, more = more_taps || j + 2 * width <= panels.end;
        const int64_t next = more_taps ? taps_at_once * tap_bytes : width * panel_bytes - tap * tap_bytes;
        for (int64_t i = 0; i < tiles; i++) {
          const Tile& tile = cuts[i];
          char* c = acc + tile.row * columns * 4;
          sum.begin(table + tile.row * taps, b, c, columns, tap > 0);
          if (more)
            sum.fetch(b + tap * tap_bytes + (i < width ? next + i * panel_bytes : 0), i < width ? kGroupBytes : 0);
          else
            sum.fetch(table[tile.row * taps] + (r0 + count - known.begin) * distance,
                      ceil_div(tile.height * distance, max64(lanes * repeats, 1)));
          const bool all_taps = taps > 0 && (tile.inside || !may_skip), last = tap_end == taps;
          const Finish* finish = last && all_taps ? output.finish() : nullptr;
          if (finish) sum.finish_at(output.at(r0 + tile.row, j * kPanel, sums), repeats);
          if (all_taps)
            sum.add(tap, tap_end, 0, tile.height, width, finish);
          else
            sum.add_visible(tap, tap_end, tile.height, width);
          if (last && !finish) output.put(r0 + tile.row, tile.height, j * kPanel, columns, c, sums, panel_bytes / 4);
        }
      }
    }
  }
  if (output.finish() && output.finish()->streams) streams_end();
}

}  // namespace pbm::PBM_TIER
