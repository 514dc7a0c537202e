#include "guard.h"

#include <ATen/autocast_mode.h>

using torchx::guarded;

namespace {

at::DeviceType device_type(int cuda) { return cuda ? at::kCUDA : at::kCPU; }

}  // namespace

extern "C" {

// A negative kind switches autocast off. What was set before goes out, for torchx_autocast_exit.
int torchx_autocast_enter(int cuda, int kind, int* previous_enabled, int* previous_kind) {
  return guarded([&] {
    const auto device = device_type(cuda);
    *previous_enabled = at::autocast::is_autocast_enabled(device);
    *previous_kind = static_cast<int>(at::autocast::get_autocast_dtype(device));
    at::autocast::set_autocast_enabled(device, kind >= 0);
    if (kind >= 0) at::autocast::set_autocast_dtype(device, static_cast<at::ScalarType>(kind));
    at::autocast::increment_nesting();
  });
}

int torchx_autocast_exit(int cuda, int previous_enabled, int previous_kind) {
  return guarded([&] {
    const auto device = device_type(cuda);
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(device, previous_enabled);
    at::autocast::set_autocast_dtype(device, static_cast<at::ScalarType>(previous_kind));
  });
}

// A negative number where autocast is off.
int torchx_autocast_kind(int cuda) {
  const auto device = device_type(cuda);
  return at::autocast::is_autocast_enabled(device) ? static_cast<int>(at::autocast::get_autocast_dtype(device)) : -1;
}

}  // extern "C"
