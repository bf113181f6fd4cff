// The CUDA kernels' own source on the simulator (cuda_sim), against plain references: packed layout, fragment mapping,
// tails, pipeline, quantisation, epilogue. No torch, no GPU.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "cuda/kernels/int8_linear_sm80.cuh"
#include "cuda/kernels/pack_int8_linear_weight_sm80.cuh"
#include "cuda/kernels/quantize_per_token_sm80.cuh"
#include "testing.h"

namespace {

using namespace pbm;
using namespace pbm::cuda;
using namespace pbm::cuda_sim;

// --- index functions --------------------------------------------------------------------------------------------------

void test_fragment_mapping() {
  using Tables = ptx::MmaTables;
  for (int lane = 0; lane < 32; lane++) {
    // ldmatrix gives register q of a lane bytes 4·(lane % 4) of row lane / 4 of matrix q, whose rows the lanes 8q… name.
    for (int i = 0; i < 16; i++) {
      const int matrix = i / 4, naming_lane = 8 * matrix + lane / 4;
      expect(a_tile_row(naming_lane) == Tables::a_row(lane, i), "A row");
      expect(a_tile_byte(naming_lane) + lane % 4 * 4 + i % 4 == Tables::a_column(lane, i), "A column");
    }
    for (int mma = 0; mma < kMmasPerPanel; mma++) {
      for (int i = 0; i < 8; i++) {
        const int half = i / 4, byte = b_byte(lane) + mma * 4 + i % 4;
        expect(b_group(lane, half) * 4 + byte % 4 == Tables::b_row(lane, i), "B row");
        expect(byte / 4 == 2 * Tables::b_column(lane, i) + mma, "B column in the panel");
      }
    }
    for (int half = 0; half < 2; half++) {
      for (int c = 0; c < kColumnsPerLane; c++) {
        const int mma = accumulator_mma(c), i = accumulator_register(c, half);
        expect(accumulator_row(lane, half) == Tables::c_row(lane, i), "accumulator row");
        expect(accumulator_first_column(lane) + c == 2 * Tables::c_column(lane, i) + mma, "accumulator column");
      }
    }
  }
}

void test_shared_memory_banks() {
  std::set<int> places;
  for (int group = 0; group < kTileGroups; group++) {
    for (int byte = 0; byte < kGroupBytes; byte++) places.insert(b_shared_byte(group, byte));
  }
  expect(places.size() == kBPanelBytes && *places.begin() == 0 && *places.rbegin() == kBPanelBytes - 1,
         "b_shared_byte is not a permutation of a panel's tile");
  // 8-byte reads go by half warps, ldmatrix by 8 rows of 16 bytes: each phase must touch all 32 banks once.
  for (int first = 0; first < 32; first += 16) {
    for (int half = 0; half < 2; half++) {
      std::set<int> banks;
      for (int lane = first; lane < first + 16; lane++) {
        const int byte = b_shared_byte(b_group(lane, half), b_byte(lane));
        banks.insert({byte / 4 % 32, (byte / 4 + 1) % 32});
      }
      expect(banks.size() == 32, "bank conflict in B");
    }
  }
  for (int first = 0; first < 32; first += 8) {
    std::set<int> banks;
    for (int lane = first; lane < first + 8; lane++) {
      const int byte = a_tile_row(lane) * kARowStride + a_tile_byte(lane);
      for (int word = 0; word < 4; word++) banks.insert((byte / 4 + word) % 32);
    }
    expect(banks.size() == 32, "bank conflict in A");
  }
}

void test_tile_choice() {
  const auto choose = [](int64_t rows, int64_t columns) { return choose_int8_linear({rows, columns, 132}); };
  expect(choose(1, 4096) == Int8LinearTileName::small, "tile of 1 row");
  expect(choose(16, 4096) == Int8LinearTileName::small, "tile of 16 rows");
  expect(choose(17, 4096) == Int8LinearTileName::medium, "tile of 17 rows");
  expect(choose(1024, 768) == Int8LinearTileName::medium, "48 large tiles leave multiprocessors idle");
  expect(choose(4096, 4096) == Int8LinearTileName::large, "tile of a large product");

  const QuantizePerTokenConfig wide = choose_quantize_per_token({100, 4096, 4096, 2, true});
  expect(wide.vectorized && wide.threads == 256 && wide.blocks == 100, "quantize_per_token, bf16 4096");
  expect(!choose_quantize_per_token({1, 4097, 4112, 2, true}).vectorized, "odd depth is not vectorized");
  expect(!choose_quantize_per_token({1, 4096, 4096, 2, false}).vectorized, "misaligned is not vectorized");
  expect(choose_quantize_per_token({1, 1, 1, 4, true}).threads == 32, "one warp for a short row");
}

// --- packing ----------------------------------------------------------------------------------------------------------

struct Weight {
  int columns, depth;
  std::vector<int8_t> values;  // (columns, depth)
  Buffer<int8_t> packed;
};

Weight pack(int columns, int depth, std::vector<int8_t> values, const Schedule& schedule) {
  const int panels = (columns + 15) / 16, groups = (depth + 3) / 4;
  Weight w{columns, depth, std::move(values), Buffer<int8_t>(static_cast<size_t>(panels * (groups + 1) * 64))};
  const PackInt8LinearWeightParams params{w.values.data(), columns, depth, w.packed.data()};
  if (panels > 0) simulate(panels, kPackThreads, schedule, pack_int8_linear_weight_sm80, params);
  return w;
}

std::vector<int8_t> random_int8(int count) {
  std::vector<int8_t> values(static_cast<size_t>(count));
  for (int8_t& v : values) v = static_cast<int8_t>(random_int(-128, 127));
  return values;
}

void test_packing() {
  const int shapes[][2] = {{1, 1}, {16, 4}, {17, 5}, {40, 70}, {16, 131}, {3, 0}, {33, 64}};
  for (const auto& [columns, depth] : shapes) {
    for (const Schedule& schedule : kSchedules) {
      Weight w = pack(columns, depth, random_int8(columns * depth), schedule);
      const std::string name = "packing " + std::to_string(columns) + "×" + std::to_string(depth);
      const int8_t* at = w.packed.data();  // walked in storage order
      for (int panel = 0; panel < (columns + 15) / 16; panel++) {
        int32_t sums[16] = {};
        for (int group = 0; group < (depth + 3) / 4; group++) {
          for (int lane = 0; lane < 16; lane++) {
            for (int i = 0; i < 4; i++) {
              const int n = panel * 16 + lane, k = group * 4 + i;
              const int expected = n < columns && k < depth ? w.values[static_cast<size_t>(n * depth + k)] : 0;
              sums[lane] += expected;
              expect(*at++ == expected, name);
            }
          }
        }
        expect(std::memcmp(at, sums, sizeof(sums)) == 0, name + ", column sums");
        at += sizeof(sums);
      }
    }
  }
}

// --- quantisation -----------------------------------------------------------------------------------------------------

struct ReferenceRow {
  std::vector<int> q;
  float scale;
  int zero_point;
};

// The contract, step by step, in fp32 as it is stated.
ReferenceRow reference_quantization(const std::vector<float>& x, bool symmetric) {
  ReferenceRow row{std::vector<int>(x.size(), 0), 1.0f, 0};
  float low = 0, high = 0;
  for (const float v : x) {
    if (!std::isfinite(v)) return {row.q, NAN, 0};
    low = std::min(low, v);
    high = std::max(high, v);
  }
  const float largest = std::max(high, -low);
  if (largest == 0) return row;
  row.scale = std::max(symmetric ? largest / 127.0f : high / 255.0f - low / 255.0f, 0x1p-126f);
  const float inverse = 1.0f / row.scale;
  if (!symmetric) row.zero_point = static_cast<int>(std::min(255.0f, std::nearbyint(-low * inverse)));
  for (size_t i = 0; i < x.size(); i++) {
    const int q = static_cast<int>(std::nearbyint(x[i] * inverse)) + row.zero_point;
    row.q[i] = std::max(symmetric ? -127 : 0, std::min(symmetric ? 127 : 255, q));
  }
  return row;
}

template <typename T>
std::vector<float> special_row(int kind, int depth) {
  std::vector<float> row(static_cast<size_t>(depth));
  for (float& v : row) v = random_float();
  if (depth == 0) return row;
  float& last = row.back();
  switch (kind) {
    case 0: break;
    case 1:
      for (float& v : row) v = 0;
      break;
    case 2: last = NAN; break;
    case 3: last = INFINITY; break;
    case 4: last = -INFINITY; break;
    case 5:
      for (float& v : row) v = std::fabs(v) + 1;
      break;
    case 6:
      for (float& v : row) v = -std::fabs(v) - 1;
      break;
    case 7:
      for (float& v : row) v *= 3e-39f;
      break;  // the scale would be subnormal; 0 in fp16
    case 8:
      for (float& v : row) v = 1.4e-45f;
      break;  // the scale would be 0
    case 9:
      row.front() = FLT_MAX;
      last = -FLT_MAX;
      break;
    case 10:
      for (float& v : row) v = static_cast<float>(random_int(-127, 127)) / 2;
      last = 63.5f;
      break;  // ties
    default: break;
  }
  for (float& v : row) v = to_float(from_float<T>(v));
  return row;
}
constexpr int kSpecialRows = 11;

template <typename T, int kVector>
void simulate_quantize(const QuantizePerTokenParams<T>& params, bool symmetric, const QuantizePerTokenConfig& config,
                       const Schedule& schedule) {
  simulate(config.blocks, config.threads, schedule,
           symmetric ? quantize_per_token_sm80<T, kVector, true> : quantize_per_token_sm80<T, kVector, false>, params);
}

template <typename T>
void test_quantization(int depth, bool symmetric, size_t offset, const Schedule& schedule) {
  const std::string name = std::string("quantize_per_token ") + kName<T> +
                           (symmetric ? " symmetric " : " asymmetric ") + std::to_string(depth) + ", " + schedule.name;
  const int stride = (depth + 15) / 16 * 16;
  const auto rows = static_cast<size_t>(kSpecialRows), d = static_cast<size_t>(depth), s = static_cast<size_t>(stride);
  Buffer<T> input(rows * d, offset);
  Buffer<uint8_t> q(rows * s);
  Buffer<float> scale(rows);
  Buffer<int32_t> zero_point(rows);
  std::vector<std::vector<float>> x;
  for (size_t row = 0; row < rows; row++) {
    x.push_back(special_row<T>(static_cast<int>(row), depth));
    for (size_t k = 0; k < d; k++) input[row * d + k] = from_float<T>(x[row][k]);
  }
  const QuantizePerTokenParams<T> params{input.data(), kSpecialRows,     depth, q.data(), stride,
                                         scale.data(), zero_point.data()};
  QuantizePerTokenConfig config = choose_quantize_per_token({kSpecialRows, depth, stride, sizeof(T), offset == 0});
  config.blocks = 3;  // so that a block takes several rows
  if (config.vectorized) {
    simulate_quantize<T, 16 / sizeof(T)>(params, symmetric, config, schedule);
  } else {
    simulate_quantize<T, 1>(params, symmetric, config, schedule);
  }
  for (size_t row = 0; row < rows; row++) {
    const ReferenceRow expected = reference_quantization(x[row], symmetric);
    const std::string at = name + ", row " + std::to_string(row);
    expect(std::isnan(expected.scale) ? std::isnan(scale[row]) : scale[row] == expected.scale, at + ", scale");
    expect(zero_point[row] == expected.zero_point, at + ", zero point");
    for (size_t k = 0; k < s; k++) {
      const uint8_t byte = q[row * s + k];
      const int got = symmetric ? static_cast<int8_t>(byte) : byte;
      expect(got == (k < d ? expected.q[k] : 0), at + ", q");
    }
  }
}

template <typename T>
void test_quantization() {
  for (const int depth : {0, 1, 3, 8, 64, 100, 520, 2049}) {
    for (const bool symmetric : {false, true}) {
      for (const Schedule& schedule : kSchedules) {
        test_quantization<T>(depth, symmetric, 0, schedule);
        test_quantization<T>(depth, symmetric, sizeof(T), schedule);
      }
    }
  }
}

// --- the product ------------------------------------------------------------------------------------------------------

double reference_activation(double x, Activation activation) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return std::isnan(x) ? x : std::max(x, 0.0);
    case Activation::gelu_erf: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::silu: return x / (1 + std::exp(-x));
  }
  return x;
}

