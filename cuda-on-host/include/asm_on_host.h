// Host implementations of inline PTX, which `source.rs` translates into calls of these functions. Operands are as
// in the instruction: shared addresses are numbers, global ones pointers or numbers.
#pragma once

#include "ptx_on_host.h"

STANDIN_INTERNAL inline size_t __cvta_generic_to_shared(const void* at) {
    return standin::runtime->shared_address(at);
}
STANDIN_INTERNAL inline void* __cvta_shared_to_generic(size_t address) {
    return standin::runtime->shared_pointer(static_cast<unsigned>(address));
}
inline size_t __cvta_generic_to_global(const void* at) { return reinterpret_cast<size_t>(at); }

namespace standin::ptx {

template <typename T>
const void* global(T at) {
    if constexpr (std::is_pointer_v<T>) return at;
    else return reinterpret_cast<const void*>(static_cast<size_t>(at));
}

STANDIN_INTERNAL inline void* shared(unsigned address) { return runtime->shared_pointer(address); }

/// cp.async: the bytes after the first `used` are zeros. Hardware copies 4, 8 or 16 bytes.
template <typename T>
STANDIN_INTERNAL void cp_async(unsigned to, T from, unsigned bytes, unsigned used) {
    if (used && used < bytes) fail("cp.async with a source shorter than the copy, which the host does not know");
    runtime->copy_issue(shared(to), used ? global(from) : nullptr, bytes);
    memory_clobber();
}
STANDIN_INTERNAL inline void cp_async_commit() { runtime->copy_commit(); }
STANDIN_INTERNAL inline void cp_async_wait(unsigned groups_left) {
    memory_clobber();
    runtime->copy_wait(groups_left);
    memory_clobber();
}
/// All copies, those of the open group too.
STANDIN_INTERNAL inline void cp_async_wait_all() {
    runtime->copy_commit();
    cp_async_wait(0);
}

template <int COUNT, bool TRANSPOSED, typename... R>
STANDIN_INTERNAL void load_matrices(int line, unsigned row, R&... r) {
    unsigned found[COUNT] = {};
    standin::ldmatrix<COUNT, TRANSPOSED>(found, shared(row), line);
    int i = 0;
    ((r = static_cast<R>(found[i++])), ...);
}

template <typename D, typename A, typename C>
STANDIN_INTERNAL void mma(Complete complete, int line, D& d0, D& d1, D& d2, D& d3, A a0, A a1, A a2, A a3, A b0,
                          A b1, C c0, C c1, C c2, C c3) {
    float d[4] = {c0, c1, c2, c3};
    unsigned a[4] = {static_cast<unsigned>(a0), static_cast<unsigned>(a1), static_cast<unsigned>(a2),
                     static_cast<unsigned>(a3)};
    unsigned b[2] = {static_cast<unsigned>(b0), static_cast<unsigned>(b1)};
    standin::mma(complete, d, a, b, line);
    d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}

}  // namespace standin::ptx

// What a mutant puts in the place of an atomic.
#define STANDIN_PLAIN(name, expression)                       \
    template <typename T>                                     \
    inline T standin_plain_##name(T* at, std::type_identity_t<T> v) { \
        T old = *at;                                          \
        *at = expression;                                     \
        return old;                                           \
    }
STANDIN_PLAIN(add, old + v)
STANDIN_PLAIN(max, old < v ? v : old)
STANDIN_PLAIN(min, v < old ? v : old)
STANDIN_PLAIN(exch, v)
STANDIN_PLAIN(or, old | v)
#undef STANDIN_PLAIN
