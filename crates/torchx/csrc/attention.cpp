#include "dropout_mask.h"
#include "guard.h"

#include <ATen/Parallel.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <optional>
#include <vector>

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torchx::guarded;

namespace {

// [B, H, N, D] -> [B H, N, D], copied where the strides ask for it.
at::Tensor merge_heads(const at::Tensor& t) { return t.reshape({t.size(0) * t.size(1), t.size(2), t.size(3)}); }

// The dtypes of q, k and v decide, not autocast.
struct NoAutocast : c10::impl::ExcludeDispatchKeyGuard {
  NoAutocast() : ExcludeDispatchKeyGuard(c10::autocast_dispatch_keyset) {}
};

struct DropoutAttention : torch::autograd::Function<DropoutAttention> {
  // allowed: bool [B, H, N, M], expanded.
  static at::Tensor forward(
      AutogradContext* ctx,
      const at::Tensor& q,
      const at::Tensor& k,
      const at::Tensor& v,
      const std::optional<at::Tensor>& allowed,
      double p,
      int64_t site,
      const at::Tensor& rows) {
    const NoAutocast no_autocast;
    const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2);
    const auto q3 = merge_heads(q), k3 = merge_heads(k), v3 = merge_heads(v);
    auto probabilities = at::bmm(q3, k3.transpose(1, 2));
    auto dropped = at::empty_like(probabilities);
    const auto mask = torchx::make_mask(p, static_cast<uint64_t>(site), rows);
    torchx::SoftmaxArgs args{};
    args.scores = probabilities.mutable_data_ptr();
    args.dropped = dropped.mutable_data_ptr();
    if (allowed) {
      args.allowed = reinterpret_cast<const uint8_t*>(allowed->const_data_ptr<bool>());
      args.allowed_stride_sample = allowed->stride(0);
      args.allowed_stride_head = allowed->stride(1);
      args.allowed_stride_query = allowed->stride(2);
    }
    args.heads = heads;
    args.queries = queries;
    args.keys = keys;
    args.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(q.size(3))));
    args.mask = mask;
    const auto kernel = torchx::kernels().softmax[torchx::dtype_of(q)];
    at::parallel_for(0, batch * heads * queries, torchx::grain(keys), [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(3 * torchx::padded(keys));
      kernel(args, scratch.data(), begin, end);
    });
    // Both are kept, which spares the backward pass the random numbers.
    ctx->save_for_backward({q3, k3, v3, probabilities, dropped});
    ctx->saved_data["scale"] = static_cast<double>(args.scale);
    ctx->saved_data["heads"] = heads;
    return at::bmm(dropped, v3).view({batch, heads, queries, v.size(3)});
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "attention with dropout has no second derivative");
    const NoAutocast no_autocast;
    const auto saved = ctx->get_saved_variables();
    const auto &q3 = saved[0], &k3 = saved[1], &v3 = saved[2], &probabilities = saved[3], &dropped = saved[4];
    const int64_t heads = ctx->saved_data["heads"].toInt();
    const auto grad_out = merge_heads(grads[0]);
    const auto grad_v = at::bmm(dropped.transpose(1, 2), grad_out);
    auto grad_scores = at::bmm(grad_out, v3.transpose(1, 2));
    const torchx::SoftmaxBackwardArgs args{
        probabilities.const_data_ptr(),
        dropped.const_data_ptr(),
        grad_scores.mutable_data_ptr(),
        grad_scores.size(2),
        static_cast<float>(ctx->saved_data["scale"].toDouble())};
    const auto kernel = torchx::kernels().softmax_backward[torchx::dtype_of(q3)];
    const int64_t lines = grad_scores.size(0) * grad_scores.size(1);
    at::parallel_for(0, lines, torchx::grain(args.keys), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    const auto split = [&](const at::Tensor& t) { return t.view({-1, heads, t.size(1), t.size(2)}); };
    return {
        split(at::bmm(grad_scores, k3)),
        split(at::bmm(grad_scores.transpose(1, 2), q3)),
        split(grad_v),
        at::Tensor(),
        at::Tensor(),
        at::Tensor(),
        at::Tensor()};
  }
};

}  // namespace

extern "C" int torchx_dropout_attention(
    const at::Tensor* q,
    const at::Tensor* k,
    const at::Tensor* v,
    const at::Tensor* allowed,
    double p,
    uint64_t site,
    const at::Tensor* rows,
    at::Tensor** out) {
  return guarded([&] {
    TORCH_CHECK(
        q->dim() == 4 && k->dim() == 4 && v->dim() == 4 && q->size(2) < 65536,
        "attention takes q, k, v of shape [B, H, N, D] with N below 65536, got ",
        q->sizes(), ", ", k->sizes(), ", ", v->sizes());
    TORCH_CHECK(
        torchx::is_fusable(*q) && k->scalar_type() == q->scalar_type() && v->scalar_type() == q->scalar_type(),
        "attention takes q, k, v of one dtype, fp32 or bf16, got ",
        q->scalar_type(), ", ", k->scalar_type(), ", ", v->scalar_type());
    torchx::check_rows(*rows, q->size(0));
    std::optional<at::Tensor> expanded;
    if (allowed != nullptr) {
      TORCH_CHECK(allowed->scalar_type() == at::kBool, "attention's mask must be bool, got ", allowed->scalar_type());
      const auto length = k->size(2);
      auto dense = allowed->size(-1) == length ? *allowed : allowed->expand({-1, -1, -1, length});
      if (dense.stride(-1) != 1) dense = dense.contiguous();
      expanded = dense.expand({q->size(0), q->size(1), q->size(2), length});
    }
    const auto keys = rows->contiguous();
    *out = new at::Tensor(DropoutAttention::apply(*q, *k, *v, expanded, p, static_cast<int64_t>(site), keys));
  });
}
