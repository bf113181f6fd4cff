// Winograd's F(2×2, 3×3) and F(4×4, 3×3): tiles to (m + 2)² matrices, a product for each of them, and back.
#include "common/scratch.h"
#include "cpu/kernels/impl.h"
#include "cpu/kernels/vec.h"

namespace pbm::PBM_TIER {
namespace {

// Transformed tiles and products that stay in L2 beside the weights that pass by.
constexpr int64_t kBlockBytes = int64_t{640} << 10;
constexpr int64_t kSumLanes = 256;  // as in gemm.cpp

// With the points 0, ±1, ±2 and ∞, of which F(2×2) takes the first three.
template <int M>
struct Transform;

template <>
struct Transform<2> {
  static constexpr double kG[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  PBM_INLINE void input(const Vec* d, Vec* o) {
    o[0] = sub(d[0], d[2]);
    o[1] = add(d[1], d[2]);
    o[2] = sub(d[2], d[1]);
    o[3] = sub(d[1], d[3]);
  }
  PBM_INLINE void output(const Vec* m, Vec* o) {
    o[0] = add(add(m[0], m[1]), m[2]);
    o[1] = sub(sub(m[1], m[2]), m[3]);
  }
};

template <>
struct Transform<4> {
  static constexpr double kG[6][3] = {{1. / 4, 0, 0},
                                      {-1. / 6, -1. / 6, -1. / 6},
                                      {-1. / 6, 1. / 6, -1. / 6},
                                      {1. / 24, 1. / 12, 1. / 6},
                                      {1. / 24, -1. / 12, 1. / 6},
                                      {0, 0, 1}};
  PBM_INLINE void input(const Vec* d, Vec* o) {
    const Vec two = set1(2), four = set1(4), five = set1(5);
    o[0] = add(fnmadd(five, d[2], mul(four, d[0])), d[4]);
    const Vec a = fnmadd(four, d[2], d[4]), b = fnmadd(four, d[1], d[3]);
    o[1] = add(a, b);
    o[2] = sub(a, b);
    const Vec c = sub(d[4], d[2]), e = sub(d[3], d[1]);
    o[3] = fmadd(two, e, c);
    o[4] = fnmadd(two, e, c);
    o[5] = add(fnmadd(five, d[3], mul(four, d[1])), d[5]);
  }
  PBM_INLINE void output(const Vec* m, Vec* o) {
    const Vec s = add(m[1], m[2]), d = sub(m[1], m[2]), t = add(m[3], m[4]), u = sub(m[3], m[4]);
    o[0] = add(add(m[0], s), t);
    o[1] = fmadd(set1(2), u, d);
    o[2] = fmadd(set1(4), t, s);
    o[3] = add(fmadd(set1(8), u, d), m[5]);
  }
};

// A tile by its place: of which image, and its first output pixel.
struct Tile {
  int64_t batch, h, w;
};

template <int M>
Tile tile_at(const Winograd& p, int64_t index) {
  const int64_t across = ceil_div(p.conv.out[2], M), down = ceil_div(p.conv.out[1], M);
  return {index / (across * down), index / across % down * M, index % across * M};
}

// Bᵀ d B of one tile and 16 channels, of which n exist; out[i] lies i·next floats on.
template <int M, bool Inside>
PBM_INLINE void transform_input(const Winograd& p, const float* x, int64_t h, int64_t w, int n, float* out,
                                int64_t next) {
  constexpr int T = M + 2;
  const ConvImage& image = p.conv.x;
  Vec half[T][T];  // [column][row]
  PBM_UNROLL for (int j = 0; j < T; j++) {
    Vec column[T];
    PBM_UNROLL for (int i = 0; i < T; i++) {
      const bool inside = Inside || (static_cast<uint64_t>(h + i) < static_cast<uint64_t>(image.size[1]) &&
                                     static_cast<uint64_t>(w + j) < static_cast<uint64_t>(image.size[2]));
      const float* from = x + i * image.stride[1] + j * image.stride[2];
      column[i] = !inside ? zero() : Inside ? load(from) : load_n(from, n);
    }
    Transform<M>::input(column, half[j]);
  }
  PBM_UNROLL for (int i = 0; i < T; i++) {
    Vec row[T], o[T];
    PBM_UNROLL for (int j = 0; j < T; j++) row[j] = half[j][i];
    Transform<M>::input(row, o);
    PBM_UNROLL for (int j = 0; j < T; j++) store(out + (i * T + j) * next, o[j]);
  }
}

template <int M>
void transform_tiles(const Winograd& p, int64_t group, Range tiles, float* v, int64_t row, int64_t next) {
  const ConvImage& image = p.conv.x;
  for (int64_t t = tiles.begin; t < tiles.end; t++) {
    const Tile tile = tile_at<M>(p, t);
    const int64_t h = tile.h - p.pad[0], w = tile.w - p.pad[1];
    const float* x = static_cast<const float*>(image.data) + tile.batch * image.batch_stride + group * p.conv.c +
                     h * image.stride[1] + w * image.stride[2];
    const bool inside = h >= 0 && w >= 0 && h + M + 2 <= image.size[1] && w + M + 2 <= image.size[2];
    float* out = v + (t - tiles.begin) * row;
    for (int64_t c = 0; c < p.conv.c; c += kWidth) {
      const int n = static_cast<int>(min64(kWidth, p.conv.c - c));
      if (inside && n == kWidth)
        transform_input<M, true>(p, x + c, h, w, n, out + c, next);
      else
        transform_input<M, false>(p, x + c, h, w, n, out + c, next);
    }
  }
}

// Aᵀ m A of one tile and 16 channels: M×M rows of `row` floats.
template <int M>
PBM_INLINE void transform_output(const float* m, int64_t next, float* out, int64_t row) {
  constexpr int T = M + 2;
  Vec half[T][M];  // [column][row]
  PBM_UNROLL for (int j = 0; j < T; j++) {
    Vec column[T];
    PBM_UNROLL for (int i = 0; i < T; i++) column[i] = load(m + (i * T + j) * next);
    Transform<M>::output(column, half[j]);
  }
  PBM_UNROLL for (int i = 0; i < M; i++) {
    Vec across[T], o[M];
    PBM_UNROLL for (int j = 0; j < T; j++) across[j] = half[j][i];
    Transform<M>::output(across, o);
    PBM_UNROLL for (int j = 0; j < M; j++) store(out + (i * M + j) * row, o[j]);
  }
}

template <int M>
void finish_tiles(const Winograd& p, const Gemm& g, Range tiles, int64_t col, int64_t columns, const float* m,
                  int64_t next) {
  alignas(64) float out[M * M * 64];
  for (int64_t t = tiles.begin; t < tiles.end; t++) {
    const Tile tile = tile_at<M>(p, t);
    const float* from = m + (t - tiles.begin) * columns;
    for (int64_t j = 0; j < columns; j += kWidth) transform_output<M>(from + j, next, out + j, columns);
    EpilogueTile e{};
    e.ld_acc = columns;
    e.rows = static_cast<int>(min64(M, p.conv.out[2] - tile.w));
    e.col = col;
    e.columns = min64(columns, g.n - col);
    for (int64_t i = 0; i < min64(M, p.conv.out[1] - tile.h); i++) {
      e.acc = out + i * M * columns;
      e.row = (tile.batch * p.conv.out[1] + tile.h + i) * p.conv.out[2] + tile.w;
      epilogue(g, e);
    }
  }
}

// Rows of V times a few panels of U, for each of the (m + 2)² places.
struct Products {
  const float* v;
  int64_t row, next;  // floats
  const char* u;
  int64_t u_panel, u_next;  // bytes
  int64_t c, rows, panels;
  float* m;
  int64_t m_next;
};

void multiply(const Products& p, int places) {
  const int64_t tallest = p.panels <= kTile.panels ? kTile.max_rows : kTile.wide_rows;
  for (int i = 0; i < places; i++)
    for (int64_t r = 0; r < p.rows;) {
      const int64_t height = ceil_div(p.rows - r, ceil_div(p.rows - r, tallest));
      for (int64_t k = 0; k == 0 || k < p.c; k += kSumLanes) {  // without channels: zeros
        Brgemm b{};
        b.a = reinterpret_cast<const char*>(p.v + i * p.next + r * p.row + k);
        b.lda = p.row * 4;
        b.b = p.u + i * p.u_next + k * kGroupBytes;
        b.b_panel = p.u_panel;
        b.batch = 1;
        b.k = min64(kSumLanes, p.c - k);
        b.c = p.m + i * p.m_next + r * p.panels * kPanel;
        b.ldc = p.panels * kPanel;
        b.accumulate = k > 0;
        b.soon = b.b;
        brgemm(b, Flavour::f32, static_cast<int>(height), static_cast<int>(p.panels));
      }
      r += height;
    }
}

template <int M>
void run(const Winograd& p, int64_t group, Range tiles, Range panels) {
  constexpr int kPlaces = (M + 2) * (M + 2);
  const Conv& conv = p.conv;
  const Gemm g = group_epilogue(conv, group);
  const int64_t all_panels = ceil_div(g.n, kPanel), width = min64(kTile.wide_panels, panels.end - panels.begin);
  const int64_t row = ceil_div(conv.c, kWidth) * kWidth + kWidth;  // an odd number of cache lines, mostly
  const int64_t fit = kBlockBytes / (kPlaces * (row + width * kPanel) * 4);
  const int64_t most = max64(fit / kTile.wide_rows, 1) * kTile.wide_rows;
  Products x;
  x.row = row;
  x.u_next = conv.c * kGroupBytes;
  x.u_panel = kPlaces * x.u_next;
  x.c = conv.c;
  const char* u = static_cast<const char*>(conv.weight) + group * all_panels * x.u_panel;
  for (int64_t t = tiles.begin; t < tiles.end;) {
    const int64_t count = ceil_div(tiles.end - t, ceil_div(tiles.end - t, most));
    const Range block = {t, t + count};
    x.next = count * row;
    x.m_next = count * width * kPanel;
    float* v = static_cast<float*>(
        scratch(ScratchSlot::a_rows, static_cast<size_t>(kPlaces * (x.next + x.m_next)) * sizeof(float)));
    x.v = v;
    x.m = v + kPlaces * x.next;
    x.rows = count;
    transform_tiles<M>(p, group, block, v, row, x.next);
    for (int64_t j = panels.begin; j < panels.end; j += width) {
      x.panels = min64(width, panels.end - j);
      x.u = u + j * x.u_panel;
      multiply(x, kPlaces);
      finish_tiles<M>(p, g, block, j * kPanel, x.panels * kPanel, x.m, x.m_next);
    }
    t += count;
  }
}

// U = G g Gᵀ, in double and rounded once.
template <int M>
void pack(const WinogradPack& p, int64_t begin, int64_t end) {
  constexpr int T = M + 2;
  const double(&G)[T][3] = Transform<M>::kG;
  const int64_t panels = ceil_div(p.n, kPanel), panel_floats = T * T * p.c * kPanel;
  for (int64_t panel = begin; panel < end; panel++) {
    float* out = p.out + panel * panel_floats;
    const int64_t group = panel / panels, first = panel % panels * kPanel;
    for (int64_t c = 0; c < p.c; c++)
      for (int64_t j = 0; j < kPanel; j++) {
        double half[T][3] = {};
        if (first + j < p.n) {
          const int64_t at = group * p.w_group + (first + j) * p.w_n + c * p.w_c;
          for (int i = 0; i < T; i++)
            for (int q = 0; q < 3; q++)
              for (int s = 0; s < 3; s++)
                half[i][q] += G[i][s] * p.w[at + s * p.w_h + q * p.w_w];
        }
        for (int i = 0; i < T; i++)
          for (int q = 0; q < T; q++) {
            double u = 0;
            for (int s = 0; s < 3; s++) u += half[i][s] * G[q][s];
            out[((i * T + q) * p.c + c) * kPanel + j] = static_cast<float>(u);
          }
      }
  }
}

}  // namespace

void conv_winograd(const Winograd& p, int64_t group, Range tiles, Range panels) {
  note_kernel(p.m == 2 ? "conv_winograd2_f32." PBM_TIER_NAME : "conv_winograd4_f32." PBM_TIER_NAME);
  p.m == 2 ? run<2>(p, group, tiles, panels) : run<4>(p, group, tiles, panels);
}

void pack_winograd(const WinogradPack& p, int64_t begin, int64_t end) {
  p.m == 2 ? pack<2>(p, begin, end) : pack<4>(p, begin, end);
}

}  // namespace pbm::PBM_TIER
