// The NCCL backend, a library of its own that scripts/nccl builds: its header needs CUDA's, which the program's build
// does without. The program loads it where ranks are on GPUs, behind libtorch's CUDA half, whose symbols it uses.
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#include <torch/version.h>

extern "C" {

// Classes are passed across: both sides must have been compiled against the same headers.
const char* blip2_nccl_torch_version() { return TORCH_VERSION; }

// Throws what libtorch throws.
void blip2_nccl_backend(
    const c10::intrusive_ptr<c10d::Store>& store,
    int rank,
    int world,
    int cuda_index,
    std::chrono::milliseconds timeout,
    c10::intrusive_ptr<c10d::Backend>& out) {
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  auto backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, world, options);
  // Here and not inside the first step: ranks that cannot speak to each other are found at the start.
  backend->eagerConnectSingleDevice(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(cuda_index)));
  out = std::move(backend);
}

}  // extern "C"
