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
// Where every chunk would pack B again, chunks are as large as this scratch.
constexpr int64_t kChunkBytesUnpacked = int64_t{32} << 20;
// What of B is kept in L2 while the rows of a chunk pass by: longer panels are cut along k.
constexpr int64_t kPanelLanes = 4096;

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// The rows of one chunk as brgemm reads them.
struct Rows {
  const char* data;
  int64_t stride;  // bytes
  const float* scale;
  const int32_t* zero_point;
};

int64_t rows_per_row(const Gemm& g) { return g.prepare == APrepare::digits ? 3 : 1; }

Rows prepare(const Gemm& g, int64_t begin, int64_t end) {
  if (g.prepare == APrepare::none) {
    const int64_t size = size_of(g.a_dtype);
    return {static_cast<const char*>(g.a) + begin * g.a_row * size, g.a_row * size, nullptr, nullptr};
  }
  const int64_t count = end - begin;
  // An odd number of cache lines: rows a power of two apart would share a few sets of the L1 cache.
  const int64_t stride = (ceil_div(panel_groups(g.k, g.flavour) * lane_bytes(g.flavour), 64) | 1) * 64;
  char* rows = static_cast<char*>(
      scratch(ScratchSlot::a_rows, count * (rows_per_row(g) * stride + sizeof(float) + sizeof(int32_t))));
  if (g.prepare == APrepare::convert) {
    convert_rows(g, begin, end, rows, stride);
    return {rows, stride, nullptr, nullptr};
  }
  float* scale = reinterpret_cast<float*>(rows + count * rows_per_row(g) * stride);
  int32_t* zero_point = reinterpret_cast<int32_t*>(scale + count);
  QuantizeRows q;
  q.k = g.k;
  q.kind = g.prepare == APrepare::digits      ? QuantKind::digits
           : g.prepare == APrepare::symmetric ? QuantKind::symmetric_u8
                                              : QuantKind::asymmetric;
  q.x = static_cast<const char*>(g.a) + begin * g.a_row * size_of(g.a_dtype);
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

// Panels [first, first + count) of B, packed here if they are not yet.
struct Panels {
  const char* data;
  int64_t stride;  // bytes from one panel to the next
};

Panels panels_of(const Gemm& g, int64_t first, int64_t count) {
  const int64_t groups = panel_groups(g.k, g.flavour);
  if (g.b_packed) {
    const int64_t stride = (groups + (g.flavour == Flavour::u8s8)) * kGroupBytes;
    return {static_cast<const char*>(g.b) + first * stride, stride};
  }
  const int64_t stride = groups * kGroupBytes;
  PackB p{g.n, g.k, g.flavour, g.b, g.b_dtype, g.b_row, g.b_col, false, nullptr};
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

// All rows of a chunk times one group of panels.
void chunk_times_panels(const Gemm& g, const Rows& a, Range m, const Panels& b, int64_t first, int64_t count,
                        int tile_rows) {
  const int64_t unit = rows_per_row(g), rows = (m.end - m.begin) * unit;
  const int64_t per_lane = k_per_lane(g.flavour), width = count * kPanel;
  const bool in_parts = panel_groups(g.k, g.flavour) > kPanelLanes;
  const int64_t part = in_parts ? kPanelLanes * per_lane : g.k > 0 ? g.k : 1;  // k = 0: one empty step
  const int64_t step = g.flavour == Flavour::u8s8 ? part : min64(part, sum_lanes(g.flavour) * per_lane);
  alignas(64) char tile[24 * 64];
  char* acc = in_parts ? static_cast<char*>(scratch(ScratchSlot::accumulators, rows * width * 4)) : tile;

  for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += part) {
    for (int64_t r = 0; r < rows;) {
      // Taller tiles first, so that the heights differ by one unit at most.
      const int64_t left = ceil_div(rows - r, tile_rows);
      const int height = static_cast<int>(ceil_div((rows - r) / unit, left) * unit);
      char* c = acc + (in_parts ? r * width * 4 : 0);
      for (int64_t k = k0; k == k0 || k < min64(k0 + part, g.k); k += step) {
        Brgemm p;
        p.a = a.data + r * a.stride + k / per_lane * lane_bytes(g.flavour);
        p.lda = a.stride;
        p.a_offset = p.b_offset = nullptr;
        p.b = b.data + k / per_lane * kGroupBytes;
        p.b_panel = b.stride;
        p.batch = 1;
        p.k = min64(step, min64(k0 + part, g.k) - k);
        p.c = c;
        p.ldc = width;
        p.accumulate = k > 0;
        brgemm(p, g.flavour, height, static_cast<int>(count));
      }
      if (k0 + part >= g.k) {
        EpilogueTile t;
        t.acc = c;
        t.ld_acc = width;
        t.rows = static_cast<int>(height / unit);
        t.row = m.begin + r / unit;
        t.col = first * kPanel;
        t.columns = min64(width, g.n - t.col);
        t.row_scale = a.scale ? a.scale + r / unit : nullptr;
        t.row_zero = a.zero_point ? a.zero_point + r / unit : nullptr;
        t.column_sums = reinterpret_cast<const int32_t*>(b.data + b.stride - kGroupBytes);
        t.column_sums_panel = b.stride / 4;
        epilogue(g, t);
      }
      r += height;
    }
  }
}

const char* const kNames[3] = {"gemm_f32." PBM_TIER_NAME, "gemm_bf16." PBM_TIER_NAME, "gemm_u8s8." PBM_TIER_NAME};

}  // namespace

void gemm(const Gemm& g, Range m, Range n) {
  note_kernel(kNames[static_cast<int>(g.flavour)]);
  int64_t chunk = kChunkRows;
  if (!g.b_packed) {
    const int64_t row_bytes =
        g.prepare == APrepare::none ? 1 : panel_groups(g.k, g.flavour) * lane_bytes(g.flavour) * rows_per_row(g);
    const int64_t fits = kChunkBytesUnpacked / (row_bytes < 1 ? 1 : row_bytes);
    chunk = fits > chunk ? fits : chunk;
  }
  const int64_t last_panel = ceil_div(n.end, kPanel);
  for (int64_t i = m.begin; i < m.end; i += chunk) {
    const Range rows = {i, min64(i + chunk, m.end)};
    const Rows a = prepare(g, rows.begin, rows.end);
    const TileCut cut = cut_tiles((rows.end - rows.begin) * rows_per_row(g), rows_per_row(g));
    for (int64_t j = n.begin / kPanel; j < last_panel; j += cut.panels) {
      const int64_t count = min64(cut.panels, last_panel - j);
      chunk_times_panels(g, a, rows, panels_of(g, j, count), j, count, cut.rows);
    }
  }
}

extern const Kernels table;
const Kernels table = {static_cast<Isa>(PBM_TIER_LEVEL), kTile, brgemm, gemm, pack_b, quantize_rows, column_sum};

}  // namespace pbm::PBM_TIER
