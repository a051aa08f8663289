// Memory of large results on the CPU that is used again. malloc gives blocks of 32 MB and more back to the
// system as they are freed, and the next one costs a page fault and a page of zeros for each of its pages.
// Here they are kept, marked as what the system may take as soon as it wants memory (MADV_FREE): nobody runs
// short of memory for them, and what was not taken is there again without a fault.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <mutex>
#include <vector>
#endif

namespace saccade {

constexpr size_t kLargePage = size_t(2) << 20;

// Asks for large pages where memory is fresh and about to be written whole: Linux hands them out on request
// only, unless told otherwise, and faults of 4 KB cost several times what the writing does. Only a hint.
inline void prefer_large_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (at + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (at + bytes) / kLargePage * kLargePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

#if defined(__linux__) && defined(MADV_FREE)

class LargeBlocks {
 public:
  static constexpr size_t kLeast = size_t(32) << 20;  // what malloc (glibc) never keeps

  // Of the whole process; never destroyed, since tensors may outlive everything.
  static LargeBlocks& all() {
    static LargeBlocks* const blocks = new LargeBlocks;
    return *blocks;
  }
  bool serves(size_t bytes) const { return bytes >= kLeast && limit_ > 0; }

  // At least `size` bytes; `size` becomes how many. Null where the system has none.
  void* take(size_t& size) {
    size = (size + kLargePage - 1) / kLargePage * kLargePage;
    if (void* found = kept(size)) return found;
    void* fresh = map(size);
    if (!fresh) {
      drop_to(0);
      fresh = map(size);
    }
    return fresh;
  }
  void give_back(void* at, size_t size) {
    const bool marked = size <= limit_ && madvise(at, size, MADV_FREE) == 0;
    // Nobody waits for the lock: one that was held when the process forked would be held for ever.
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || !marked) {
      munmap(at, size);
      return;
    }
    blocks_.push_back({at, size});
    bytes_ += size;
    unmap_oldest(limit_);
  }

 private:
  struct Block {
    void* at;
    size_t size;
  };

  LargeBlocks() {
    const char* asked = std::getenv("SACCADE_KEEP_MEMORY");
    const long pages = sysconf(_SC_PHYS_PAGES), bytes = sysconf(_SC_PAGESIZE);
    rlimit space{};  // of addresses, where the system cannot take anything
    const bool scarce = getrlimit(RLIMIT_AS, &space) == 0 && space.rlim_cur != RLIM_INFINITY;
    if (pages > 0 && bytes > 0 && !scarce && !(asked && std::strcmp(asked, "0") == 0))
      limit_ = size_t(pages) / 8 * size_t(bytes);
  }

  // The smallest block kept that is large enough, and not by more than a quarter; of equals the last one
  // freed, of which most is there.
  void* kept(size_t& size) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    size_t best = blocks_.size();
    for (size_t i = 0; i < blocks_.size(); ++i)
      if (blocks_[i].size >= size && blocks_[i].size <= size + size / 4 &&
          (best == blocks_.size() || blocks_[i].size <= blocks_[best].size))
        best = i;
    if (best == blocks_.size()) return nullptr;
    const Block found = blocks_[best];
    blocks_.erase(blocks_.begin() + std::ptrdiff_t(best));
    bytes_ -= found.size;
    size = found.size;
    return found.at;
  }
  static void* map(size_t size) {
    const size_t all = size + kLargePage;
    void* const memory = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    char* const begin = static_cast<char*>(memory);
    const size_t before = (kLargePage - reinterpret_cast<uintptr_t>(begin) % kLargePage) % kLargePage;
    if (before) munmap(begin, before);
    munmap(begin + before + size, all - before - size);
    prefer_large_pages(begin + before, size);
    return begin + before;
  }
  void drop_to(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock) unmap_oldest(bytes);
  }
  void unmap_oldest(size_t bytes) {
    while (bytes_ > bytes) {
      munmap(blocks_.front().at, blocks_.front().size);
      bytes_ -= blocks_.front().size;
      blocks_.erase(blocks_.begin());
    }
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;  // the oldest first
  size_t bytes_ = 0, limit_ = 0;
};

#else

// Elsewhere such memory is the allocator's affair.
class LargeBlocks {
 public:
  static LargeBlocks& all() {
    static LargeBlocks none;
    return none;
  }
  bool serves(size_t) const { return false; }
  void* take(size_t&) { return nullptr; }
  void give_back(void*, size_t) {}
};

#endif

}  // namespace saccade
