// Finds the NCCL backend: csrc/nccl, built apart.
#include "dist.h"

#include <torch/version.h>

#include <dlfcn.h>

#include <cstring>

namespace torchx {

namespace {

// A symbol of the library, or an error that says what is wrong with it.
template <class F>
F* symbol(void* library, const char* name, const std::string& path) {
  void* found = dlsym(library, name);
  TORCH_CHECK(found != nullptr, path, " has no ", name, ": build it anew with scripts/nccl");
  return reinterpret_cast<F*>(found);
}

using Make = void(const StorePtr&, int, int, int, std::chrono::milliseconds, BackendPtr&);

// What makes a backend. The handle stays open: the backend's code is in it.
Make* open_nccl(const std::string& library) {
  using Version = const char*();
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(handle != nullptr, dlerror());
  const char* version = symbol<Version>(handle, "blip2_nccl_torch_version", library)();
  TORCH_CHECK(
      std::strcmp(version, TORCH_VERSION) == 0, library, " was built against libtorch ", version, ", expected ", TORCH_VERSION,
      ": build it anew with scripts/nccl");
  return symbol<Make>(handle, "blip2_nccl_backend", library);
}

}  // namespace

void find_nccl(const std::string& library) { open_nccl(library); }

BackendPtr make_nccl(
    const std::string& library,
    const StorePtr& store,
    int rank,
    int world,
    int cuda_index,
    std::chrono::milliseconds timeout) {
  BackendPtr backend;
  open_nccl(library)(store, rank, world, cuda_index, timeout, backend);
  return backend;
}

}  // namespace torchx
