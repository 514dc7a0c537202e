// c10d's Reducer: gradients in buckets, averaged over a group while the backward pass goes on.
#include "../guard.h"
#include "../tensors.h"
#include "dist.h"

#include <torch/csrc/distributed/c10d/reducer.hpp>

#include <ATen/ATen.h>

#include <algorithm>
#include <exception>
#include <iterator>
#include <memory>
#include <mutex>
#include <unordered_map>

using torchx::GroupPtr;
using torchx::guarded;

namespace {

// Halves the bytes on the wire: the mean's terms and the sums of the ranks are bf16.
class Bf16Hook final : public c10d::CppCommHookInterface<GroupPtr> {
 public:
  using CppCommHookInterface::CppCommHookInterface;

  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    auto wide = bucket.getBuffer();
    std::vector<at::Tensor> tensors{wide.div_(state_->getSize()).to(at::kBFloat16)};
    auto reduced = state_->allreduce(tensors, {})->getFuture();
    return reduced->then(
        [wide](c10::ivalue::Future& done) {
          wide.copy_(done.value().toTensorVector()[0]);
          return c10::IValue(wide);
        },
        c10::TensorType::get());
  }
};

class Reducer final : public c10d::Reducer {
 public:
  using c10d::Reducer::Reducer;

  // Autograd's nodes and a running backward pass call into this object. They are reached from a graph through the
  // parameters, and such a graph holds on to their accumulators; without one nobody is left to call.
  bool in_a_graph() const {
    // The lock is held while a backward pass waits for the peers, which may be threads that come by here.
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return true;
    std::unordered_map<const torch::autograd::Node*, long> own;
    for (const auto& node : grad_accumulators_) ++own[node.get()];
    for (const auto& hook : hooks_) ++own[hook.second.get()];
    for (const auto& node : grad_accumulators_) {
      if (node.use_count() > own[node.get()]) return true;
    }
    return false;
  }
};

// libtorch compares with rank 0, which itself learns nothing of a difference.
void check_params(const GroupPtr& group, const std::vector<at::Tensor>& params) {
  std::exception_ptr own;
  try {
    c10d::verify_params_across_processes(group, params, std::nullopt);
  } catch (...) {
    own = std::current_exception();
  }
  std::vector<at::Tensor> agree{at::full({1}, own ? 0 : 1, at::TensorOptions(at::kInt).device(params.at(0).device()))};
  c10d::AllreduceOptions options;
  options.reduceOp = c10d::ReduceOp::MIN;
  auto work = group->allreduce(agree, options);
  if (own) std::rethrow_exception(own);
  work->wait();
  TORCH_CHECK(agree[0].item<int>() == 1, "another rank's parameters differ from rank 0's in shape, dtype or number");
}

// Reducers that were let go while a graph through their parameters was alive.
std::mutex retired_mutex;
std::vector<std::unique_ptr<Reducer>>& retired() {
  static auto* list = new std::vector<std::unique_ptr<Reducer>>;
  return *list;
}

void free_retired() {
  std::vector<std::unique_ptr<Reducer>> free;  // emptied behind the lock: a group may go with its last reducer, and wait
  std::lock_guard<std::mutex> lock(retired_mutex);
  auto& list = retired();
  const auto alive = std::partition(list.begin(), list.end(), [](const auto& it) { return it->in_a_graph(); });
  std::move(alive, list.end(), std::back_inserter(free));
  list.erase(alive, list.end());
}

}  // namespace

extern "C" {

int torchx_reducer_new(
    const GroupPtr* group,
    at::Tensor* const* params,
    size_t count,
    int64_t first_bucket_bytes,
    int64_t bucket_bytes,
    int find_unused,
    int compress_bf16,
    Reducer** out) {
  return guarded([&] {
    free_retired();
    auto list = torchx::to_vector(params, count);
    check_params(*group, list);
    const std::vector<bool> sparse(count, false);
    auto buckets = std::get<0>(c10d::compute_bucket_assignment_by_size(
        list, {static_cast<size_t>(first_bucket_bytes), static_cast<size_t>(bucket_bytes)}, sparse));
    // Gradients come in about the reverse order of the parameters.
    std::reverse(buckets.begin(), buckets.end());
    auto reducer = std::make_unique<Reducer>(
        std::move(list),
        std::move(buckets),
        *group,
        sparse,
        bucket_bytes,
        find_unused != 0,
        /*gradient_as_bucket_view=*/false,
        std::unordered_map<size_t, std::string>{},
        first_bucket_bytes,
        /*skip_all_reduce_unused_params=*/false,
        /*use_python_reducer=*/false,
        std::vector<int64_t>{});
    if (compress_bf16) reducer->register_comm_hook(std::make_unique<Bf16Hook>(*group));
    *out = reducer.release();
  });
}

void torchx_reducer_free(Reducer* reducer) {
  {
    std::lock_guard<std::mutex> lock(retired_mutex);
    retired().emplace_back(reducer);
  }
  guarded([] { free_retired(); });
}

int torchx_reducer_prepare(Reducer* reducer, at::Tensor* const* outputs, size_t count) {
  return guarded([&] {
    // After the first reduction the buckets follow the order in which gradients came, rank 0's for all.
    reducer->rebuild_buckets();
    reducer->prepare_for_backward(torchx::to_vector(outputs, count));
  });
}

int torchx_reducer_finish(Reducer* reducer) {
  return guarded([&] { reducer->check_finalized(); });
}

}  // extern "C"
