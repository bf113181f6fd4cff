// kernel_tests [--iterations N] [--seed S] [group...]: all groups when none is named.
#include <chrono>
#include <string>
#include <vector>

#include "check.h"
#include "common/isa.h"

using namespace pbm;

int main(int argc, char** argv) {
  struct Group {
    const char* name;
    void (*run)(const test::Options&);
  };
  const Group groups[] = {{"partition", test::test_partition},
                          {"convert", test::test_convert},
                          {"vecmath", test::test_vecmath},
                          {"quantize", test::test_quantize},
                          {"pack", test::test_pack},
                          {"brgemm", test::test_brgemm},
                          {"gemm", test::test_gemm},
                          {"attention", test::test_attention},
                          {"attention_decode", test::test_attention_decode},
                          {"additive", test::test_additive},
                          {"conv_algorithm", test::test_conv_algorithm},
                          {"conv_copy", test::test_conv_copy},
                          {"conv_depthwise", test::test_conv_depthwise},
                          {"conv_direct", test::test_conv_direct},
                          {"conv_planes", test::test_conv_planes},
                          {"conv_spread", test::test_conv_spread},
                          {"conv_weight_gradient", test::test_conv_weight_gradient},
                          {"conv_winograd", test::test_conv_winograd},
                          {"pool", test::test_pool}};
  test::Options options;
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; i++) {
    const std::string argument = argv[i];
    if (argument == "--iterations" && i + 1 < argc) {
      options.iterations = std::atoi(argv[++i]);
    } else if (argument == "--seed" && i + 1 < argc) {
      options.seed = std::strtoull(argv[++i], nullptr, 10);
    } else {
      wanted.push_back(argument);
    }
  }
  size_t known = 0;
  for (const Group& group : groups) {
    bool run = wanted.empty();
    for (const std::string& name : wanted) run = run || name == group.name;
    if (!run) continue;
    known++;
    const auto start = std::chrono::steady_clock::now();
    const int before = test::failures;
    group.run(options);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%-10s %s (%.1f s)\n", group.name, test::failures == before ? "ok" : "FAILED", seconds.count());
  }
  if (known == 0 || known < wanted.size()) {
    std::fprintf(stderr, "unknown group or option; groups:");
    for (const Group& group : groups) std::fprintf(stderr, " %s", group.name);
    std::fputc('\n', stderr);
    return 2;
  }
  std::printf("best tier %s, seed %llu, %d iterations, %d failures\n", isa_name(best_isa()),
              static_cast<unsigned long long>(options.seed), options.iterations, test::failures);
  return test::failures == 0 ? 0 : 1;
}
