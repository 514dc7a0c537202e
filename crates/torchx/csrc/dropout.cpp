#include "dropout_mask.h"
#include "guard.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torchx::guarded;

namespace {

at::Tensor masked(const at::Tensor& input, double p, uint64_t site, const at::Tensor& rows) {
  const auto x = input.contiguous();
  auto y = at::empty_like(x);
  if (x.numel() == 0) return y;
  const int64_t columns = x.size(-1), lines = x.numel() / (x.size(0) * columns);
  const torchx::DropoutArgs args{
      x.const_data_ptr(), y.mutable_data_ptr(), lines, columns, torchx::make_mask(p, site, rows)};
  const auto kernel = torchx::kernels().dropout[torchx::dtype_of(x)];
  const int64_t groups = x.numel() / columns * (torchx::padded(columns) / torchx::kGroup);
  at::parallel_for(0, groups, torchx::grain(torchx::kGroup), [&](int64_t begin, int64_t end) {
    kernel(args, begin, end);
  });
  return y;
}

// The mask is drawn again in the backward pass: that costs less than writing and reading it.
struct Dropout : torch::autograd::Function<Dropout> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, double p, int64_t site, const at::Tensor& rows) {
    ctx->saved_data["p"] = p;
    ctx->saved_data["site"] = site;
    ctx->save_for_backward({rows});
    return masked(x, p, static_cast<uint64_t>(site), rows);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "keyed dropout has no second derivative");
    const auto rows = ctx->get_saved_variables()[0];
    const double p = ctx->saved_data["p"].toDouble();
    const auto site = static_cast<uint64_t>(ctx->saved_data["site"].toInt());
    return {masked(grads[0], p, site, rows), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

extern "C" int torchx_dropout(const at::Tensor* x, double p, uint64_t site, const at::Tensor* rows, at::Tensor** out) {
  return guarded([&] {
    TORCH_CHECK(
        x->dim() >= 2 && torchx::is_fusable(*x),
        "keyed dropout takes fp32 or bf16 of two or more dimensions on the CPU, got ",
        x->scalar_type(), " ", x->sizes());
    torchx::check_rows(*rows, x->size(0));
    *out = new at::Tensor(Dropout::apply(*x, p, static_cast<int64_t>(site), rows->contiguous()));
  });
}
