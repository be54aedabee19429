// Fibers: a stack and a saved stack pointer. A switch saves only the registers that are callee-saved in the
// System V ABI.
#pragma once

#include <cstddef>
#include <vector>

namespace standin {

/// Saves the running context in `*from` and resumes the one saved in `to`.
extern "C" __attribute__((visibility("hidden"))) void standin_switch(void** from, void* to);

/// A pool of stacks of one size in one reserved range. The system commits pages on first use.
class Stacks {
  public:
    static constexpr size_t SIZE = 64 << 10;
    static constexpr size_t MAX_COUNT = 1 << 17;

    /// Returns a context that calls `entry` when first resumed; `entry` must not return.
    void* start(void (*entry)());
    /// Returns the stack that contains `sp` to the pool.
    void release(void* sp);
    /// Returns all stacks to the pool, whatever runs on them.
    void reset();
    bool holds(const void* at) const { return at >= base_ && at < base_ + SIZE * MAX_COUNT; }

  private:
    char* base_ = nullptr;
    size_t used_ = 0;
    std::vector<char*> free_;
};

}  // namespace standin
