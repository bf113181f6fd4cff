// Convolutions one after another in one call: what a call costs is paid once, and what is between them stays here.
#include <numeric>

#include "cpu/conv.h"

namespace pbm {
namespace {

constexpr const char* kOp = "conv_sequence";
constexpr int64_t kHead = 10;  // integers of a step before its axes

struct Step {
  int64_t input, weight, bias, residual;  // places; −1: none
  int64_t out_channels, groups, activation, algorithm;
  bool channels_last;
  Ints kernel, stride, padding, dilation;
};

// The steps of a program whose tensors take the first `places`.
std::vector<Step> steps_of(const Ints& program, int64_t places) {
  std::vector<Step> steps;
  for (size_t at = 0; at < program.size();) {
    const int64_t* p = &program[at];
    const int64_t left = static_cast<int64_t>(program.size() - at), axes = left >= kHead ? p[9] : 0;
    STD_TORCH_CHECK(axes >= 1 && axes <= 3 && left >= kHead + 5 * axes, kOp, ": program ends within step ",
                    steps.size(), ": a step has ", kHead, " integers and 5 for each of 1 to 3 axes");
    const int64_t before = places + static_cast<int64_t>(steps.size());
    for (int i = 0; i < 4; i++)
      STD_TORCH_CHECK(p[i] >= (i < 2 ? 0 : -1) && p[i] < before, kOp, ": step ", steps.size(), " reads place ", p[i],
                      " of ", before);
    Step s{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8] != 0, {}, {}, {}, {}};
    for (int64_t i = 0; i < axes; i++) {
      const int64_t* w = p + kHead + 5 * i;
      s.kernel.push_back(w[0]);
      s.stride.push_back(w[1]);
      s.padding.push_back(w[2]);
      s.padding.push_back(w[3]);
      s.dilation.push_back(w[4]);
    }
    steps.push_back(std::move(s));
    at += static_cast<size_t>(kHead + 5 * axes);
  }
  return steps;
}

std::vector<Tensor> conv_sequence(std::vector<Tensor> tensors, Ints program, std::vector<double> slopes, Ints outputs) {
  const int64_t places = static_cast<int64_t>(tensors.size());
  const std::vector<Step> steps = steps_of(program, places);
  STD_TORCH_CHECK(slopes.size() == steps.size(), kOp, ": slopes must have one entry a step, ", steps.size(), ", got ",
                  slopes.size());
  // Which step is the last to read a result, its own where none does; those that are given are kept.
  std::vector<size_t> last(steps.size());
  std::iota(last.begin(), last.end(), size_t{0});
  for (size_t i = 0; i < steps.size(); i++)
    for (const int64_t place : {steps[i].input, steps[i].weight, steps[i].bias, steps[i].residual})
      if (place >= places) last[static_cast<size_t>(place - places)] = i;
  for (const int64_t step : outputs) {
    STD_TORCH_CHECK(step >= 0 && step < static_cast<int64_t>(steps.size()), kOp, ": outputs must be in [0, ",
                    steps.size(), "), got ", step);
    STD_TORCH_CHECK(last[static_cast<size_t>(step)] != steps.size(), kOp, ": outputs must differ, got ", step,
                    " twice");
    last[static_cast<size_t>(step)] = steps.size();
  }
  std::vector<std::optional<Tensor>> at(tensors.begin(), tensors.end());
  const auto read = [&](int64_t place) { return place < 0 ? std::nullopt : at[static_cast<size_t>(place)]; };
  for (size_t i = 0; i < steps.size(); i++) {
    const Step& s = steps[i];
    at.push_back(packed_conv(kOp, *read(s.input), *read(s.weight), s.out_channels, s.kernel,
                             {s.stride, s.padding, s.dilation, s.groups},
                             {read(s.bias), read(s.residual), s.activation, slopes[i]}, s.algorithm, s.channels_last));
    for (size_t j = 0; j <= i; j++)
      if (last[j] == i) at[static_cast<size_t>(places) + j].reset();
  }
  std::vector<Tensor> results;
  for (const int64_t step : outputs) results.push_back(*at[static_cast<size_t>(places + step)]);
  return results;
}

}  // namespace
}  // namespace pbm

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CPU, m) { m.impl("conv_sequence", TORCH_BOX(&pbm::conv_sequence)); }