struct Product {
  int rows, columns, depth;
  Activation activation = Activation::none;
  int bias = 0;  // 0 none, 1 float, 2 T
  bool residual = false;
};

template <typename T, typename Q, typename Tile>
void test_product(const Product& p, const Schedule& schedule) {
  const std::string name = std::string("int8_linear ") + kName<T> + (kUnsigned<Q> ? " u8 " : " s8 ") +
                           std::to_string(p.rows) + "×" + std::to_string(p.columns) + "×" + std::to_string(p.depth) +
                           " tile " + std::to_string(Tile::kRows) + "×" + std::to_string(Tile::kColumns) +
                           " activation " + std::to_string(static_cast<int>(p.activation)) + ", " + schedule.name;
  const auto m = static_cast<size_t>(p.rows), n = static_cast<size_t>(p.columns), k = static_cast<size_t>(p.depth);
  const size_t stride = (k + 15) / 16 * 16;
  Weight w = pack(p.columns, p.depth, random_int8(p.columns * p.depth), schedule);
  Buffer<uint8_t> q(m * stride);  // the padding stays 0xa5: its value must not matter
  Buffer<float> x_scale(m), w_scale(n), float_bias(n);
  Buffer<int32_t> zero_point(m);
  Buffer<T> bias(n), residual(m * n), output(m * n);
  for (size_t i = 0; i < m; i++) {
    x_scale[i] = i == 1 ? NAN : 0.01f * (1 + std::fabs(random_float()));
    zero_point[i] = kUnsigned<Q> ? random_int(0, 255) : -12345;  // not to be read for int8
    for (size_t j = 0; j < k; j++) q[i * stride + j] = static_cast<uint8_t>(random_int(0, 255));
  }
  for (size_t j = 0; j < n; j++) {
    w_scale[j] = 0.01f * (1 + std::fabs(random_float()));
    float_bias[j] = random_float();
    bias[j] = from_float<T>(random_float());
  }
  for (size_t i = 0; i < m * n; i++) residual[i] = from_float<T>(random_float());

  Int8LinearParams<T> params{};
  params.q = q.data();
  params.q_stride = static_cast<int64_t>(stride);
  params.x_scale = x_scale.data();
  params.zero_point = zero_point.data();
  params.packed_weight = w.packed.data();
  params.w_scale = w_scale.data();
  params.bias = p.bias == 0 ? nullptr : p.bias == 1 ? static_cast<void*>(float_bias.data()) : bias.data();
  params.bias_is_float = p.bias == 1;
  params.residual = p.residual ? residual.data() : nullptr;
  params.output = output.data();
  params.rows = p.rows;
  params.columns = p.columns;
  params.groups = panel_groups(p.depth, Flavour::u8s8);
  params.activation = p.activation;
  params.vectorized = p.columns % 4 == 0;
  simulate(int8_linear_blocks<Tile>(p.rows, p.columns), Tile::kThreads, schedule, int8_linear_sm80<T, Q, Tile>, params);

  const double unit = std::is_same_v<T, float> ? 0x1p-23 : std::is_same_v<T, BFloat16> ? 0x1p-7 : 0x1p-10;
  for (size_t i = 0; i < m; i++) {
    for (size_t j = 0; j < n; j++) {
      int64_t sum = 0;
      for (size_t d = 0; d < k; d++) {
        const int byte = q[i * stride + d];
        const int value = kUnsigned<Q> ? byte - zero_point[i] : static_cast<int8_t>(byte);
        sum += value * w.values[j * k + d];
      }
      const double bias_value = p.bias == 0 ? 0 : p.bias == 1 ? float_bias[j] : to_float(bias[j]);
      const double product = static_cast<double>(sum) * x_scale[i] * w_scale[j];
      const double added = p.residual ? to_float(residual[i * n + j]) : 0.0f;
      const double expected = reference_activation(product + bias_value, p.activation) + added;
      const double got = to_float(output[i * n + j]);
      // One rounding to T, and a few of fp32 at the size of the intermediate values.
      const double bound = unit * std::fabs(expected) / 2 + 0x1p-20 * (std::fabs(product) + std::fabs(bias_value) + 1);
      expect(std::isnan(expected) ? std::isnan(got) : std::fabs(got - expected) <= bound,
             name + ", (" + std::to_string(i) + ", " + std::to_string(j) + "): expected " + std::to_string(expected) +
                 ", got " + std::to_string(got));
    }
  }
}

