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
  PBM_INLINE void gradient(const Vec* d, Vec* o) {  // the transpose of output
    o[0] = d[0];
    o[1] = add(d[0], d[1]);
    o[2] = sub(d[0], d[1]);
    o[3] = sub(zero(), d[1]);
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
  PBM_INLINE void gradient(const Vec* d, Vec* o) {  // the transpose of output
    const Vec even = add(d[0], d[2]), odd = add(d[1], d[3]);
    const Vec far_even = fmadd(set1(4), d[2], d[0]), far_odd = fmadd(set1(8), d[3], mul(set1(2), d[1]));
    o[0] = d[0];
    o[1] = add(even, odd);
    o[2] = sub(even, odd);
    o[3] = add(far_even, far_odd);
    o[4] = sub(far_even, far_odd);
    o[5] = d[3];
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

// Sixteen filters of sixteen channels as they lie in memory, channel by channel; zeros where there are none.
void gather_filters(const WinogradPack& p, int64_t group, int64_t n, int64_t c, float (&out)[kPanel][kWidth * 9]) {
  for (int64_t j = 0; j < kPanel; j++)
    for (int64_t i = 0; i < kWidth; i++) {
      float* to = out[j] + i * 9;
      if (n + j >= p.n || c + i >= p.c) {
        std::memset(to, 0, 9 * sizeof(float));
        continue;
      }
      const float* from = p.w + group * p.w_group + (n + j) * p.w_n + (c + i) * p.w_c;
      for (int64_t h = 0; h < 3; h++)
        for (int64_t w = 0; w < 3; w++) to[h * 3 + w] = from[h * p.w_h + w * p.w_w];
    }
}

// G g Gᵀ of sixteen filters' channel; g is [tap][filter].
template <int M>
PBM_INLINE void transform_filter(const Vec* g, float* out, int64_t next) {
  constexpr int T = M + 2;
  constexpr const double(&G)[T][3] = Transform<M>::kG;
  Vec half[T][3];
  PBM_UNROLL for (int i = 0; i < T; i++) PBM_UNROLL for (int w = 0; w < 3; w++) {
    half[i][w] = mul(set1(static_cast<float>(G[i][0])), g[w]);
    half[i][w] = fmadd(set1(static_cast<float>(G[i][1])), g[3 + w], half[i][w]);
    half[i][w] = fmadd(set1(static_cast<float>(G[i][2])), g[6 + w], half[i][w]);
  }
  PBM_UNROLL for (int i = 0; i < T; i++) PBM_UNROLL for (int j = 0; j < T; j++) {
    Vec u = mul(set1(static_cast<float>(G[j][0])), half[i][0]);
    u = fmadd(set1(static_cast<float>(G[j][1])), half[i][1], u);
    u = fmadd(set1(static_cast<float>(G[j][2])), half[i][2], u);
    store(out + (i * T + j) * next, u);
  }
}

template <int M>
void pack(const WinogradPack& p, int64_t begin, int64_t end) {
  constexpr int kPlaces = (M + 2) * (M + 2);
  const int64_t panels = ceil_div(p.n, kPanel), next = p.c * kPanel;
  alignas(64) float filters[kPanel][kWidth * 9], turned[kWidth * 9][kPanel];
  for (int64_t panel = begin; panel < end; panel++) {
    float* out = p.out + panel * kPlaces * next;
    for (int64_t c = 0; c < p.c; c += kWidth) {
      gather_filters(p, panel / panels, panel % panels * kPanel, c, filters);
      for (int k = 0; k < 9; k++) {
        IVec r[kWidth];
        PBM_UNROLL for (int j = 0; j < kWidth; j++) r[j] = iload(filters[j] + k * kWidth);
        transpose16(r);
        PBM_UNROLL for (int j = 0; j < kWidth; j++) istore(turned[k * kWidth + j], r[j]);
      }
      for (int64_t i = 0; i < min64(kWidth, p.c - c); i++) {
        Vec g[9];
        PBM_UNROLL for (int t = 0; t < 9; t++) g[t] = load(turned[i * 9 + t]);
        transform_filter<M>(g, out + (c + i) * kPanel, next);
      }
    }
  }
}

// A dy Aᵀ of one tile and 16 channels, of which n exist.
template <int M>
PBM_INLINE void transform_gradient(const ConvImage& dy, const float* from, int64_t rows, int64_t columns, int n,
                                   float* out, int64_t next) {
  constexpr int T = M + 2;
  Vec half[T][M];  // [row][column]
  PBM_UNROLL for (int j = 0; j < M; j++) {
    Vec column[M], o[T];
    PBM_UNROLL for (int i = 0; i < M; i++)
      column[i] = i < rows && j < columns ? load_n(from + i * dy.stride[1] + j * dy.stride[2], n) : zero();
    Transform<M>::gradient(column, o);
    PBM_UNROLL for (int i = 0; i < T; i++) half[i][j] = o[i];
  }
  PBM_UNROLL for (int i = 0; i < T; i++) {
    Vec o[T];
    Transform<M>::gradient(half[i], o);
    PBM_UNROLL for (int j = 0; j < T; j++) store(out + (i * T + j) * next, o[j]);
  }
}

template <int M>
void gradient_tiles(const WinogradTiles& g, int64_t group, Range tiles) {
  transform_tiles<M>(g.p, group, tiles, g.x_tiles, g.x_row, g.x_next);
  const Conv& conv = g.p.conv;
  for (int64_t t = tiles.begin; t < tiles.end; t++) {
    const Tile tile = tile_at<M>(g.p, t);
    const float* dy = static_cast<const float*>(g.dy.data) + tile.batch * g.dy.batch_stride + group * g.n +
                      tile.h * g.dy.stride[1] + tile.w * g.dy.stride[2];
    float* out = g.dy_tiles + (t - tiles.begin) * g.dy_row;
    for (int64_t c = 0; c < g.n; c += kWidth)
      transform_gradient<M>(g.dy, dy + c, conv.out[1] - tile.h, conv.out[2] - tile.w,
                            static_cast<int>(min64(kWidth, g.n - c)), out + c, g.dy_next);
  }
}

// Gᵀ M G.
template <int M>
void gradient_output(const float* sums, int64_t next, float* out, int64_t out_next, int64_t count) {
  constexpr int T = M + 2;
  constexpr const double(&G)[T][3] = Transform<M>::kG;
  for (int64_t at = 0; at < count; at += kWidth) {
    Vec half[3][T];
    PBM_UNROLL for (int j = 0; j < T; j++) PBM_UNROLL for (int w = 0; w < 3; w++) {
      half[w][j] = zero();
      PBM_UNROLL for (int i = 0; i < T; i++)
        half[w][j] = fmadd(set1(static_cast<float>(G[i][w])), load(sums + (i * T + j) * next + at), half[w][j]);
    }
    PBM_UNROLL for (int h = 0; h < 3; h++) PBM_UNROLL for (int w = 0; w < 3; w++) {
      Vec y = zero();
      PBM_UNROLL for (int j = 0; j < T; j++) y = fmadd(set1(static_cast<float>(G[j][w])), half[h][j], y);
      store(out + (h * 3 + w) * out_next + at, y);
    }
  }
}

}  // namespace

void winograd_gradient_tiles(const WinogradTiles& p, int64_t group, Range tiles) {
  note_kernel(p.p.m == 2 ? "conv_winograd2_weight_gradient_f32." PBM_TIER_NAME
                         : "conv_winograd4_weight_gradient_f32." PBM_TIER_NAME);
  p.p.m == 2 ? gradient_tiles<2>(p, group, tiles) : gradient_tiles<4>(p, group, tiles);
}

void winograd_gradient_output(int m, const float* sums, int64_t next, float* out, int64_t out_next, int64_t count) {
  m == 2 ? gradient_output<2>(sums, next, out, out_next, count) : gradient_output<4>(sums, next, out, out_next, count);
}

void conv_winograd(const Winograd& p, int64_t group, Range tiles, Range panels) {
  note_kernel(p.m == 2 ? "conv_winograd2_f32." PBM_TIER_NAME : "conv_winograd4_f32." PBM_TIER_NAME);
  p.m == 2 ? run<2>(p, group, tiles, panels) : run<4>(p, group, tiles, panels);
}

void pack_winograd(const WinogradPack& p, int64_t begin, int64_t end) {
  p.m == 2 ? pack<2>(p, begin, end) : pack<4>(p, begin, end);
}

}  // namespace pbm::PBM_TIER
