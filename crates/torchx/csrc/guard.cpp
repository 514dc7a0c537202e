#include "guard.h"

#include <string>

namespace torchx {

namespace {
thread_local std::string last_error;
}

void set_last_error(const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
}

}  // namespace torchx

// Valid until the next failing call on the same thread.
extern "C" const char* torchx_last_error() { return torchx::last_error.c_str(); }