template <typename T, typename Q, typename Tile>
void test_products() {
  const Product products[] = {
      {1, 1, 1},
      {3, 5, 0, Activation::none, 1},
      {2, 16, 32},
      {17, 33, 65, Activation::relu, 1, true},
      {Tile::kRows, Tile::kColumns, 64, Activation::gelu_erf, 2, true},
      {Tile::kRows + 1, Tile::kColumns + 4, 100, Activation::gelu_tanh, 2},
      {5, Tile::kColumns - 1, kTileDepth * Tile::kStages + 3, Activation::silu, 0, true},
  };
  for (const Product& product : products) {
    for (const Schedule& schedule : kSchedules) test_product<T, Q, Tile>(product, schedule);
  }
}

template <typename Tile>
void test_products_of_tile() {
  test_products<float, uint8_t, Tile>();
  test_products<BFloat16, int8_t, Tile>();
  test_products<Float16, uint8_t, Tile>();
}

// The largest K, with the operands of the largest sum: nothing wraps around.
void test_largest_sum() {
  const int depth = static_cast<int>(kMaxInt8K);
  const Schedule& schedule = kSchedules[0];
  Weight w = pack(1, depth, std::vector<int8_t>(static_cast<size_t>(depth), -128), schedule);
  const size_t stride = (static_cast<size_t>(depth) + 15) / 16 * 16;
  Buffer<uint8_t> q(stride);
  std::memset(q.data(), 255, stride);
  Buffer<float> one(1), output(1);
  one[0] = 1.0f;
  for (const int zero_point : {0, 255}) {
    Buffer<int32_t> zero(1);
    zero[0] = zero_point;
    Int8LinearParams<float> params{};
    params.q = q.data();
    params.q_stride = static_cast<int64_t>(stride);
    params.x_scale = params.w_scale = one.data();
    params.zero_point = zero.data();
    params.packed_weight = w.packed.data();
    params.output = output.data();
    params.rows = params.columns = 1;
    params.groups = panel_groups(depth, Flavour::u8s8);
    simulate(1, Int8LinearTileSmall::kThreads, schedule, int8_linear_sm80<float, uint8_t, Int8LinearTileSmall>, params);
    expect(output[0] == static_cast<float>((255 - zero_point) * -128.0 * depth), "largest sum");
  }
}

