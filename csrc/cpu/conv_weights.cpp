#include <bit>

#include "cpu/conv.h"

namespace pbm {
namespace {

// Taps whose channels lie side by side before they are filled up to whole lanes: one, or a row of the kernel.
struct Runs {
  int64_t taps, padded;  // of each; elements
};

Runs runs_of(const ConvShape& s, Flavour flavour, ConvAlgorithm algorithm) {
  const int64_t taps = algorithm == ConvAlgorithm::direct_rows ? s.kernel[2] : 1, per_lane = k_per_lane(flavour);
  return {taps, ceil_div(taps * s.c, per_lane) * per_lane};
}

template <class T>
void copy_filters(const ConvShape& s, const Filters& f, Runs runs, Range filters, T* out) {
  const T* w = static_cast<const T*>(f.data);
  out += filters.begin * s.taps() / runs.taps * runs.padded;
  for (int64_t n = filters.begin; n < filters.end; n++) {
    const T* from = w + n / s.n * f.group + n % s.n * f.n;
    for (int64_t t = 0; t < s.taps(); t++) {
      const int64_t q = t % s.kernel[2], h = t / s.kernel[2] % s.kernel[1], d = t / (s.kernel[2] * s.kernel[1]);
      const T* tap = from + d * f.kernel[0] + h * f.kernel[1] + q * f.kernel[2];
      for (int64_t c = 0; c < s.c; c++) *out++ = tap[c * f.c];
      if ((t + 1) % runs.taps == 0)
        for (int64_t c = runs.taps * s.c; c < runs.padded; c++) *out++ = T{};
    }
  }
}

// Each filter as one row.
Tensor rows_of_filters(const ConvShape& s, const Filters& f, Runs runs) {
  const int64_t sizes[2] = {s.n_all(), s.taps() / runs.taps * runs.padded};
  Tensor out = empty_cpu(sizes, 2, scalar_of(f.dtype));
  void* data = out.mutable_data_ptr();
  over_parts(sizes[0], 1, threads_worth(sizes[0] * sizes[1]), [&](Range r) {
    switch (size_of(f.dtype)) {
      case 4: copy_filters(s, f, runs, r, static_cast<float*>(data)); break;
      case 2: copy_filters(s, f, runs, r, static_cast<uint16_t*>(data)); break;
      default: copy_filters(s, f, runs, r, static_cast<int8_t*>(data));
    }
  });
  return out;
}

// The panels of every group from rows of filters.
void pack_panels(const ConvShape& s, Flavour flavour, const Tensor& rows, int64_t k, char* out) {
  const bool sums = flavour == Flavour::u8s8;
  const int64_t panels = ceil_div(s.n, kPanel), bytes = panels * (panel_groups(k, flavour) + sums) * kGroupBytes;
  const int64_t all = s.groups * panels, parts = all * k > 4096 ? torch::stable::get_num_threads() : 1;
  over_parts(all, 1, parts, [&](Range r) {
    for (int64_t panel = r.begin; panel < r.end;) {
      const int64_t group = panel / panels, first = panel % panels;
      const int64_t last = r.end - group * panels < panels ? r.end - group * panels : panels;
      const char* b = static_cast<const char*>(rows.const_data_ptr()) + group * s.n * k * size_of(dtype_of(rows));
      const PackB p{s.n, k, flavour, b, dtype_of(rows), 1, k, sums, out + group * bytes};
      kernels().pack_b(p, first, last);
      panel = group * panels + last;
    }
  });
}

void pack_for_winograd(const ConvShape& s, const Filters& f, int m, float* out) {
  WinogradPack p{m,   s.groups,    s.n,         s.c, static_cast<const float*>(f.data), f.group, f.n,
                 f.c, f.kernel[1], f.kernel[2], out};
  Tensor converted;
  if (f.dtype != DType::f32) {
    const Tensor rows = rows_of_filters(s, f, {1, s.c});
    const int64_t count = rows.numel();
    converted = empty_cpu(&count, 1, ScalarType::Float);
    float* to = static_cast<float*>(converted.mutable_data_ptr());
    for (int64_t i = 0; i < count; i++) to[i] = value_of(rows.const_data_ptr(), f.dtype, i);
    p.w = to;
    p.w_n = 9 * s.c, p.w_group = s.n * p.w_n, p.w_c = 1, p.w_h = 3 * s.c, p.w_w = s.c;
  }
  const int64_t panels = s.groups * ceil_div(s.n, kPanel);
  const int64_t parts = panels * s.c > 64 ? torch::stable::get_num_threads() : 1;
  over_parts(panels, 1, parts, [&](Range r) { kernels().pack_winograd(p, r.begin, r.end); });
}

void pack_for_planes(const ConvShape& s, const Filters& f, float* out) {
  for (int64_t n = 0; n < ceil_div(s.n, 8) * 8; n++)
    for (int64_t c = 0; c < s.c; c++)
      for (int64_t t = 0; t < s.taps(); t++) {
        const int64_t at = n * f.n + c * f.c + t / s.kernel[2] * f.kernel[1] + t % s.kernel[2] * f.kernel[2];
        out[((n / 8 * s.c + c) * s.taps() + t) * 8 + n % 8] = n < s.n ? value_of(f.data, f.dtype, at) : 0.f;
      }
}

void pack_for_depthwise(const ConvShape& s, const Filters& f, float* out) {
  for (int64_t g = 0; g < ceil_div(s.groups, kPanel) * kPanel; g++)
    for (int64_t t = 0; t < s.taps(); t++) {
      const int64_t w = t % s.kernel[2], h = t / s.kernel[2] % s.kernel[1], d = t / (s.kernel[2] * s.kernel[1]);
      const int64_t at = g * f.group + d * f.kernel[0] + h * f.kernel[1] + w * f.kernel[2];
      out[(g / kPanel * s.taps() + t) * kPanel + g % kPanel] = g < s.groups ? value_of(f.data, f.dtype, at) : 0.f;
    }
}

}  // namespace

float value_of(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (dtype == DType::f16) return static_cast<float>(std::bit_cast<_Float16>(bits));
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

Filters filters_of(const Tensor& weight, const ConvShape& shape) {
  const Strides s = strides_of(weight);
  Filters f{data_of("weight", weight), dtype_of(weight), s.batch * shape.n, s.batch, s.channel, {}};
  for (int i = 0; i < 3; i++) f.kernel[i] = s.spatial[i];
  return f;
}

void packed_sizes(const ConvShape& s, Flavour flavour, ConvAlgorithm algorithm, int64_t (&sizes)[3]) {
  const int64_t panels = s.groups * ceil_div(s.n, kPanel);
  if (algorithm == ConvAlgorithm::winograd2 || algorithm == ConvAlgorithm::winograd4) {
    const int64_t places = algorithm == ConvAlgorithm::winograd2 ? 16 : 36;
    sizes[0] = panels, sizes[1] = places * s.c, sizes[2] = kPanel;
  } else if (algorithm == ConvAlgorithm::planes) {
    sizes[0] = ceil_div(s.n, 8), sizes[1] = s.c * s.taps(), sizes[2] = 8;
  } else if (algorithm == ConvAlgorithm::depthwise) {
    sizes[0] = ceil_div(s.groups, kPanel), sizes[1] = s.taps(), sizes[2] = kPanel;
  } else {
    const Runs runs = runs_of(s, flavour, algorithm);
    sizes[0] = panels, sizes[1] = s.taps() / runs.taps * panel_groups(runs.padded, flavour);
    if (flavour == Flavour::u8s8) sizes[1]++;  // the columns' sums
    sizes[2] = kPanel * k_per_lane(flavour);
  }
}

Tensor pack_filters(const ConvShape& s, Flavour flavour, ConvAlgorithm algorithm, const Filters& f) {
  int64_t sizes[3];
  packed_sizes(s, flavour, algorithm, sizes);
  const bool bf16 = flavour == Flavour::bf16 && algorithm != ConvAlgorithm::depthwise;
  const ScalarType dtype = flavour == Flavour::u8s8 ? ScalarType::Char
                           : bf16                   ? ScalarType::BFloat16
                                                    : ScalarType::Float;
  Tensor out = empty_cpu(sizes, 3, dtype);
  if (out.numel() == 0) return out;
  float* data = static_cast<float*>(out.mutable_data_ptr());
  if (algorithm == ConvAlgorithm::winograd2 || algorithm == ConvAlgorithm::winograd4) {
    pack_for_winograd(s, f, algorithm == ConvAlgorithm::winograd2 ? 2 : 4, data);
  } else if (algorithm == ConvAlgorithm::planes) {
    pack_for_planes(s, f, data);
  } else if (algorithm == ConvAlgorithm::depthwise) {
    pack_for_depthwise(s, f, data);
  } else {
    const Tensor rows = rows_of_filters(s, f, runs_of(s, flavour, algorithm));
    pack_panels(s, flavour, rows, rows.size(1), reinterpret_cast<char*>(data));
  }
  return out;
}

}  // namespace pbm
