// Aligned working memory of one thread, kept between calls: fresh pages cost more than most kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pbm {

// At least `bytes` bytes, 64-byte aligned, of this thread's slot `slot`; contents undefined, valid until the next
// call with the same slot. Slots grow and are freed when the thread ends. Throws std::bad_alloc.
enum class ScratchSlot : int { a_rows = 0, b_panels = 1, accumulators = 2, attention = 3, additive = 4 };
void* scratch(ScratchSlot slot, size_t bytes);

}  // namespace pbm
