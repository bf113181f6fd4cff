#include "cpu/kernels/gemm.h"

#include "common/scratch.h"
#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {
namespace {

// Lanes of k that the accumulators take before they are added to memory. Summing in blocks keeps the rounding error of
// fp32 near √(k·256) instead of k: with 4,096 terms a quarter. int32 is exact and needs no blocks. vdpbf16ps adds its
// two products at once; where it is emulated a lane is two additions, and blocks are half as long.
constexpr int64_t sum_lanes(Flavour f) { return f == Flavour::bf16 && PBM_TIER_LEVEL < 3 ? 128 : 256; }
// Rows of A prepared at a time; their lanes stay in the cache while all of B passes by.
constexpr int64_t kChunkRows = 384;
constexpr int64_t kChunkBytes = int64_t{640} << 10;
// Where every chunk packs B again, at the cost of 8 rows.
constexpr int64_t kChunkRowsUnpacked = 1024;
// Longer panels are cut along k: a group of them and the rows of A that pass by would not both stay in L2.
constexpr int64_t kPanelLanes = 3072;
// Panels that are multiplied with one tile of rows after another, if they are short.
constexpr int64_t kPanelBytes = int64_t{128} << 10;
// Accumulators that are kept between parts of k.
constexpr int64_t kAccumulatorBytes = int64_t{2} << 20;

int64_t rows_per_row(const Gemm& g) { return g.prepare == APrepare::digits ? 3 : 1; }

// Equal chunks of `rows` rows: of so many as stay in L2 while panels pass by, if these are worth reading B again.
int64_t chunk_rows(const Gemm& g, int64_t rows) {
  int64_t most = kChunkRowsUnpacked;
  if (g.b_packed) {
    const int64_t fit = kChunkBytes / max64(panel_groups(g.k, g.flavour) * lane_bytes(g.flavour) * rows_per_row(g), 1);
    most = fit >= kChunkRows / 3 ? min64(fit, kChunkRows) : kChunkRows;
  }
  return ceil_div(ceil_div(rows, ceil_div(rows, most)), kTile.max_rows) * kTile.max_rows;
}

// The rows of one chunk as brgemm reads them, from some k on.
struct Rows {
  const char* data;
  int64_t stride;  // bytes
  const float* scale;
  const int32_t* zero_point;
};

// An odd number of cache lines: rows a power of two apart would share a few sets of the L1 cache.
int64_t scratch_stride(int64_t k, Flavour f) { return (ceil_div(panel_groups(k, f) * lane_bytes(f), 64) | 1) * 64; }

Rows quantise(const Gemm& g, Range m) {
  const int64_t count = m.end - m.begin, stride = scratch_stride(g.k, g.flavour);
  char* rows = static_cast<char*>(
      scratch(ScratchSlot::a_rows, count * (rows_per_row(g) * stride + sizeof(float) + sizeof(int32_t))));
  float* scale = reinterpret_cast<float*>(rows + count * rows_per_row(g) * stride);
  int32_t* zero_point = reinterpret_cast<int32_t*>(scale + count);
  QuantizeRows q;
  q.k = g.k;
  q.kind = g.prepare == APrepare::digits      ? QuantKind::digits
           : g.prepare == APrepare::symmetric ? QuantKind::symmetric_u8
                                              : QuantKind::asymmetric;
  q.x = static_cast<const char*>(g.a) + m.begin * g.a_row * size_of(g.a_dtype);
  q.dtype = g.a_dtype;
  q.row = g.a_row;
  // Where lanes are wider than their four bytes, these come into the second half of a row and are spread from there.
  q.q = rows + (kTile.u8_lane_bytes > 4 ? stride / 2 : 0);
  q.q_row = stride;
  q.q_padded = panel_groups(g.k, g.flavour) * 4;
  q.scale = scale;
  q.zero_point = zero_point;
  quantize_rows(q, 0, count);
  if (kTile.u8_lane_bytes > 4)
    for (int64_t r = 0; r < count * rows_per_row(g); r++) widen_lanes(rows + r * stride, stride / 2);
  return {rows, stride, scale, zero_point};
}

// Rows that are not quantised, one part of k at a time: where k is the batch, all of it would not fit in memory.
Rows rows_of(const Gemm& g, Range m, Range k) {
  const int64_t size = size_of(g.a_dtype);
  const char* a = static_cast<const char*>(g.a) + k.begin * g.a_col * size;
  if (g.prepare == APrepare::none) return {a + m.begin * g.a_row * size, g.a_row * size, nullptr, nullptr};
  Gemm part = g;
  part.a = a;
  part.k = k.end - k.begin;
  const int64_t stride = scratch_stride(part.k, g.flavour);
  char* rows = static_cast<char*>(scratch(ScratchSlot::a_rows, (m.end - m.begin) * stride));
  convert_rows(part, m.begin, m.end, rows, stride);
  return {rows, stride, nullptr, nullptr};
}

// Panels [first, first + count) of B from k.begin on, packed here if they are not yet.
struct Panels {
  const char* data;
  int64_t stride;  // bytes from one panel to the next
};

Panels panels_of(const Gemm& g, int64_t first, int64_t count, Range k) {
  if (g.b_packed) {
    const int64_t stride = (panel_groups(g.k, g.flavour) + (g.flavour == Flavour::u8s8)) * kGroupBytes;
    return {static_cast<const char*>(g.b) + first * stride + k.begin / k_per_lane(g.flavour) * kGroupBytes, stride};
  }
  const int64_t stride = panel_groups(k.end - k.begin, g.flavour) * kGroupBytes;
  const char* b = static_cast<const char*>(g.b) + k.begin * g.b_row * size_of(g.b_dtype);
  PackB p{g.n, k.end - k.begin, g.flavour, b, g.b_dtype, g.b_row, g.b_col, false, nullptr};
  char* out = static_cast<char*>(scratch(ScratchSlot::b_panels, count * stride));
  p.out = out - first * stride;
  pack_b(p, first, first + count);
  return {out, stride};
}

struct TileCut {
  int rows, panels;
};

// The register tile for `rows` rows: as tall as allowed, all of about the same height, in units of `unit` rows.
TileCut cut_tiles(int64_t rows, int64_t unit) {
  const int64_t tallest = kTile.max_rows / unit * unit;
  const int64_t count = ceil_div(rows, tallest);
  const int64_t height = ceil_div(rows / unit, count) * unit;
  return {static_cast<int>(height), height <= kTile.wide_rows ? kTile.wide_panels : kTile.panels};
}

// The rows of a chunk times a few panels, along a part of k.
struct Block {
  Rows a;
  Range m, k;
  Panels b;
  int64_t first, count;  // panels
  bool more;             // whether as many panels follow in memory and are needed next
  TileCut tile;
  char* acc;  // accumulators that outlive the part, tile after tile; null: the part is all of k
};

void finish(const Gemm& g, const Block& x, int64_t r, int height, int64_t j, int64_t count, const char* acc) {
  const int64_t unit = rows_per_row(g);
  EpilogueTile e;
  e.acc = acc;
  e.ld_acc = count * kPanel;
  e.rows = static_cast<int>(height / unit);
  e.row = x.m.begin + r / unit;
  e.col = (x.first + j) * kPanel;
  e.columns = min64(count * kPanel, g.n - e.col);
  e.row_scale = x.a.scale ? x.a.scale + r / unit : nullptr;
  e.row_zero = x.a.zero_point ? x.a.zero_point + r / unit : nullptr;
  const char* sums = x.b.data + j * x.b.stride + panel_groups(g.k - x.k.begin, g.flavour) * kGroupBytes;
  e.column_sums = reinterpret_cast<const int32_t*>(sums);
  e.column_sums_panel = x.b.stride / 4;
  epilogue(g, e);
}

void multiply(const Gemm& g, const Block& x) {
  const int64_t unit = rows_per_row(g), rows = (x.m.end - x.m.begin) * unit, per_lane = k_per_lane(g.flavour);
  // Prepared rows are padded to whole lanes with zeros, as panels are: no tail.
  const int64_t k_end = g.prepare == APrepare::none ? x.k.end : ceil_div(x.k.end, per_lane) * per_lane;
  const int64_t step = g.flavour == Flavour::u8s8 ? k_end - x.k.begin : sum_lanes(g.flavour) * per_lane;
  alignas(64) char tile[24 * 64];

  for (int64_t r = 0, t = 0; r < rows; t++) {
    // Taller tiles first, so that the heights differ by one unit at most.
    const int64_t left = ceil_div(rows - r, x.tile.rows);
    const int height = static_cast<int>(ceil_div((rows - r) / unit, left) * unit);
    for (int64_t j = 0; j < x.count; j += x.tile.panels) {
      const int64_t count = min64(x.tile.panels, x.count - j);
      Brgemm p;
      p.lda = x.a.stride;
      p.a_offset = p.b_offset = nullptr;
      p.b_panel = x.b.stride;
      p.batch = 1;
      p.ldc = count * kPanel;
      char* c = x.acc ? x.acc + r * p.ldc * 4 : tile;
      p.c = c;
      int64_t k = x.k.begin;
      do {  // once for k = 0 too
        const int64_t lane = (k - x.k.begin) / per_lane;
        p.a = x.a.data + r * x.a.stride + lane * lane_bytes(g.flavour);
        p.b = x.b.data + j * x.b.stride + lane * kGroupBytes;
        p.k = min64(step, k_end - k);
        p.accumulate = k > 0;
        p.soon = p.b + (x.more && t < count ? (count + t) * x.b.stride : 0);  // the t-th tile fetches a t-th panel
        brgemm(p, g.flavour, height, static_cast<int>(count));
        k += step;
      } while (k < k_end);
      if (x.k.end == g.k) finish(g, x, r, height, j, count, c);
    }
    r += height;
  }
}

const char* const kNames[3] = {"gemm_f32." PBM_TIER_NAME, "gemm_bf16." PBM_TIER_NAME, "gemm_u8s8." PBM_TIER_NAME};

}  // namespace

