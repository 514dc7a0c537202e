// c10d's TCPStore: one connection to a store, which it may serve as well.
#include "../guard.h"
#include "dist.h"

#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <c10/util/Logging.h>

#include <cstdlib>
#include <cstring>

using torchx::guarded;
using torchx::StorePtr;
using torchx::Text;

namespace {

// The bytes are handed out as a tensor, whose memory both sides know how to free.
at::Tensor* value_of(const StorePtr* store, Text key) {
  const auto value = (*store)->get(key.string());
  auto bytes = at::empty({static_cast<int64_t>(value.size())}, at::kByte);
  if (!value.empty()) std::memcpy(bytes.mutable_data_ptr<uint8_t>(), value.data(), value.size());
  return new at::Tensor(std::move(bytes));
}

}  // namespace

extern "C" {

int torchx_store_open(Text host, uint16_t port, int serve, int64_t timeout_ms, StorePtr** out) {
  return guarded([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = serve != 0;
    options.waitWorkers = false;
    options.timeout = std::chrono::milliseconds(timeout_ms);
    // What c10d warns of comes back as an error as well; standard error is the program's.
    if (std::getenv("TORCH_CPP_LOG_LEVEL") == nullptr) FLAGS_caffe2_log_level = c10::GLOG_FATAL;
    *out = new StorePtr(c10::make_intrusive<c10d::TCPStore>(host.string(), options));
  });
}

void torchx_store_free(StorePtr* store) { delete store; }

uint16_t torchx_store_port(const StorePtr* store) { return dynamic_cast<c10d::TCPStore&>(**store).getPort(); }

int torchx_store_set(const StorePtr* store, Text key, const uint8_t* bytes, size_t length) {
  return guarded([&] { (*store)->set(key.string(), std::vector<uint8_t>(bytes, bytes + length)); });
}

int torchx_store_peek(const StorePtr* store, Text key, at::Tensor** out) {
  return guarded([&] { *out = value_of(store, key); });
}

// Waits for the key.
int torchx_store_get(const StorePtr* store, Text key, int64_t timeout_ms, at::Tensor** out) {
  return guarded([&] {
    (*store)->setTimeout(std::chrono::milliseconds(timeout_ms));
    *out = value_of(store, key);
  });
}

int torchx_store_add(const StorePtr* store, Text key, int64_t amount, int64_t* out) {
  return guarded([&] { *out = (*store)->add(key.string(), amount); });
}

int torchx_store_has(const StorePtr* store, const Text* keys, size_t count, int* out) {
  return guarded([&] {
    std::vector<std::string> strings;
    for (size_t i = 0; i < count; ++i) strings.push_back(keys[i].string());
    *out = (*store)->check(strings);
  });
}

int torchx_store_remove(const StorePtr* store, Text key, int* out) {
  return guarded([&] { *out = (*store)->deleteKey(key.string()); });
}

}  // extern "C"
