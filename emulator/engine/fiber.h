// Fibers: a stack and a saved stack pointer. A switch saves what the System V ABI says a callee keeps, and no
// more.
#pragma once

#include <cstddef>
#include <vector>

namespace standin {

/// Saves the running context in `*from` and continues the one saved in `to`.
extern "C" __attribute__((visibility("hidden"))) void standin_switch(void** from, void* to);

/// Stacks of one size in one reserved range, handed out again and again. The system gives pages as they are
/// touched.
class Stacks {
  public:
    static constexpr size_t SIZE = 64 << 10;
    static constexpr size_t MOST = 1 << 17;

    /// A context that calls `entry` when first switched to; `entry` must not return.
    void* start(void (*entry)());
    /// Takes back the stack that holds `sp`.
    void give_back(void* sp);
    /// All stacks are free again, whatever stands on them.
    void reset();
    bool holds(const void* at) const { return at >= base_ && at < base_ + SIZE * MOST; }

  private:
    char* base_ = nullptr;
    size_t used_ = 0;
    std::vector<char*> free_;
};

}  // namespace standin
