#include "dropout_mask.h"
#include "guard.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <vector>

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torchx::guarded;

namespace {

// Gradients of weight and bias are summed by blocks of this many lines, whatever the number of threads.
constexpr int64_t kBlockLines = 32;

struct Shape {
  int64_t columns, lines, total_lines;

  explicit Shape(const at::Tensor& x)
      : columns(x.size(-1)), lines(x.numel() / (x.size(0) * columns)), total_lines(x.numel() / columns) {}

  std::vector<float> scratch() const { return std::vector<float>(3 * torchx::padded(columns)); }
};

struct DropoutAddLayerNorm : torch::autograd::Function<DropoutAddLayerNorm> {
  static at::Tensor forward(
      AutogradContext* ctx,
      const at::Tensor& x_in,
      const at::Tensor& residual_in,
      const at::Tensor& weight,
      const at::Tensor& bias,
      double eps,
      double p,
      int64_t site,
      const std::optional<at::Tensor>& rows_in) {
    const auto rows = rows_in.value_or(at::Tensor());
    const auto x = x_in.contiguous(), residual = residual_in.contiguous();
    const Shape shape(x);
    auto y = at::empty_like(residual);
    auto mean = at::empty({shape.total_lines}, at::kFloat), rstd = at::empty_like(mean);
    const torchx::LayerNormArgs args{
        x.const_data_ptr(),
        residual.const_data_ptr(),
        weight.const_data_ptr<float>(),
        bias.const_data_ptr<float>(),
        y.mutable_data_ptr(),
        mean.mutable_data_ptr<float>(),
        rstd.mutable_data_ptr<float>(),
        shape.lines,
        shape.columns,
        static_cast<float>(eps),
        torchx::make_mask(p, static_cast<uint64_t>(site), rows)};
    const auto kernel = torchx::kernels().layer_norm[torchx::dtype_of(x)][torchx::dtype_of(residual)];
    at::parallel_for(0, shape.total_lines, torchx::grain(shape.columns), [&](int64_t begin, int64_t end) {
      auto scratch = shape.scratch();
      kernel(args, scratch.data(), begin, end);
    });
    // x and residual instead of their sum: nothing is written for the backward pass.
    ctx->save_for_backward({x, residual, weight, mean, rstd, rows});
    ctx->saved_data["p"] = p;
    ctx->saved_data["site"] = site;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "dropout_add_layer_norm has no second derivative");
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &residual = saved[1], &weight = saved[2];
    const auto &mean = saved[3], &rstd = saved[4], &rows = saved[5];
    const auto grad_y = grads[0].contiguous();
    const Shape shape(x);
    auto grad_x = at::empty_like(x), grad_residual = at::empty_like(residual);
    const int64_t blocks = (shape.total_lines + kBlockLines - 1) / kBlockLines;
    auto partial = at::zeros({2, blocks, shape.columns}, at::kFloat);
    float* partial_weight = partial.mutable_data_ptr<float>();
    float* partial_bias = partial_weight + blocks * shape.columns;
    const torchx::LayerNormBackwardArgs args{
        grad_y.const_data_ptr(),
        x.const_data_ptr(),
        residual.const_data_ptr(),
        weight.const_data_ptr<float>(),
        mean.const_data_ptr<float>(),
        rstd.const_data_ptr<float>(),
        grad_x.mutable_data_ptr(),
        grad_residual.mutable_data_ptr(),
        shape.lines,
        shape.columns,
        torchx::make_mask(
            ctx->saved_data["p"].toDouble(), static_cast<uint64_t>(ctx->saved_data["site"].toInt()), rows)};
    const auto kernel = torchx::kernels().layer_norm_backward[torchx::dtype_of(x)][torchx::dtype_of(residual)];
    at::parallel_for(0, blocks, torchx::grain(kBlockLines * shape.columns), [&](int64_t begin, int64_t end) {
      auto scratch = shape.scratch();
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kBlockLines;
        const int64_t last = std::min(first + kBlockLines, shape.total_lines);
        const int64_t at = block * shape.columns;
        kernel(args, partial_weight + at, partial_bias + at, scratch.data(), first, last);
      }
    });
    const auto sums = partial.sum(1);
    return {grad_x, grad_residual, sums[0], sums[1], at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

// `rows` may be null where p is 0.
extern "C" int torchx_dropout_add_layer_norm(
    const at::Tensor* x,
    const at::Tensor* residual,
    const at::Tensor* weight,
    const at::Tensor* bias,
    double eps,
    double p,
    uint64_t site,
    const at::Tensor* rows,
    at::Tensor** out) {
  return guarded([&] {
    TORCH_CHECK(
        torchx::is_fusable(*x) && torchx::is_fusable(*residual),
        "dropout_add_layer_norm takes fp32 or bf16 on the CPU, got ",
        x->scalar_type(), " and ", residual->scalar_type());
    TORCH_CHECK(
        x->dim() >= 2 && x->numel() > 0 && x->sizes() == residual->sizes(),
        "dropout_add_layer_norm takes two tensors of one shape, of two or more dimensions, got ",
        x->sizes(), " and ", residual->sizes());
    for (const at::Tensor* vector : {weight, bias})
      TORCH_CHECK(
          vector->dim() == 1 && vector->size(0) == x->size(-1) && vector->scalar_type() == at::kFloat,
          "layer norm's weight and bias must be fp32 of shape [",
          x->size(-1), "], got ", vector->scalar_type(), " ", vector->sizes());
    std::optional<at::Tensor> keys;
    if (p > 0) {
      TORCH_CHECK(rows != nullptr, "dropout needs a key");
      torchx::check_rows(*rows, x->size(0));
      keys = rows->contiguous();
    }
    *out = new at::Tensor(DropoutAddLayerNorm::apply(
        *x, *residual, weight->contiguous(), bias->contiguous(), eps, p, static_cast<int64_t>(site), keys));
  });
}
