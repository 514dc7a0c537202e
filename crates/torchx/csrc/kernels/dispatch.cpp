#include "kernels.h"

#include <atomic>
#include <cstring>

namespace torchx {

namespace {

const Kernels* named(const char* isa) {
  if (std::strcmp(isa, "baseline") == 0) return &kernels_baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(isa, "avx2") == 0 && __builtin_cpu_supports("avx2")) return &kernels_avx2;
  if (std::strcmp(isa, "avx512") == 0 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return &kernels_avx512;
#endif
  return nullptr;
}

const Kernels* best() {
  if (const Kernels* table = named("avx512")) return table;
  if (const Kernels* table = named("avx2")) return table;
  return &kernels_baseline;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = best();
    chosen.store(table, std::memory_order_release);
  }
  return *table;
}

}  // namespace torchx

extern "C" {

const char* torchx_isa_get() { return torchx::kernels().isa; }

// 0 where this machine lacks the instruction set.
int torchx_isa_set(const char* isa) {
  const torchx::Kernels* table = torchx::named(isa);
  if (table != nullptr) torchx::chosen.store(table, std::memory_order_release);
  return table != nullptr;
}

}  // extern "C"
