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
constexpr int64_t kPrefetch = 32 * kGroupBytes;

// A few rows times a few panels, over some taps and a part of their lanes.
struct RowProduct {
  const char* const* rows;  // [row][tap]
  int64_t rows_next;        // pointers from one row to the next
  int64_t a_offset;         // bytes from where a row points
  const char* b;            // the panel, and within a tap the same lane as a_offset
  int64_t b_panel, b_tap;   // bytes from one panel, one tap to the next
  const ConvTap* taps;
  int64_t tap_count;
  int64_t k;  // elements of each tap
  void* c;
  int64_t ldc;  // elements
  bool accumulate;
};

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
  const int64_t b_panel = p.b_panel;
  for (int64_t t = 0; t < p.tap_count; t++) {
    const char* a[MR];
    PBM_UNROLL for (int i = 0; i < MR; i++) a[i] = p.rows[i * p.rows_next + t] + p.a_offset;
    const char* b = p.b + p.taps[t].weight * p.b_tap;
    for (int64_t l = 0; l < lanes; l++) {
      PBM_UNROLL for (int j = 0; j < NV; j++) __builtin_prefetch(b + j * b_panel + kPrefetch, 0, 3);
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

// Where the taps of rows [begin, end) read the group's channels: table[row][tap].
class Table {
 public:
  Table(const Conv& conv, const ConvGrid& grid, int64_t group)
      : conv_(conv), grid_(grid), size_(4 / k_per_lane(conv.out_rows.flavour)) {
    const ConvImage& x = conv.x;
    data_ = static_cast<const char*>(x.data) + group * conv.c * size_;
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

  void make(Range rows, const char** table) const {
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

// Panels side by side in a tile: four where that leaves fewer of them half empty.
int64_t panels_at_once(int64_t panels) {
  if (panels % kTile.wide_panels == 0) return kTile.wide_panels;
  if (panels % kTile.panels == 0) return kTile.panels;
  return ceil_div(panels, ceil_div(panels, kTile.wide_panels));
}

// Parts of the reduction: whole taps, as many as fill a block of sums, or a part of the lanes of one.
struct Cut {
  int64_t taps;   // at once
  int64_t lanes;  // of each
};

Cut cut_of(int64_t lanes, int64_t most) {
  if (lanes <= most) return {max64(most / max64(lanes, 1), 1), lanes};
  return {1, ceil_div(lanes, ceil_div(lanes, most))};
}

}  // namespace

void conv_direct(const Conv& conv, const ConvGrid& grid, int64_t group, Range rows, Range panels) {
  static const char* const kNames[3] = {"conv_direct_f32." PBM_TIER_NAME, "conv_direct_bf16." PBM_TIER_NAME,
                                        "conv_direct_u8s8." PBM_TIER_NAME};
  const Flavour flavour = conv.out_rows.flavour;
  note_kernel(kNames[static_cast<int>(flavour)]);
  const int64_t per_lane = k_per_lane(flavour), lanes = panel_groups(conv.c, flavour);
  const int64_t tap_bytes = lanes * kGroupBytes;
  const int64_t panel_bytes = conv.taps * tap_bytes + (flavour == Flavour::u8s8 ? kGroupBytes : 0);
  const int64_t all_panels = ceil_div(conv.out_rows.n, kPanel);
  const char* weight = static_cast<const char*>(conv.weight) + group * all_panels * panel_bytes;
  const Output output(conv, grid, group);
  const Table where(conv, grid, group);
  const int64_t at_once = panels_at_once(panels.end - panels.begin);
  const Cut cut = cut_of(lanes, flavour == Flavour::u8s8 ? lanes : sum_lanes(flavour));
  // Whole cuts of taps and lanes whose weights stay in L2 while the rows of a block pass by.
  const int64_t cut_bytes = cut.taps * cut.lanes * kGroupBytes * at_once;
  const int64_t cuts_at_once = max64(kWeightBytes / cut_bytes, 1);
  const int64_t lane_cuts = ceil_div(max64(lanes, 1), max64(cut.lanes, 1));
  const int64_t cuts = max64(ceil_div(grid.tap_count, cut.taps) * lane_cuts, 1);

  for (int64_t r0 = rows.begin; r0 < rows.end;) {
    const int64_t count = ceil_div(rows.end - r0, ceil_div(rows.end - r0, kBlockRows));
    const char** table = static_cast<const char**>(
        scratch(ScratchSlot::a_rows, static_cast<size_t>(grid.tap_count * count) * sizeof(char*)));
    where.make({r0, r0 + count}, table);
    char* acc = static_cast<char*>(scratch(ScratchSlot::accumulators, static_cast<size_t>(count * at_once) * 64));
    for (int64_t j = panels.begin; j < panels.end; j += at_once) {
      const int64_t width = min64(at_once, panels.end - j);
      const int64_t tallest = width <= kTile.panels ? kTile.max_rows : kTile.wide_rows;
      const char* b = weight + j * panel_bytes;
      for (int64_t k = 0; k < cuts; k += cuts_at_once) {
        const int64_t k_end = min64(k + cuts_at_once, cuts);
        for (int64_t r = 0; r < count;) {
          const int64_t height = ceil_div(count - r, ceil_div(count - r, tallest));
          char* c = acc + r * width * 64;
          for (int64_t i = k; i < k_end; i++) {
            const int64_t tap = i / lane_cuts * cut.taps, lane = i % lane_cuts * cut.lanes;
            RowProduct p;
            p.rows = table + r * grid.tap_count + tap;
            p.rows_next = grid.tap_count;
            p.a_offset = lane * lane_bytes(flavour);
            p.taps = grid.taps + tap;
            p.tap_count = min64(cut.taps, grid.tap_count - tap);
            p.b = b + lane * kGroupBytes;
            p.b_panel = panel_bytes;
            p.b_tap = tap_bytes;
            p.k = min64(cut.lanes * per_lane, conv.c - lane * per_lane);
            p.c = c;
            p.ldc = width * kPanel;
            p.accumulate = i > 0;
            row_product(p, flavour, height, width);
          }
          if (k_end == cuts)
            output.put(r0 + r, height, j * kPanel, width * kPanel, c,
                       reinterpret_cast<const int32_t*>(b + conv.taps * tap_bytes), panel_bytes / 4);
          r += height;
        }
      }
    }
    r0 += count;
  }
}

}  // namespace pbm::PBM_TIER
