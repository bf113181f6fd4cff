#include "cpu/kernels/attention.h"
#include "cpu/kernels/gemm.h"

namespace pbm {

Range part(int64_t total, int64_t unit, int64_t parts, int64_t i) {
  const int64_t units = ceil_div(total, unit);
  const int64_t begin = units * i / parts * unit, end = units * (i + 1) / parts * unit;
  return {begin < total ? begin : total, end < total ? end : total};
}

// Minimises what the busiest thread does, counted in multiply-adds of one lane of 16: its share of the product, reading
// its panels of B, the rows of A that it prepares (again in every part of n), and the panels of B that it packs (again
// in every part of m).
Grid partition(const Gemm& g, int64_t threads) {
  constexpr double kPrepare = 5, kPack = 8;  // lane-operations per 16 elements
  constexpr double kReadB = 4;               // lane-operations per group of 64 bytes: 2 cycles, from L2 or L3
  constexpr double kWorthAThread = 4096;     // lane-operations: about 1 µs, what a fork costs
  const int64_t per_lane = k_per_lane(g.flavour);
  const double lanes = static_cast<double>(ceil_div(g.k, per_lane));
  const double work = static_cast<double>(g.m) * lanes * static_cast<double>(ceil_div(g.n, kPanel));
  const double reading = lanes * static_cast<double>(ceil_div(g.n, kPanel)) * kReadB;
  const int64_t useful = static_cast<int64_t>((work + reading) / kWorthAThread) + 1;
  const int64_t most = threads < useful ? threads : useful;

  Grid best = {1, 1};
  double least = -1;
  for (int64_t m = 1; m <= most; m++) {
    const int64_t n = most / m;
    const double rows = static_cast<double>(ceil_div(g.m, m));
    const double panels = static_cast<double>(ceil_div(ceil_div(g.n, kPanel), n));
    double cost = (rows + kReadB) * lanes * panels;
    if (g.prepare != APrepare::none) cost += kPrepare * rows * static_cast<double>(g.k) / 16;
    if (!g.b_packed) cost += kPack * panels * static_cast<double>(g.k);
    if (least < 0 || cost < least) {
      least = cost;
      best = {m, n};
    }
  }
  return best;
}

// Minimises what the busiest thread does, in rows: its items' own, and as many again as packing K and V costs an item.
int64_t attention_parts(int64_t rows, int64_t heads, int64_t threads) {
  constexpr int64_t kPack = 16;        // rows' worth of work
  constexpr int64_t kMostRows = 2048;  // of an item: their outputs stay in fp32 meanwhile
  constexpr int64_t kFewestRows = 32;
  const int64_t fewest = ceil_div(rows, kMostRows), most = ceil_div(rows, kFewestRows);
  int64_t best = fewest, least = -1;
  for (int64_t parts = fewest; parts <= most && parts <= fewest + 4 * threads; parts++) {
    const int64_t cost = ceil_div(heads * parts, threads) * (ceil_div(rows, parts) + kPack);
    if (least < 0 || cost < least) {
      least = cost;
      best = parts;
    }
  }
  return best > 0 ? best : 1;
}

}  // namespace pbm
