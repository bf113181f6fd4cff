// What forward and backward of additive attention have in common at the torch boundary.
#pragma once

#include "cpu/attention.h"

namespace pbm {

// A problem and what it points into.
struct AdditiveProblem {
  AdditiveAttention a{};
  std::vector<Tensor> kept;
};

AdditiveProblem additive_problem(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                                 const Tensor& v, const std::optional<Tensor>& attn_mask,
                                 const std::optional<Tensor>& dropout_seed, double dropout_p);

// (b, i, d) in place where the last dimension is contiguous.
AttentionOperand matrices(const char* name, const Tensor& t, AdditiveProblem* p);

template <class T>
T* workspace(AdditiveProblem* p, int64_t count) {
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  p->kept.push_back(empty_cpu(&bytes, 1, ScalarType::Byte));
  return static_cast<T*>(p->kept.back().mutable_data_ptr());
}

// The keys prepared, for the backward pass as columns too, and panels of the values, or of their transpose.
void prepare(AdditiveProblem* p, bool backward);

// Queries of one sequence that a thread takes at a time: work for microseconds, and items enough for all threads.
int64_t rows_per_item(const AdditiveAttention& a, int64_t rows);

// On one thread where waking the others takes longer than the work: below 64 Ki terms.
template <class F>
void for_each(const AdditiveAttention& a, int64_t count, const F& f) {
  if (a.batch * a.queries * a.keys * a.hidden >= 65536) return for_each_item(count, f);
  for (int64_t i = 0; i < count; i++) f(i);
}

}  // namespace pbm
