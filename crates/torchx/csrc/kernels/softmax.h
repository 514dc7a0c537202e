#pragma once

#include "layer_norm.h"

#include <algorithm>

namespace torchx {
namespace TORCHX_ISA {

// 16 flags of one byte; lanes beyond `count` are forbidden.
TORCHX_INLINE Mask load_allowed(const uint8_t* p, int64_t count) {
  uint8_t flags[kLanes] = {};
  if (count == kLanes) {
    __builtin_memcpy(flags, p, kLanes);
  } else {
    for (int64_t i = 0; i < count; ++i) flags[i] = p[i];
  }
  Mask r;
  TORCHX_EACH {
    NativeU8 value;
    __builtin_memcpy(&value, flags + i * kWidth, sizeof value);
    r.v[i] = __builtin_convertvector(value, NativeI) != 0;
  }
  return r;
}

template <class T>
void softmax(const SoftmaxArgs& a, float* scratch, int64_t begin, int64_t end) {
  float* s = scratch;
  float* factors = scratch + padded(a.keys);
  const F lowest = splat(-3.0e38f);
  const F scale = splat(a.scale);
  const bool drops = a.mask.rows != nullptr;
  if (!drops) std::fill_n(factors, padded(a.keys), 1.0f);
  for (int64_t line = begin; line < end; ++line) {
    const int64_t query = line % a.queries, head = line / a.queries % a.heads, sample = line / a.queries / a.heads;
    T* scores = static_cast<T*>(a.scores) + line * a.keys;
    T* dropped = static_cast<T*>(a.dropped) + line * a.keys;
    const uint8_t* allowed = a.allowed == nullptr
        ? nullptr
        : a.allowed + sample * a.allowed_stride_sample + head * a.allowed_stride_head + query * a.allowed_stride_query;
    if (drops) draw_factors(a.mask, sample, static_cast<uint32_t>(head << 16 | query), a.keys, factors);

    F best = lowest;
    for_columns(a.keys, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
      F value = load_upto(scores + k, count) * scale;
      if (allowed != nullptr) {
        value = select(load_allowed(allowed + k, count), value, lowest);
      } else if (count < kLanes) {
        value = select(first_lanes(count), value, lowest);
      }
      store(s + k, value);
      best = max(best, value);
    });
    const F peak = splat(largest(best));

    F total = splat(0.0f);
    for_columns(a.keys, [&](int64_t k, int64_t) __attribute__((always_inline)) {
      const F value = exp(load(s + k) - peak);
      store(s + k, value);
      total = total + value;
    });
    const F inverse = splat(1.0f / sum(total));

    for_columns(a.keys, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
      const F p = load(s + k) * inverse;
      store_upto(scores + k, count, p);
      store_upto(dropped + k, count, p * load(factors + k));
    });
  }
}

// With P the probabilities, D those after dropout, G the gradient of D:  grad_scores = scale (D G - P sum(D G)).
template <class T>
void softmax_backward(const SoftmaxBackwardArgs& a, int64_t begin, int64_t end) {
  const F scale = splat(a.scale);
  for (int64_t line = begin; line < end; ++line) {
    const T* probabilities = static_cast<const T*>(a.probabilities) + line * a.keys;
    const T* dropped = static_cast<const T*>(a.dropped) + line * a.keys;
    T* grad = static_cast<T*>(a.grad_dropped) + line * a.keys;
    F total = splat(0.0f);
    for_columns(a.keys, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
      total = total + load_upto(dropped + k, count) * load_upto(grad + k, count);
    });
    const F dot = splat(sum(total));
    for_columns(a.keys, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
      const F own = load_upto(dropped + k, count) * load_upto(grad + k, count);
      store_upto(grad + k, count, (own - load_upto(probabilities + k, count) * dot) * scale);
    });
  }
}

}  // namespace TORCHX_ISA
}  // namespace torchx
