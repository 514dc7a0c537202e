// Collectives of a process group. All wait: on the CPU for the result, on CUDA for its place in the current stream.
#include "../guard.h"
#include "dist.h"

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

using torchx::Group;
using torchx::GroupPtr;
using torchx::guarded;
using torchx::StorePtr;
using torchx::Text;

namespace {

constexpr auto kGloo = c10d::ProcessGroup::BackendType::GLOO;
constexpr auto kNccl = c10d::ProcessGroup::BackendType::NCCL;

// Collectives are no part of the graph, and a leaf that wants gradients may be written.
at::Tensor dense(const at::Tensor& tensor) { return tensor.detach().contiguous(); }

// Moved as bytes: no backend knows every dtype. [rows, bytes of a row]
at::Tensor row_bytes(const at::Tensor& contiguous) {
  const int64_t rows = contiguous.size(0);
  const int64_t width = c10::multiply_integers(contiguous.sizes().slice(1)) * contiguous.element_size();
  return contiguous.view({-1}).view(at::kByte).view({rows, width});
}

std::vector<int64_t> with_rows(const at::Tensor& tensor, int64_t rows) {
  auto shape = tensor.sizes().vec();
  shape[0] = rows;
  return shape;
}

void wait(const c10::intrusive_ptr<c10d::Work>& work) {
  if (work) work->wait();
}

// In place on `tensor` through a dense copy where it is not dense itself.
template <class F>
void in_place(at::Tensor& tensor, F&& body) {
  auto whole = dense(tensor);
  body(whole);
  auto target = tensor.detach();
  if (!whole.is_alias_of(target)) target.copy_(whole);
}

}  // namespace

extern "C" {

int torchx_group_join(
    const StorePtr* store, Text prefix, int rank, int world, int64_t timeout_ms, GroupPtr** out) {
  return guarded([&] {
    const std::chrono::milliseconds timeout(timeout_ms);
    (*store)->setTimeout(timeout);
    StorePtr named = *store;
    if (prefix.length > 0) named = c10::make_intrusive<c10d::PrefixStore>(prefix.string(), named);
    auto group = c10::make_intrusive<Group>(named, rank, world);
    group->setBackend(c10::DeviceType::CPU, kGloo, torchx::make_gloo(named, rank, world, timeout));
    group->setDefaultBackend(kGloo);
    *out = new GroupPtr(std::move(group));
  });
}

int torchx_nccl_find(Text library) {
  return guarded([&] { torchx::find_nccl(library.string()); });
}

// CUDA tensors go over NCCL from now on; those of the CPU still over Gloo.
int torchx_group_add_nccl(
    const GroupPtr* group, const StorePtr* store, Text prefix, Text library, int cuda_index, int64_t timeout_ms) {
  return guarded([&] {
    const std::chrono::milliseconds timeout(timeout_ms);
    (*store)->setTimeout(timeout);
    const StorePtr named = c10::make_intrusive<c10d::PrefixStore>(prefix.string(), *store);
    const auto rank = (*group)->getRank(), world = (*group)->getSize();
    (*group)->nccl = torchx::make_nccl(library.string(), named, rank, world, cuda_index, timeout);
    (*group)->setBackend(c10::DeviceType::CUDA, kNccl, (*group)->nccl);
  });
}

void torchx_group_free(GroupPtr* group) { delete group; }

int torchx_group_all_reduce(const GroupPtr* group, at::Tensor* tensor, int op) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    constexpr c10d::ReduceOp::RedOpType ops[] = {c10d::ReduceOp::SUM, c10d::ReduceOp::MAX, c10d::ReduceOp::MIN};
    in_place(*tensor, [&](at::Tensor& whole) {
      std::vector<at::Tensor> tensors{whole.view({-1})};
      c10d::AllreduceOptions options;
      options.reduceOp = ops[op];
      wait((*group)->allreduce(tensors, options));
    });
  });
}

int torchx_group_broadcast(const GroupPtr* group, at::Tensor* tensor, int root) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    in_place(*tensor, [&](at::Tensor& whole) {
      std::vector<at::Tensor> tensors{whole.view({-1}).view(at::kByte)};
      c10d::BroadcastOptions options;
      options.rootRank = root;
      wait((*group)->broadcast(tensors, options));
    });
  });
}

int torchx_group_all_gather(const GroupPtr* group, const at::Tensor* tensor, at::Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    const int64_t world = (*group)->getSize();
    auto whole = dense(*tensor);
    auto gathered = at::empty(with_rows(whole, world * whole.size(0)), whole.options());
    auto input = row_bytes(whole).view({-1});
    auto output = row_bytes(gathered).view({-1});
    wait((*group)->_allgather_base(output, input, {}));
    *out = new at::Tensor(std::move(gathered));
  });
}

int torchx_group_all_to_all(
    const GroupPtr* group, const at::Tensor* tensor, const int64_t* send, const int64_t* receive, at::Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    const auto world = (*group)->getSize();
    std::vector<int64_t> input_rows(send, send + world), output_rows(receive, receive + world);
    auto whole = dense(*tensor);
    auto received = at::empty(with_rows(whole, c10::sum_integers(output_rows)), whole.options());
    auto input = row_bytes(whole), output = row_bytes(received);
    wait((*group)->alltoall_base(output, input, output_rows, input_rows, {}));
    *out = new at::Tensor(std::move(received));
  });
}

double torchx_group_since_all_reduce(const GroupPtr* group) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - (*group)->reducing.load()).count();
}

// Rank 0 hears from every other rank and names those it did not hear from.
int torchx_group_barrier(const GroupPtr* group, int64_t timeout_ms) {
  return guarded([&] {
    c10d::BarrierOptions options;
    options.timeout = std::chrono::milliseconds(timeout_ms);
    (*group)->getBackend(kGloo)->monitoredBarrier(options, true);
  });
}

int torchx_group_abort(const GroupPtr* group) {
  return guarded([&] {
    (*group)->aborted = true;
    torchx::close_gloo(*(*group)->getBackend(kGloo));
    if ((*group)->nccl) (*group)->nccl->abort();
  });
}

}  // extern "C"
