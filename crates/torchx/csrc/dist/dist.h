// What the files of this folder share: stores, groups and texts as the Rust side holds them.
#pragma once

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <atomic>
#include <chrono>
#include <mutex>
#include <string>
#include <vector>

namespace torchx {

// UTF-8 of any content, as Rust holds it.
struct Text {
  const char* bytes;
  size_t length;

  std::string string() const { return std::string(bytes, length); }
};

using StorePtr = c10::intrusive_ptr<c10d::Store>;
using BackendPtr = c10::intrusive_ptr<c10d::Backend>;

// Collectives are started one at a time in the whole process, autograd's through the Reducer included: libtorch numbers
// those of a group without a lock, and its flight recorder puts every group into one map without a lock, too. Starting
// only queues the work; waiting for it is outside the lock.
class Group final : public c10d::ProcessGroup {
 public:
  using ProcessGroup::ProcessGroup;

  ~Group() override {
    if (nccl && !aborted) nccl->shutdown();
  }

  // Beside Gloo, once ranks are on CUDA devices.
  BackendPtr nccl;
  std::atomic<bool> aborted = false;
  // When the last all_reduce began.
  std::atomic<std::chrono::steady_clock::time_point> reducing = std::chrono::steady_clock::time_point();

  c10::intrusive_ptr<c10d::Work> allreduce(
      std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override {
    reducing = std::chrono::steady_clock::now();
    std::lock_guard<std::mutex> lock(starting_);
    return ProcessGroup::allreduce(tensors, options);
  }
  c10::intrusive_ptr<c10d::Work> broadcast(
      std::vector<at::Tensor>& tensors, const c10d::BroadcastOptions& options) override {
    std::lock_guard<std::mutex> lock(starting_);
    return ProcessGroup::broadcast(tensors, options);
  }
  c10::intrusive_ptr<c10d::Work> allgather(
      std::vector<std::vector<at::Tensor>>& outputs,
      std::vector<at::Tensor>& inputs,
      const c10d::AllgatherOptions& options) override {
    std::lock_guard<std::mutex> lock(starting_);
    return ProcessGroup::allgather(outputs, inputs, options);
  }
  c10::intrusive_ptr<c10d::Work> _allgather_base(
      at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    std::lock_guard<std::mutex> lock(starting_);
    return ProcessGroup::_allgather_base(output, input, options);
  }
  c10::intrusive_ptr<c10d::Work> alltoall_base(
      at::Tensor& output,
      at::Tensor& input,
      std::vector<int64_t>& output_rows,
      std::vector<int64_t>& input_rows,
      const c10d::AllToAllOptions& options) override {
    std::lock_guard<std::mutex> lock(starting_);
    return ProcessGroup::alltoall_base(output, input, output_rows, input_rows, options);
  }

 private:
  inline static std::mutex starting_;
};

using GroupPtr = c10::intrusive_ptr<Group>;

BackendPtr make_gloo(const StorePtr& store, int rank, int world, std::chrono::milliseconds timeout);

// Ends every connection to the peers: their operations fail, and so do this process's.
void close_gloo(c10d::Backend& backend);

// Throws where there is no library with an NCCL backend that fits this libtorch.
void find_nccl(const std::string& library);

// NCCL on a CUDA device, out of a library that was built against CUDA's headers (csrc/nccl).
BackendPtr make_nccl(
    const std::string& library,
    const StorePtr& store,
    int rank,
    int world,
    int cuda_index,
    std::chrono::milliseconds timeout);

}  // namespace torchx
