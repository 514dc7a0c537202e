// The few names of gloo that libtorch's ProcessGroupGloo.hpp mentions: the wheel carries gloo's code but not its headers.
//
// Nothing here is laid out, constructed or derived from in this crate: every such object is made inside libtorch and
// held behind a pointer. What is declared without a body is called by its symbol in libtorch_cpu.
#pragma once

#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

namespace gloo {

namespace transport {

class Device;

class Pair {
 public:
  virtual ~Pair();
};

namespace tcp {

class Pair : public transport::Pair {
 public:
  ~Pair() override;
  std::exception_ptr signalExceptionExternal(const std::string& message);
};

}  // namespace tcp

class UnboundBuffer {
 public:
  virtual ~UnboundBuffer();
};

}  // namespace transport

namespace rendezvous {

class Store {
 public:
  virtual ~Store();
  virtual void set(const std::string& key, const std::vector<char>& value) = 0;
  virtual std::vector<char> get(const std::string& key) = 0;
  virtual void wait(const std::vector<std::string>& keys) = 0;
  virtual void wait(const std::vector<std::string>& keys, const std::chrono::milliseconds& timeout) = 0;
};

}  // namespace rendezvous

class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
  std::unique_ptr<transport::Pair>& getPair(int rank);
};

}  // namespace gloo
