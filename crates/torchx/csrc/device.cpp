// Device control through libtorch's device-generic interface, so that no CUDA header is needed.
#include "guard.h"

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <dlfcn.h>
#include <malloc.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>

using torchx::guarded;

namespace {

at::Generator generator_of(int cuda_index) {
  if (cuda_index < 0) return at::globalContext().defaultGenerator(at::Device(at::kCPU));
  return at::globalContext().defaultGenerator(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(cuda_index)));
}

// A function of the CUDA driver about a device; the driver counts them as libtorch does (CUDA_VISIBLE_DEVICES). Null where it cannot be had.
template <class F>
F* driver_function(const char* name, int cuda_index, int* device) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (driver == nullptr) return nullptr;
  auto init = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
  auto get = reinterpret_cast<int (*)(int*, int)>(dlsym(driver, "cuDeviceGet"));
  bool there = init && get && init(0) == 0 && get(device, cuda_index) == 0;
  return there ? reinterpret_cast<F*>(dlsym(driver, name)) : nullptr;
}

}  // namespace

extern "C" {

void torchx_configure_nccl();

// The handle stays open: libtorch keeps pointers into the library.
int torchx_load_cuda() {
  if (dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL) == nullptr) return 0;
  torchx_configure_nccl();
  return 1;
}

// libtorch's threads beside NCCL end the process with SIGABRT when a peer is lost or a device fails, before the line that
// names the rank is out; torchrun asks for it. Whoever uses a group watches over its ranks himself. Here because other
// threads that read the environment come later.
void torchx_configure_nccl() {
  for (const char* name :
       {"TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING", "TORCH_NCCL_RETHROW_CUDA_ERRORS",
        "TORCH_NCCL_DUMP_ON_TIMEOUT"}) {
    setenv(name, "0", 1);
  }
}

int torchx_device_set(int cuda_index) {
  return guarded([&] { at::accelerator::setDeviceIndex(static_cast<c10::DeviceIndex>(cuda_index)); });
}

int torchx_device_synchronize(int cuda_index) {
  return guarded([&] { at::accelerator::synchronizeDevice(static_cast<c10::DeviceIndex>(cuda_index)); });
}

// The driver's own name of a device. 0 where it cannot be had.
int torchx_cuda_name(int cuda_index, char* name, int capacity) {
  int device = 0;
  auto get = driver_function<int(char*, int, int)>("cuDeviceGetName", cuda_index, &device);
  return get != nullptr && get(name, capacity, device) == 0;
}

// What no other GPU has, a slice of one (MIG) included. 0 where it cannot be had.
int torchx_cuda_uuid(int cuda_index, unsigned char* uuid) {
  int device = 0;
  auto get = driver_function<int(unsigned char*, int)>("cuDeviceGetUuid_v2", cuda_index, &device);
  return get != nullptr && get(uuid, device) == 0;
}

// Generators are used under their mutex. A negative index means the CPU.
int torchx_rng_seed(int cuda_index, uint64_t seed) {
  return guarded([&] {
    auto generator = generator_of(cuda_index);
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_current_seed(seed);
  });
}

int torchx_rng_seed_get(int cuda_index, uint64_t* seed) {
  return guarded([&] {
    auto generator = generator_of(cuda_index);
    std::lock_guard<std::mutex> lock(generator.mutex());
    *seed = generator.current_seed();
  });
}

int torchx_memory_stats(int cuda_index, int64_t* allocated, int64_t* reserved, int64_t* peak_allocated) {
  return guarded([&] {
    const auto stats = at::accelerator::getDeviceStats(static_cast<c10::DeviceIndex>(cuda_index));
    const auto aggregate = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    *allocated = stats.allocated_bytes[aggregate].current;
    *reserved = stats.reserved_bytes[aggregate].current;
    *peak_allocated = stats.allocated_bytes[aggregate].peak;
  });
}

int torchx_memory_reset_peak(int cuda_index) {
  return guarded([&] { at::accelerator::resetPeakStats(static_cast<c10::DeviceIndex>(cuda_index)); });
}

// Freed memory stays in the process: neither maps of their own for large blocks, which a free gives back, nor a heap that shrinks.
void torchx_memory_keep_freed() {
#ifdef __GLIBC__
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
#endif
}

// Page-locked host memory of the dtype of `like`.
int torchx_empty_pinned(const int64_t* shape, size_t dims, const at::Tensor* like, at::Tensor** out) {
  return guarded([&] {
    *out = new at::Tensor(at::empty(at::IntArrayRef(shape, dims), like->options().pinned_memory(true)));
  });
}

// Bits: 1 convolutions, 2 matrix products.
int torchx_tf32_get() {
  const auto allowed = [](at::Float32Op op) {
    return at::globalContext().float32Precision(at::Float32Backend::CUDA, op) == at::Float32Precision::TF32;
  };
  return (allowed(at::Float32Op::CONV) ? 1 : 0) | (allowed(at::Float32Op::MATMUL) ? 2 : 0);
}

void torchx_tf32_set(int bits) {
  auto& context = at::globalContext();
  context.setAllowTF32CuDNN(bits & 1);
  context.setAllowTF32CuBLAS(bits & 2);
}

// Runs no destructors and no handlers, which may wait for a device or a peer.
void torchx_exit(int code) { _exit(code); }

// Bits: 1 flash, 2 memory-efficient, 4 math, 8 cuDNN.
int torchx_sdpa_get() {
  const auto& context = at::globalContext();
  return (context.userEnabledFlashSDP() ? 1 : 0) | (context.userEnabledMemEfficientSDP() ? 2 : 0) |
      (context.userEnabledMathSDP() ? 4 : 0) | (context.userEnabledCuDNNSDP() ? 8 : 0);
}

void torchx_sdpa_set(int bits) {
  auto& context = at::globalContext();
  context.setSDPUseFlash(bits & 1);
  context.setSDPUseMemEfficient(bits & 2);
  context.setSDPUseMath(bits & 4);
  context.setSDPUseCuDNN(bits & 8);
}

}  // extern "C"
