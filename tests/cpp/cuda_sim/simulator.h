// Runs CUDA kernels on the host: one fiber per thread, blocks one after the other. This folder stands before csrc on the
// include path, so its cuda/kernels/device.h and cuda/kernels/ptx/*.h replace the real ones under the kernels' own source.
//
// Threads run one at a time, a warp as far as it can before the next one, so a missing barrier, or a copy that is read
// before it was waited for, does not race: it gives wrong results under one of kSchedules. Run every kernel under all.
#pragma once

#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace pbm::cuda_sim {

struct Schedule {
  const char* name;
  bool last_thread_first;
  bool copies_land_late;  // cp.async: when waited for; else at once. The hardware does either.
};
constexpr Schedule kSchedules[] = {{"forward, late copies", false, true},
                                   {"backward, early copies", true, false},
                                   {"backward, late copies", true, true}};

[[noreturn]] inline void stop(const char* what) {
  std::fprintf(stderr, "CUDA simulator: %s\n", what);
  std::abort();
}

class Simulator {
 public:
  static constexpr int kWarp = 32;
  static constexpr size_t kSharedBytes = 48 * 1024;
  static constexpr size_t kLaneBytes = 64;  // one lane's part of a collective

  static Simulator& instance() {
    static Simulator simulator;
    return simulator;
  }

  void run(int64_t blocks, int threads, const Schedule& schedule, std::function<void()> kernel) {
    if (threads % kWarp != 0) stop("the block size is not a multiple of the warp size");
    schedule_ = schedule;
    kernel_ = std::move(kernel);
    grid_size_ = blocks;
    while (fibers_.size() < static_cast<size_t>(threads)) fibers_.push_back(std::make_unique<Fiber>());
    threads_ = threads;
    warps_.resize(static_cast<size_t>(threads / kWarp));
    for (block_ = 0; block_ < blocks; block_++) run_block();
  }

  int thread() const { return current_; }
  int threads() const { return threads_; }
  int64_t block() const { return block_; }
  int64_t grid_size() const { return grid_size_; }
  void* shared() { return shared_.bytes; }

  void barrier() { yield(State::at_barrier); }

  // Every lane's value, once all lanes of the warp have come here.
  template <typename T>
  std::array<T, kWarp> gather(const T& mine) {
    static_assert(sizeof(T) <= kLaneBytes);
    Fiber& fiber = *fibers_[static_cast<size_t>(current_)];
    // A lane may reach its next collective before the others have read this one: two buffers.
    auto& lanes = warps_[static_cast<size_t>(current_ / kWarp)].lanes[fiber.collectives++ % 2];
    std::memcpy(lanes[current_ % kWarp], &mine, sizeof(T));
    yield(State::at_collective);
    std::array<T, kWarp> all;
    for (int lane = 0; lane < kWarp; lane++) std::memcpy(&all[static_cast<size_t>(lane)], lanes[lane], sizeof(T));
    return all;
  }