void gemm(const Gemm& g, Range m, Range n) {
  note_kernel(kNames[static_cast<int>(g.flavour)]);
  const int64_t unit = rows_per_row(g), per_lane = k_per_lane(g.flavour), lanes = panel_groups(g.k, g.flavour);
  const int64_t last_panel = ceil_div(n.end, kPanel), chunk = chunk_rows(g, m.end - m.begin);
  // Equal parts of k, in whole blocks of sums.
  const int64_t parts = max64(ceil_div(lanes, kPanelLanes), 1);
  const int64_t part = max64(ceil_div(ceil_div(lanes, parts), 256) * 256 * per_lane, 1);

  for (int64_t i = m.begin; i < m.end; i += chunk) {
    Block x;
    x.m = {i, min64(i + chunk, m.end)};
    const int64_t rows = (x.m.end - x.m.begin) * unit;
    x.tile = cut_tiles(rows, unit);
    const bool quantised = g.flavour == Flavour::u8s8;
    const Rows whole = quantised ? quantise(g, x.m) : Rows{};
    // Short panels pass by many at once, so that C is written in long pieces.
    const int64_t fit = kPanelBytes / max64(lanes * kGroupBytes, 1) / x.tile.panels * x.tile.panels;
    const int64_t count = max64(fit, x.tile.panels);
    // Where k is cut, one part of A meets as many panels as there is room for accumulators before the next part comes.
    const int64_t group_bytes = rows * x.tile.panels * kPanel * 4;
    int64_t step = last_panel;
    char* acc = nullptr;
    if (parts > 1) {
      const int64_t groups = max64(kAccumulatorBytes / group_bytes, 1);
      step = groups * x.tile.panels;
      acc = static_cast<char*>(scratch(ScratchSlot::accumulators, groups * group_bytes));
    }
    for (int64_t j0 = n.begin / kPanel; j0 < last_panel; j0 += step) {
      const int64_t j1 = min64(j0 + step, last_panel);
      int64_t k = 0;
      do {  // once for k = 0 too
        x.k = {k, min64(k + part, g.k)};
        x.a = quantised ? whole : rows_of(g, x.m, x.k);
        if (quantised) x.a.data += k / per_lane * lane_bytes(g.flavour);
        for (int64_t j = j0; j < j1; j += count) {
          x.first = j;
          x.count = min64(count, j1 - j);
          x.b = panels_of(g, j, x.count, x.k);
          x.more = g.b_packed && x.count == x.tile.panels && j + 2 * x.count <= last_panel;
          x.acc = acc ? acc + (j - j0) / x.tile.panels * group_bytes : nullptr;
          multiply(g, x);
        }
        k += part;
      } while (k < g.k);
    }
  }
}

}  // namespace pbm::PBM_TIER
