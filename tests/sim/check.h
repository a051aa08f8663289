// A test is a function that throws; `./tests name seed` runs one, in the simulator, or compiled by nvcc on a
// GPU (the seed is one of the simulator alone).
#pragma once
#include <math.h>
#include <stdio.h>

#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

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

#ifdef __CUDACC__

// A tensor of the device and its twin on the host: `data` is for kernels, `[]` sees what they left.
template <typename T>
class Array {
 public:
  explicit Array(size_t n) : size_(n), host_(new T[n]()) {
    expect_ok(saccade::cuda_error("cudaMalloc", cudaMalloc(&device_, n * sizeof(T))));
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(device_); }
  T* data() {
    if (!given_) copy(device_, host_.get(), cudaMemcpyHostToDevice);
    given_ = true;
    return device_;
  }
  T& operator[](size_t i) {
    if (given_) copy(host_.get(), device_, cudaMemcpyDeviceToHost);
    given_ = false;
    return host_[i];
  }
  size_t size() const { return size_; }

 private:
  void copy(T* to, const T* from, cudaMemcpyKind kind) {
    expect_ok(saccade::cuda_error("cudaMemcpy", cudaMemcpy(to, from, size_ * sizeof(T), kind)));
  }
  size_t size_;
  std::unique_ptr<T[]> host_;
  T* device_ = nullptr;
  bool given_ = false;
};
inline float value(saccade::bf16 x) { return __bfloat162float(x); }
inline float value(saccade::fp16 x) { return __half2float(x); }
inline float value(float x) { return x; }
inline void round_to(saccade::bf16& x, float number) { x = __float2bfloat16_rn(number); }
inline void round_to(saccade::fp16& x, float number) { x = __float2half_rn(number); }
inline void round_to(float& x, float number) { x = number; }

#else

// A host array that kernels may touch.
template <typename T>
struct Array {
  explicit Array(size_t n) : size_(n), host_(new T[n]()) {
    const char* at = reinterpret_cast<const char*>(host_.get());
    saccade::sim::block.memory.push_back({at, at + n * sizeof(T)});
  }
  Array(const Array&) = delete;
  ~Array() { saccade::sim::block.memory.clear(); }
  T* data() { return host_.get(); }
  T& operator[](size_t i) { return host_[i]; }
  size_t size() const { return size_; }

 private:
  size_t size_;
  std::unique_ptr<T[]> host_;
};
template <typename T>
float value(T x) {
  return saccade::to_float(x);
}
template <typename T>
void round_to(T& x, float number) {
  x = saccade::from_float<T>(number);
}

#endif

template <typename T>
struct Numbers : Array<T> {
  explicit Numbers(size_t n, int from = 0) : Array<T>(n) {
    for (size_t i = 0; i < n; ++i) round_to((*this)[i], number(int(i) + from));
  }
};
