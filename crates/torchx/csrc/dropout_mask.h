// What the three functions with keyed dropout share.
#pragma once

#include "kernels/kernels.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>

namespace torchx {

// p in units of 1/65536; the scale is exact for the rounded p, so that the expectation is kept.
inline DropoutMask make_mask(double p, uint64_t site, const at::Tensor& rows) {
  TORCH_CHECK(p >= 0 && p <= 1, "dropout probability ", p, " is not in [0, 1]");
  const auto threshold = static_cast<uint32_t>(std::lround(p * 65536));
  const float scale = threshold == 65536 ? 0.0f : static_cast<float>(65536.0 / (65536 - threshold));
  return {threshold > 0 ? rows.const_data_ptr<int64_t>() : nullptr, site, threshold, scale};
}

inline void check_rows(const at::Tensor& rows, int64_t samples) {
  TORCH_CHECK(
      rows.device().is_cpu() && rows.scalar_type() == at::kLong && rows.dim() == 1 && rows.size(0) == samples,
      "dropout rows must be an int64 CPU tensor of shape [", samples, "], got ", rows.scalar_type(), " ", rows.sizes());
}

inline bool is_fusable(const at::Tensor& x) {
  return x.device().is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

inline Dtype dtype_of(const at::Tensor& x) { return x.scalar_type() == at::kFloat ? F32 : BF16; }

// Kernels are launched for ranges of at least about this many elements.
constexpr int64_t kGrainElements = 16384;

inline int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_per_item));
}

}  // namespace torchx
