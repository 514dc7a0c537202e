// Multi-tensor operators: one call, and on CUDA few launches, for all parameters.
#include "guard.h"
#include "tensors.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_amp_foreach_non_finite_check_and_unscale.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

using torchx::guarded;
using torchx::to_optional;
using torchx::to_vector;

extern "C" {

int torchx_foreach_norm(at::Tensor* const* tensors, size_t count, at::Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    const auto list = to_vector(tensors, count);
    if (list.empty()) {
      *out = new at::Tensor(at::zeros({}, at::kFloat));
      return;
    }
    const auto norms = at::_foreach_norm(list, 2, at::kFloat);
    *out = new at::Tensor(at::linalg_vector_norm(at::stack(norms)));
  });
}

int torchx_foreach_mul_(at::Tensor* const* tensors, size_t count, const at::Tensor* factor) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    if (count > 0) at::_foreach_mul_(to_vector(tensors, count), *factor);
  });
}

int torchx_foreach_unscale_(at::Tensor* const* grads, size_t count, at::Tensor* found_inf, const at::Tensor* inv_scale) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    if (count > 0) at::_amp_foreach_non_finite_check_and_unscale_(to_vector(grads, count), *found_inf, *inv_scale);
  });
}

// Parameters without a gradient are left alone, their step counters too.
int torchx_adamw_step(
    at::Tensor* const* params,
    at::Tensor* const* exp_avgs,
    at::Tensor* const* exp_avg_sqs,
    at::Tensor* const* steps,
    size_t count,
    double lr,
    double beta1,
    double beta2,
    double weight_decay,
    double eps,
    const at::Tensor* grad_scale,
    const at::Tensor* found_inf) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> p, g, m, v, s;
    for (size_t i = 0; i < count; ++i) {
      const auto& grad = params[i]->grad();
      if (!grad.defined()) continue;
      p.push_back(*params[i]);
      g.push_back(grad);
      m.push_back(*exp_avgs[i]);
      v.push_back(*exp_avg_sqs[i]);
      s.push_back(*steps[i]);
    }
    if (p.empty()) return;
    // The kernels skip on exactly 1, and leave the counters to the caller.
    std::optional<at::Tensor> skip;
    if (found_inf != nullptr) {
      skip = found_inf->ne(0).to(at::kFloat);
      at::_foreach_add_(s, at::rsub(*skip, 1));
    } else {
      at::_foreach_add_(s, 1);
    }
    at::_fused_adamw_(
        p, g, m, v, /*max_exp_avg_sqs=*/{}, s, lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false,
        /*maximize=*/false, to_optional(grad_scale), skip);
  });
}

int torchx_clear_grads(at::Tensor* const* params, size_t count) {
  return guarded([&] {
    for (size_t i = 0; i < count; ++i) params[i]->mutable_grad().reset();
  });
}

}  // extern "C"
