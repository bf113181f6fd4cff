#include "cpu/kernels/brgemm.h"

#include "cpu/kernels/tile.h"

namespace pbm::PBM_TIER {
namespace {

// How far ahead B is fetched: 32 groups are 100 to 400 cycles, what L2 or L3 take to answer. Without it the hardware's
// prefetchers fall behind at every page; 16 and 64 groups were slower (docs/design.md).
constexpr int64_t kPrefetch = 32 * kGroupBytes;

template <Flavour F, int MR, int NV>
void tile(const Brgemm& p) {
  using D = Dot<F>;
  typename D::Acc acc[MR][NV];
  PBM_UNROLL for (int i = 0; i < MR; i++) PBM_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = D::zero();

  constexpr int64_t kPerLane = k_per_lane(F);
  constexpr int64_t kLaneBytes = lane_bytes(F);
  constexpr bool filled_up = kLaneBytes > 4;  // the last lane too
  const int64_t lanes = filled_up ? ceil_div(p.k, kPerLane) : p.k / kPerLane;
  const int64_t tail_bytes = filled_up ? 0 : p.k % kPerLane * (4 / kPerLane);
  const int64_t lda = p.lda, b_panel = p.b_panel;
  for (int64_t i = 0; i < p.batch; i++) {
    const char* a = p.a + (p.a_offset ? p.a_offset[i] : 0);
    const char* b = p.b + (p.b_offset ? p.b_offset[i] : 0);
    const char* soon = p.soon;
    for (int64_t l = 0; l < lanes; l++) {
      PBM_UNROLL for (int j = 0; j < NV; j++) __builtin_prefetch(b + j * b_panel + kPrefetch, 0, 3);
      if constexpr (MR >= 4) __builtin_prefetch(soon, 0, 2);  // with few rows, reading B is all there is to do
      multiply<D, MR, NV>(acc, a, lda, b, b_panel);
      a += kLaneBytes;
      b += kGroupBytes;
      soon += kGroupBytes;
    }
    if (tail_bytes) {  // the rest of a lane, read without touching what lies behind A
      alignas(4) char last[MR][kLaneBytes] = {};
      for (int r = 0; r < MR; r++) {
        uint32_t lane = 0;  // stored whole: a load of four bytes cannot be served from a store of two
        std::memcpy(&lane, a + r * lda, F == Flavour::bf16 ? 2 : tail_bytes);
        std::memcpy(last[r], &lane, 4);
      }
      multiply<D, MR, NV>(acc, last[0], kLaneBytes, b, b_panel);
    }
  }
  PBM_UNROLL for (int i = 0; i < MR; i++) PBM_UNROLL for (int j = 0; j < NV; j++)
    D::put(static_cast<char*>(p.c) + (i * p.ldc + j * 16) * 4, acc[i][j], p.accumulate);
}

using TileFn = void (*)(const Brgemm&);

template <Flavour F, int MR, int NV>
constexpr TileFn tile_or_null() {
  if constexpr (MR <= (NV <= kTile.panels ? kTile.max_rows : kTile.wide_rows)) return tile<F, MR, NV>;
  return nullptr;
}

#define PBM_ROW(F, MR) \
  {tile_or_null<F, MR, 1>(), tile_or_null<F, MR, 2>(), tile_or_null<F, MR, 3>(), tile_or_null<F, MR, 4>()}
#define PBM_TILES(F)                                                                                  \
  {PBM_ROW(F, 1), PBM_ROW(F, 2), PBM_ROW(F, 3), PBM_ROW(F, 4), PBM_ROW(F, 5), PBM_ROW(F, 6), PBM_ROW(F, 7), \
   PBM_ROW(F, 8)}
static_assert(kTile.max_rows <= 8 && kTile.wide_panels <= 4);

}  // namespace

void brgemm(const Brgemm& p, Flavour flavour, int rows, int panels) {
  static const TileFn tiles[3][8][4] = {PBM_TILES(Flavour::f32), PBM_TILES(Flavour::bf16),
                                        PBM_TILES(Flavour::u8s8)};
  tiles[static_cast<int>(flavour)][rows - 1][panels - 1](p);
}

}  // namespace pbm::PBM_TIER
