// Conversions between fp32, bf16 and f16, and the 16×16 transposition, on every tier.
#include <vector>

#include "elements.h"
#include "probe.h"

namespace pbm {
namespace scalar {
extern const test::Probe probe;
}
namespace avx2 {
extern const test::Probe probe;
}
namespace avx512 {
extern const test::Probe probe;
}
namespace avx512_bf16 {
extern const test::Probe probe;
}
}  // namespace pbm

namespace pbm::test {

const Probe& probe_of(Isa isa) {
  static const Probe* const probes[kIsaCount] = {&scalar::probe, &avx2::probe, &avx512::probe, &avx512_bf16::probe};
  return *probes[static_cast<int>(isa)];
}

namespace {

// Values where rounding, overflow, subnormals and NaN of the 16-bit formats are decided, and random bit patterns.
std::vector<float> interesting_floats(Rng& rng, int64_t random) {
  std::vector<float> x;
  for (uint32_t top = 0; top < 0x10000; top += 0x40)
    for (uint32_t rest : {0u, 1u, 0x0fffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
      x.push_back(float_of(top << 16 | rest));
  for (uint32_t half = 0; half < 0x7c00; half += 7) {  // halfway between two halves, and beside it
    const uint32_t middle =
        bits_of((from_f16(static_cast<uint16_t>(half)) + from_f16(static_cast<uint16_t>(half + 1))) / 2);
    for (uint32_t u : {middle - 1, middle, middle + 1}) x.push_back(float_of(u));
  }
  for (int64_t i = 0; i < random; i++) x.push_back(float_of(static_cast<uint32_t>(rng.bits())));
  while (x.size() % 16) x.push_back(0);
  return x;
}

bool same16(DType t, uint16_t got, uint16_t expected) {
  const auto nan = [t](uint16_t h) { return std::isnan(t == DType::bf16 ? from_bf16(h) : from_f16(h)); };
  return got == expected || (nan(got) && nan(expected));
}

void test_rounding(Isa isa, const std::vector<float>& x) {
  std::vector<uint16_t> y(x.size());
  const int64_t n = static_cast<int64_t>(x.size());
  for (DType t : {DType::bf16, DType::f16}) {
    probe_of(isa).convert(DType::f32, t, x.data(), y.data(), n);
    for (size_t i = 0; i < x.size(); i++) {
      const uint16_t expected = t == DType::bf16 ? to_bf16(x[i]) : to_f16(x[i]);
      CHECK(same16(t, y[i], expected), "%s: %a (%08x) to %s gives %04x, expected %04x", isa_name(isa), x[i],
            bits_of(x[i]), name(t), y[i], expected);
    }
  }
  // Operands of bf16 products: as above, but subnormals may become zero.
  probe_of(isa).store_bf16(x.data(), y.data(), n);
  for (size_t i = 0; i < x.size(); i++) {
    const bool flushed = std::fabs(x[i]) < 0x1p-126f && (y[i] & 0x7fff) == 0;
    CHECK(flushed || same16(DType::bf16, y[i], to_bf16(x[i])), "%s: %a as an operand gives %04x", isa_name(isa), x[i],
          y[i]);
  }
}

void test_widening(Isa isa) {
  std::vector<uint16_t> all(65536);
  for (size_t i = 0; i < all.size(); i++) all[i] = static_cast<uint16_t>(i);
  std::vector<float> y(all.size());
  for (DType t : {DType::bf16, DType::f16}) {
    probe_of(isa).convert(t, DType::f32, all.data(), y.data(), 65536);
    for (size_t i = 0; i < all.size(); i++) {
      const float expected = t == DType::bf16 ? from_bf16(all[i]) : from_f16(all[i]);
      CHECK(bits_of(y[i]) == bits_of(expected) || (std::isnan(y[i]) && std::isnan(expected)),
            "%s: %04x from %s gives %a, expected %a", isa_name(isa), all[i], name(t), y[i], expected);
    }
  }
}

void test_tails(Isa isa, Rng& rng) {
  for (DType from : {DType::f32, DType::bf16, DType::f16})
    for (DType to : {DType::f32, DType::bf16, DType::f16})
      for (int64_t count = 0; count < 36; count++) {
        const Exact x = random_elements(rng, from, count), y(count * size_of(to));
        probe_of(isa).convert(from, to, x.data(), y.data(), count);
        for (int64_t i = 0; i < count; i++) {
          const double expected = get(from, x.data(), i), got = get(to, y.data(), i);
          CHECK(std::fabs(got - expected) <= rounding(to, expected),
                "%s: element %lld of %lld, %s to %s: %g, expected %g", isa_name(isa), (long long)i, (long long)count,
                name(from), name(to), got, expected);
        }
      }
}

void test_transpose(Isa isa) {
  int32_t x[256], y[256];
  for (int i = 0; i < 256; i++) x[i] = i * 0x010203;
  probe_of(isa).transpose(x, y);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) CHECK(y[16 * i + j] == x[16 * j + i], "%s: transpose (%d, %d)", isa_name(isa), i, j);
}

}  // namespace

void test_convert(const Options& options) {
  Rng rng(options.seed);
  const std::vector<float> x = interesting_floats(rng, int64_t{1000} * options.iterations);
  for (Isa isa : tiers()) {
    test_rounding(isa, x);
    test_widening(isa);
    test_tails(isa, rng);
    test_transpose(isa);
  }
}

}  // namespace pbm::test
