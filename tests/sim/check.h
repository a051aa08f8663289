// A test is a function that throws; `./tests name seed` runs one.
#pragma once
#include <math.h>
#include <stdio.h>

#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.h"

inline std::map<std::string, std::function<void()>>& tests() {
  static std::map<std::string, std::function<void()>> all;
  return all;
}
struct Register {
  Register(const char* name, std::function<void()> test) { tests()[name] = test; }
};
#define TEST(name)                                    \
  static void name();                                 \
  static const Register register_##name(#name, name); \
  static void name()

inline void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}
inline void expect_equal(double got, double wanted, const char* what) {
  if (!(fabs(got - wanted) <= 1e-6 * (1 + fabs(wanted))))
    throw std::runtime_error(std::string(what) + ": got " + std::to_string(got) + ", wanted " +
                             std::to_string(wanted));
}
inline void expect_ok(const std::string& error) { expect(error.empty(), error); }

// Numbers that every 16-bit type holds exactly.
inline float number(int i) { return float((i * 37 + 11) % 61 - 30) / 16; }

// A host array that kernels may touch.
template <typename T>
struct Array : std::vector<T> {
  explicit Array(size_t n) : std::vector<T>(n) { share(); }
  Array(const Array&) = delete;
  ~Array() { saccade::sim::block.memory.clear(); }
  void share() {
    const char* at = reinterpret_cast<const char*>(this->data());
    saccade::sim::block.memory.push_back({at, at + this->size() * sizeof(T)});
  }
};
template <typename T>
struct Numbers : Array<T> {
  explicit Numbers(size_t n, int from = 0) : Array<T>(n) {
    for (size_t i = 0; i < n; ++i) (*this)[i] = saccade::from_float<T>(number(int(i) + from));
  }
};
