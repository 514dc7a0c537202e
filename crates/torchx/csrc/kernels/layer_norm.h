#pragma once

#include "philox.h"

namespace torchx {
namespace TORCHX_ISA {

// Calls body(column, count, F(load), void(store)) over 16 columns at a time; the last may be fewer.
template <class Body>
TORCHX_INLINE void for_columns(int64_t columns, Body&& body) {
  int64_t d = 0;
  for (; d + kLanes <= columns; d += kLanes) body(d, static_cast<int64_t>(kLanes));
  if (d < columns) body(d, columns - d);
}

template <class T>
TORCHX_INLINE F load_upto(const T* p, int64_t count) {
  return count == kLanes ? load(p) : load_first(p, count);
}

template <class T>
TORCHX_INLINE void store_upto(T* p, int64_t count, F value) {
  if (count == kLanes) {
    store(p, value);
  } else {
    store_first(p, count, value);
  }
}

// Lanes beyond `count` become zero.
TORCHX_INLINE F keep_upto(int64_t count, F value) {
  return count == kLanes ? value : select(first_lanes(count), value, splat(0.0f));
}

template <class X, class R>
void layer_norm(const LayerNormArgs& a, float* scratch, int64_t begin, int64_t end) {
  float* z = scratch;
  float* factors = scratch + padded(a.columns);
  const bool drops = a.mask.threshold > 0;
  const float per_column = 1.0f / static_cast<float>(a.columns);
  for (int64_t line = begin; line < end; ++line) {
    const X* x = static_cast<const X*>(a.x) + line * a.columns;
    const R* residual = static_cast<const R*>(a.residual) + line * a.columns;
    R* y = static_cast<R*>(a.y) + line * a.columns;
    if (drops) draw_factors(a.mask, line / a.lines, static_cast<uint32_t>(line % a.lines), a.columns, factors);

    F total = splat(0.0f);
    for_columns(a.columns, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
      F value = load_upto(x + d, count);
      if (drops) value = value * load(factors + d);
      value = value + load_upto(residual + d, count);
      store(z + d, value);
      total = total + value;
    });
    const float mean = sum(total) * per_column;

    F squares = splat(0.0f);
    for_columns(a.columns, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
      const F centred = keep_upto(count, load(z + d) - splat(mean));
      squares = squares + centred * centred;
    });
    const float rstd = 1.0f / __builtin_sqrtf(sum(squares) * per_column + a.eps);

    for_columns(a.columns, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
      const F normal = (load(z + d) - splat(mean)) * splat(rstd);
      store_upto(y + d, count, normal * load_upto(a.weight + d, count) + load_upto(a.bias + d, count));
    });
    a.mean[line] = mean;
    a.rstd[line] = rstd;
  }
}

// With n = (z - mean) rstd and g = grad_y weight:  grad_z = rstd (g - mean(g) - n mean(g n)).
template <class X, class R>
void layer_norm_backward(
    const LayerNormBackwardArgs& a, float* grad_weight, float* grad_bias, float* scratch, int64_t begin, int64_t end) {
  float* normals = scratch;
  float* factors = scratch + padded(a.columns);
  float* weighted = scratch + 2 * padded(a.columns);
  const bool drops = a.mask.threshold > 0;
  const float per_column = 1.0f / static_cast<float>(a.columns);
  for (int64_t line = begin; line < end; ++line) {
    const R* grad_y = static_cast<const R*>(a.grad_y) + line * a.columns;
    const X* x = static_cast<const X*>(a.x) + line * a.columns;
    const R* residual = static_cast<const R*>(a.residual) + line * a.columns;
    X* grad_x = static_cast<X*>(a.grad_x) + line * a.columns;
    R* grad_residual = static_cast<R*>(a.grad_residual) + line * a.columns;
    const F mean = splat(a.mean[line]), rstd = splat(a.rstd[line]);
    if (drops) draw_factors(a.mask, line / a.lines, static_cast<uint32_t>(line % a.lines), a.columns, factors);

    F sum_g = splat(0.0f), sum_gn = splat(0.0f);
    for_columns(a.columns, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
      F value = load_upto(x + d, count);
      if (drops) value = value * load(factors + d);
      value = value + load_upto(residual + d, count);
      const F normal = keep_upto(count, (value - mean) * rstd);
      const F dy = load_upto(grad_y + d, count);
      const F g = dy * load_upto(a.weight + d, count);
      store(normals + d, normal);
      store(weighted + d, g);
      sum_g = sum_g + g;
      sum_gn = sum_gn + g * normal;
      store_upto(grad_weight + d, count, load_upto(grad_weight + d, count) + dy * normal);
      store_upto(grad_bias + d, count, load_upto(grad_bias + d, count) + dy);
    });
    const F mean_g = splat(sum(sum_g) * per_column), mean_gn = splat(sum(sum_gn) * per_column);

    for_columns(a.columns, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
      const F dz = rstd * ((load(weighted + d) - mean_g) - load(normals + d) * mean_gn);
      store_upto(grad_residual + d, count, dz);
      store_upto(grad_x + d, count, drops ? dz * load(factors + d) : dz);
    });
  }
}

}  // namespace TORCHX_ISA
}  // namespace torchx
