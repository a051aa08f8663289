// Runs what a CPU kernel planned, on torch's threads.
#pragma once
#include <atomic>
#include <cstdlib>
#include <memory>

#include "cpu/kernels.h"
#include "torch_call.h"

namespace saccade {

// Memory that outlives the call: fresh pages cost more to touch than to use. One block per calling or working
// thread.
class Reused {
 public:
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_.reset(static_cast<char*>(std::aligned_alloc(4096, size_)));
      STD_TORCH_CHECK(memory_, "saccade: out of memory: ", bytes, " bytes of workspace");
      prefer_large_pages(memory_.get(), size_);
    }
    return memory_.get();
  }
  void trim(size_t limit) {
    if (size_ > limit) {
      memory_.reset();
      size_ = 0;
    }
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

constexpr size_t kKeptBytes = size_t(128) << 20;

template <typename P>
void run(const Plan<P>& plan, const P& p) {
  thread_local Reused shared;
  char* workspace = plan.workspace_bytes ? shared.at_least(plan.workspace_bytes) : nullptr;
  for (int i = 0; i < plan.phases; ++i) {
    const Phase<P>& phase = plan.phase[i];
    if (phase.items == 0) continue;
    std::atomic<int64_t> next{0};
    const auto worker = [&](int64_t, int64_t) {
      thread_local Reused own;
      char* scratch = own.at_least(plan.scratch_bytes);
      for (int64_t item = next++; item < phase.items; item = next++) phase.run(p, item, scratch, workspace);
      own.trim(kKeptBytes);
    };
    const int64_t threads = phase.items > 1 ? int64_t(torch::stable::get_num_threads()) : 1;
    if (threads > 1)
      torch::stable::parallel_for(0, threads < phase.items ? threads : phase.items, 1, worker);
    else
      worker(0, 1);
  }
  shared.trim(kKeptBytes);
}

}  // namespace saccade