  void copy_async(void* target, const void* source, bool valid) {
    const auto bits = reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source);
    if (bits % 16 != 0) stop("cp.async with an address that is not a multiple of 16");
    if (!inside_shared(target, 16)) stop("cp.async to an address outside shared memory");
    const Copy copy{target, source, valid};
    if (!schedule_.copies_land_late) return land(copy);
    fibers_[static_cast<size_t>(current_)]->open_group.push_back(copy);
  }
  void commit_copies() {
    Fiber& fiber = *fibers_[static_cast<size_t>(current_)];
    fiber.groups.push_back(std::move(fiber.open_group));
    fiber.open_group.clear();
  }
  void wait_copies(size_t pending) {
    Fiber& fiber = *fibers_[static_cast<size_t>(current_)];
    while (fiber.groups.size() > pending) {
      for (const Copy& copy : fiber.groups.front()) land(copy);
      fiber.groups.erase(fiber.groups.begin());
    }
  }

  bool inside_shared(const void* address, size_t bytes) const {
    const auto* byte = static_cast<const unsigned char*>(address);
    return byte >= shared_.bytes && byte + bytes <= shared_.bytes + kSharedBytes;
  }

 private:
  enum class State { ready, at_barrier, at_collective, done };
  struct Copy {
    void* target;
    const void* source;
    bool valid;
  };
  struct Fiber {
    static constexpr size_t kStackBytes = 256 * 1024;  // ASan's frames are large
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    ucontext_t context;
    void* fake_stack = nullptr;
    State state = State::ready;
    unsigned collectives = 0;
    std::vector<Copy> open_group;
    std::vector<std::vector<Copy>> groups;
  };
  struct Warp {
    unsigned char lanes[2][kWarp][kLaneBytes];
  };
  struct alignas(128) Shared {
    unsigned char bytes[kSharedBytes];
  };

  static void land(const Copy& copy) {
    if (copy.valid) {
      std::memcpy(copy.target, copy.source, 16);
    } else {
      std::memset(copy.target, 0, 16);
    }
  }

  static void prepare(Fiber& fiber) {
    fiber.state = State::ready;
    fiber.collectives = 0;
    fiber.open_group.clear();
    fiber.groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Simulator::enter, 0);
  }

  void run_block() {
    std::memset(shared_.bytes, 0xcd, kSharedBytes);
    for (int t = 0; t < threads_; t++) prepare(*fibers_[static_cast<size_t>(t)]);
    while (count(0, threads_, State::done) < threads_) {
      const int warps = threads_ / kWarp;
      for (int i = 0; i < warps; i++) run_warp((schedule_.last_thread_first ? warps - 1 - i : i) * kWarp);
      if (count(0, threads_, State::done) == threads_) break;
      if (count(0, threads_, State::at_barrier) != threads_) stop("a barrier that not all threads reach");
      make_ready(0, threads_);
    }
  }

  // One warp goes as far as it can, through any number of collectives, before the next one starts: the largest lead that
  // the hardware could give it.
  void run_warp(int first) {
    const int last = first + kWarp;
    while (count(first, last, State::ready) > 0) {
      for (int i = 0; i < kWarp; i++) {
        const int t = schedule_.last_thread_first ? last - 1 - i : first + i;
        if (fibers_[static_cast<size_t>(t)]->state == State::ready) resume(t);
      }
      const int waiting = count(first, last, State::at_collective);
      if (waiting == kWarp)
        make_ready(first, last);
      else if (waiting != 0)
        stop("a warp collective that not all lanes reach");
    }
  }

  int count(int first, int last, State state) const {
    int n = 0;
    for (int t = first; t < last; t++) n += fibers_[static_cast<size_t>(t)]->state == state;
    return n;
  }
  void make_ready(int first, int last) {
    for (int t = first; t < last; t++) fibers_[static_cast<size_t>(t)]->state = State::ready;
  }

  void resume(int t) {
    current_ = t;
    Fiber& fiber = *fibers_[static_cast<size_t>(t)];
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), Fiber::kStackBytes);
#endif
    swapcontext(&scheduler_, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  void yield(State state) {
    Fiber& fiber = *fibers_[static_cast<size_t>(current_)];
    fiber.state = state;
#if defined(__SANITIZE_ADDRESS__)
    // A fiber that is done gives no place to keep its fake stack, so that it is freed.
    __sanitizer_start_switch_fiber(state == State::done ? nullptr : &fiber.fake_stack, scheduler_stack_,
                                   scheduler_stack_bytes_);
#endif
    swapcontext(&fiber.context, &scheduler_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  }

  static void enter() {
    Simulator& simulator = instance();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &simulator.scheduler_stack_, &simulator.scheduler_stack_bytes_);
#endif
    simulator.kernel_();
    simulator.yield(State::done);
  }

  Schedule schedule_{};
  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  Shared shared_;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  int threads_ = 0, current_ = 0;
  int64_t block_ = 0, grid_size_ = 0;
};

}  // namespace pbm::cuda_sim
