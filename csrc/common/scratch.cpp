#include "common/scratch.h"

#include <cstdlib>
#include <new>

namespace pbm {
namespace {

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void* scratch(ScratchSlot slot, size_t bytes) {
  thread_local Buffer buffers[5];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (bytes > buffer.bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, rounded);
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace pbm