// Rows of any magnitude: (sum·w_scale)·x_scale to the bit, and no product on the way leaves the normal range.
void test_scale_order() {
  const float sizes[] = {1e-36f, 1e-30f, 1.0f, 1e30f, 1e36f};
  constexpr int kRows = std::size(sizes), kColumns = 16, kDepth = 64;
  const Schedule& schedule = kSchedules[0];
  Weight w = pack(kColumns, kDepth, random_int8(kColumns * kDepth), schedule);
  Buffer<uint8_t> q(kRows * kDepth);
  Buffer<float> x_scale(kRows), w_scale(kColumns), output(kRows * kColumns);
  for (size_t i = 0; i < q.size(); i++) q[i] = static_cast<uint8_t>(random_int(-127, 127));
  for (size_t i = 0; i < kRows; i++) x_scale[i] = std::max(sizes[i] * (1 + std::fabs(random_float())) / 127, FLT_MIN);
  for (size_t j = 0; j < kColumns; j++) w_scale[j] = 1e-3f * (1 + std::fabs(random_float()));
  Int8LinearParams<float> params{};
  params.q = q.data();
  params.q_stride = kDepth;
  params.x_scale = x_scale.data();
  params.packed_weight = w.packed.data();
  params.w_scale = w_scale.data();
  params.output = output.data();
  params.rows = kRows;
  params.columns = kColumns;
  params.groups = panel_groups(kDepth, Flavour::u8s8);
  params.vectorized = true;
  simulate(1, Int8LinearTileSmall::kThreads, schedule, int8_linear_sm80<float, int8_t, Int8LinearTileSmall>, params);
  for (size_t i = 0; i < kRows; i++) {
    for (size_t j = 0; j < kColumns; j++) {
      int sum = 0;
      for (size_t k = 0; k < kDepth; k++) sum += static_cast<int8_t>(q[i * kDepth + k]) * w.values[j * kDepth + k];
      const float got = output[i * kColumns + j], expected = static_cast<float>(sum) * w_scale[j] * x_scale[i];
      const double exact = static_cast<double>(sum) * w_scale[j] * x_scale[i];
      const std::string at = "scales of row " + std::to_string(i) + ", column " + std::to_string(j);
      expect(got == expected, at + ": order");
      expect(std::fabs(got - exact) <= std::fabs(exact) * 0x1p-22, at + ": precision");
    }
  }
}

}  // namespace

int main() {
  test_fragment_mapping();
  test_shared_memory_banks();
  test_tile_choice();
  test_packing();
  test_quantization<float>();
  test_quantization<BFloat16>();
  test_quantization<Float16>();
  test_products_of_tile<Int8LinearTileSmall>();
  test_products_of_tile<Int8LinearTileMedium>();
  test_products_of_tile<Int8LinearTileLarge>();
  test_largest_sum();
  test_scale_order();
  if (failures == 0) std::puts("cuda_layout ok");
  return failures == 0 ? 0 : 1;
}
