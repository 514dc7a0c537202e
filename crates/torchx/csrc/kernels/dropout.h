#pragma once

#include "philox.h"

namespace torchx {
namespace TORCHX_ISA {

template <class T>
void dropout(const DropoutArgs& a, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const int64_t groups = (a.columns + kGroup - 1) / kGroup;
  const F scale = splat(a.mask.scale), zero = splat(0.0f);
  int64_t line = begin / groups, group = begin % groups;
  for (int64_t i = begin; i < end; ++i) {
    const uint64_t row = static_cast<uint64_t>(a.mask.rows[line / a.lines]);
    const Group random = Group::draw(a.mask.site, row, static_cast<uint32_t>(line % a.lines), group);
    const int64_t at = line * a.columns + group * kGroup;
    const int64_t left = a.columns - group * kGroup;
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const int64_t first = q * kLanes;
      const Mask kept = Group::kept(random, q, a.mask.threshold);
      if (left >= first + kLanes) {
        store(y + at + first, select(kept, load(x + at + first) * scale, zero));
      } else if (left > first) {
        const F value = load_first(x + at + first, left - first) * scale;
        store_first(y + at + first, left - first, select(kept, value, zero));
      }
    }
    if (++group == groups) {
      group = 0;
      ++line;
    }
  }
}

}  // namespace TORCHX_ISA
}  // namespace torchx
