// The Gloo backend; build.rs gives its header the declarations in gloo_headers/.
#include "dist.h"

#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

namespace torchx {

namespace {

struct Contexts : c10d::ProcessGroupGloo {
  static auto& of(c10d::ProcessGroupGloo& gloo) { return gloo.*(&Contexts::contexts_); }
};

}  // namespace

BackendPtr make_gloo(const StorePtr& store, int rank, int world, std::chrono::milliseconds timeout) {
  using Gloo = c10d::ProcessGroupGloo;
  // The device: GLOO_SOCKET_IFNAME, else the address of the host's name, else loopback.
  return c10::make_intrusive<Gloo>(store, rank, world, Gloo::Options::create_default(timeout));
}

void close_gloo(c10d::Backend& backend) {
  for (auto& context : Contexts::of(dynamic_cast<c10d::ProcessGroupGloo&>(backend))) {
    for (int peer = 0; peer < backend.getSize(); ++peer) {
      if (peer == backend.getRank()) continue;
      // What a read error does too: the pair's buffers wake up with the message, and its socket is closed.
      auto* pair = dynamic_cast<gloo::transport::tcp::Pair*>(context->getPair(peer).get());
      if (pair != nullptr) pair->signalExceptionExternal("the group was aborted in this process");
    }
  }
}

}  // namespace torchx
