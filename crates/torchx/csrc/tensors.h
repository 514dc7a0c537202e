// Tensors cross the boundary as at::Tensor*, the very pointers tch holds.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <optional>
#include <vector>

namespace torchx {

inline std::vector<at::Tensor> to_vector(at::Tensor* const* tensors, size_t count) {
  std::vector<at::Tensor> out;
  out.reserve(count);
  for (size_t i = 0; i < count; ++i) out.push_back(*tensors[i]);
  return out;
}

inline std::optional<at::Tensor> to_optional(const at::Tensor* tensor) {
  if (tensor == nullptr) return std::nullopt;
  return *tensor;
}

}  // namespace torchx
