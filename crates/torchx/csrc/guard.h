// Every function of this shim is plain C: it returns 0, or 1 after leaving the exception's text for torchx_last_error().
#pragma once

#include <c10/util/Exception.h>

#include <exception>

namespace torchx {

void set_last_error(const char* message) noexcept;

template <class F>
int guarded(F&& body) noexcept {
  try {
    body();
    return 0;
  } catch (const c10::Error& e) {
    set_last_error(e.what_without_backtrace());
  } catch (const std::exception& e) {
    set_last_error(e.what());
  } catch (...) {
    set_last_error("unknown C++ exception");
  }
  return 1;
}

}  // namespace torchx
