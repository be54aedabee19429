#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__x86_64__)
asm(R"(
.text
.hidden standin_switch
.globl standin_switch
.type standin_switch, @function
standin_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size standin_switch, .-standin_switch
)");
#else
#error \
    "the stand-in driver switches contexts on x86-64 only; add this architecture's callee-saved registers here"
#endif

namespace standin {

// Lies at the far end of each stack, so that a stack overflow is reported instead of silently corrupting the
// neighbouring stack.
static constexpr uint64_t CANARY = 0x5e1f50b57acce55eull;

void* Stacks::start(void (*entry)()) {
    if (!base_) {
        void* at = mmap(nullptr, SIZE * MAX_COUNT, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) std::perror("stand-in driver: cannot reserve stacks"), std::abort();
        base_ = static_cast<char*>(at);
    }
    char* low;
    if (!free_.empty()) {
        low = free_.back();
        free_.pop_back();
    } else {
        if (used_ == MAX_COUNT)
            std::fprintf(stderr, "stand-in driver: too many concurrent threads\n"), std::abort();
        low = base_ + SIZE * used_++;
        *reinterpret_cast<uint64_t*>(low) = CANARY;
    }
    // Stacks that start at the same page offset compete for the same few cache sets, so spread them.
    size_t colour = (static_cast<size_t>(low - base_) / SIZE % 61) * 64;
    auto top = reinterpret_cast<void**>(low + SIZE - 64 - colour);
    *--top = nullptr;  // a return address for `entry`, so that its frame is aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    return top - 6;  // six registers with arbitrary values
}

void Stacks::release(void* sp) {
    size_t index = static_cast<size_t>(static_cast<char*>(sp) - base_) / SIZE;
    char* low = base_ + SIZE * index;
    if (*reinterpret_cast<uint64_t*>(low) != CANARY) {
        std::fprintf(stderr, "stand-in driver: a kernel used more than %zu bytes of stack\n", SIZE);
        std::abort();
    }
    free_.push_back(low);
}

void Stacks::reset() {
    free_.clear();
    for (size_t i = used_; i-- > 0;) free_.push_back(base_ + SIZE * i);
}

}  // namespace standin
