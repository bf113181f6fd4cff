// Where the taps of output pixels read their channels: the table of the indirect convolution.
#pragma once

#include "common/scratch.h"
#include "cpu/kernels/conv.h"
#include "cpu/kernels/tile.h"

namespace pbm::PBM_TIER {

// Consecutive pixels of a grid, as indices of their axes.
struct Pixels {
  int64_t batch, at[3];

  static Pixels from(const ConvGrid& grid, int64_t row) {
    Pixels p;
    for (int axis = 2; axis >= 0; axis--) {
      p.at[axis] = row % grid.count[axis];
      row /= grid.count[axis];
    }
    p.batch = row;
    return p;
  }
  void next(const ConvGrid& grid) {
    for (int axis = 2; axis >= 0; axis--) {
      if (++at[axis] < grid.count[axis]) return;
      at[axis] = 0;
    }
    batch++;
  }
};
// From one group's channels to the next's.
PBM_INLINE int64_t group_bytes(const Conv& conv) {
  const Flavour f = conv.out_rows.flavour;
  return f == Flavour::u8s8 ? panel_groups(conv.c, f) * lane_bytes(f) : conv.c * (4 / k_per_lane(f));
}

// Where the taps of rows [begin, end) read the group's channels, table[row][tap], and whether all are in the image.
class Table {
 public:
  Table(const Conv& conv, const ConvGrid& grid, int64_t group)
      : conv_(conv), grid_(grid), size_(4 / k_per_lane(conv.out_rows.flavour)) {
    const ConvImage& x = conv.x;
    data_ = static_cast<const char*>(x.data) + group * group_bytes(conv);
    run_ = max64(grid.run, 1);
    offsets_ = static_cast<int64_t*>(
        scratch(ScratchSlot::b_panels, static_cast<size_t>(max64(grid.tap_count, 1)) * sizeof(int64_t)));
    for (int axis = 0; axis < 3; axis++) {
      low_[axis] = 0;
      high_[axis] = x.size[axis];
    }
    for (int64_t t = 0; t < grid.tap_count; t++) {
      const int64_t* at = grid.taps[t].at;
      offsets_[t] = (at[0] * x.stride[0] + at[1] * x.stride[1] + at[2] * x.stride[2]) * size_;
      for (int axis = 0; axis < 3; axis++) {
        low_[axis] = max64(low_[axis], -at[axis]);
        high_[axis] = min64(high_[axis], x.size[axis] - at[axis] - (axis == 2 ? run_ - 1 : 0));
      }
    }
  }

  // Whether some output sees a tap outside the image.
  bool hides() const {
    for (int axis = 0; axis < 3; axis++)
      if (low_[axis] > 0 || (grid_.count[axis] - 1) * grid_.in_step[axis] >= high_[axis]) return true;
    return false;
  }

  // Bytes between one row and the next where this is the same for all and there is one tap; else 0.
  int64_t distance() const {
    if (hides()) return 0;  // a run may begin inside of the image and end beyond it
    if (grid_.tap_count != 1 || grid_.in_step[0] * grid_.in_step[1] * grid_.in_step[2] != 1) return 0;
    int64_t stride = conv_.x.stride[2];
    for (int axis = 2; axis >= 0; axis--) {
      if (grid_.taps[0].at[axis] != 0 || grid_.count[axis] != conv_.x.size[axis]) return 0;
      const int64_t next = axis > 0 ? conv_.x.stride[axis - 1] : conv_.x.batch_stride;
      const int64_t outer = axis > 0 ? grid_.count[axis - 1] : conv_.batch;
      if (outer > 1 && next != stride * grid_.count[axis]) return 0;
      stride *= grid_.count[axis];
    }
    return conv_.x.stride[2] * size_;
  }

  // What the copies of runs need, which make fills for so many rows.
  int64_t copied_bytes(int64_t rows) const { return run_ > 1 ? rows * grid_.tap_count * run_bytes() : 0; }

  void make(Range rows, const char** table, bool* whole, char* copies) const {
    const int64_t taps = grid_.tap_count, step = grid_.in_step[2], pixel = step * conv_.x.stride[2] * size_;
    Pixels p = Pixels::from(grid_, rows.begin);
    for (int64_t r = rows.begin; r < rows.end;) {  // pixels beside each other
      const int64_t count = min64(grid_.count[2] - p.at[2], rows.end - r);
      int64_t at[3] = {p.at[0] * grid_.in_step[0], p.at[1] * grid_.in_step[1], p.at[2] * step};
      const ConvImage& x = conv_.x;
      const char* first =
          data_ + (p.batch * x.batch_stride + at[0] * x.stride[0] + at[1] * x.stride[1] + at[2] * x.stride[2]) * size_;
      const bool row_inside = inside(0, at[0]) && inside(1, at[1]);
      for (int64_t i = 0; i < count; i++, first += pixel, at[2] += step, table += taps) {
        for (int64_t t = 0; t < taps; t++) table[t] = first + offsets_[t];
        const bool inside_row = inside(2, at[2]);
        *whole++ = row_inside && (inside_row || run_ > 1);
        if (!row_inside || !inside_row) hide(at, table, !inside_row && run_ > 1 ? &copies : nullptr);
      }
      r += count;
      p.at[2] += count - 1;
      p.next(grid_);
    }
  }

 private:
  bool inside(int axis, int64_t at) const { return at >= low_[axis] && at < high_[axis]; }

  int64_t run_bytes() const { return conv_.c * size_; }  // a row of one pixel may have any stride

  // Taps outside the image read zeros; runs that leave it, a copy.
  void hide(const int64_t (&at)[3], const char** table, char** copies) const {
    for (int64_t t = 0; t < grid_.tap_count; t++) {
      bool hidden = false;
      for (int axis = 0; axis < (run_ > 1 ? 2 : 3); axis++)
        hidden = hidden ||
                 static_cast<uint64_t>(at[axis] + grid_.taps[t].at[axis]) >= static_cast<uint64_t>(conv_.x.size[axis]);
      if (hidden)
        table[t] = static_cast<const char*>(conv_.zeros);
      else if (copies)
        table[t] = copy_run(table[t], at[2] + grid_.taps[t].at[2], copies);
    }
  }

  // Of a run that begins at this pixel of its row.
  const char* copy_run(const char* from, int64_t w, char** copies) const {
    const int64_t pixel = run_bytes() / run_, begin = max64(-w, 0), end = min64(conv_.x.size[2] - w, run_);
    char* to = *copies;
    std::memset(to, 0, static_cast<size_t>(run_bytes()));
    if (begin < end)
      std::memcpy(to + begin * pixel, from + begin * conv_.x.stride[2] * size_,
                  static_cast<size_t>((end - begin) * pixel));
    *copies += run_bytes();
    return to;
  }

  const Conv& conv_;
  const ConvGrid& grid_;
  const int64_t size_;
  int64_t run_;
  const char* data_;
  int64_t* offsets_;
  int64_t low_[3], high_[3];  // where all taps are inside
};

}  // namespace pbm::PBM_TIER
