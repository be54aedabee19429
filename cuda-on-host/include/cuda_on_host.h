// CUDA's names for the host compiler. `kernels/*.cu` are compiled with this file in place of CUDA's headers.
// It defines only what the kernels use; a missing name is a compile error, so add it then.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "standin.h"

#if defined(__SANITIZE_THREAD__)
#define STANDIN_CHECKED 1
// The implementation's own accesses are not the kernel's, so they are not instrumented.
#define STANDIN_INTERNAL __attribute__((no_sanitize("thread"), noinline))
#else
#define STANDIN_CHECKED 0
#define STANDIN_INTERNAL __attribute__((always_inline))
#endif

namespace standin {
inline __attribute__((visibility("hidden"))) ThreadContext* context;
inline __attribute__((visibility("hidden"))) const Runtime* runtime;

STANDIN_INTERNAL inline Dim3 thread_index() { return context->thread; }
STANDIN_INTERNAL inline Dim3 block_index() { return context->block; }
STANDIN_INTERNAL inline Dim3 block_size() { return context->block_dim; }
STANDIN_INTERNAL inline Dim3 grid_size() { return context->grid_dim; }
STANDIN_INTERNAL inline unsigned lane() { return context->lane; }
STANDIN_INTERNAL inline void* dynamic_shared() { return context->shared; }

/// Keeps the compiler from caching memory in registers across a point where other threads run.
inline void memory_clobber() { asm volatile("" ::: "memory"); }

STANDIN_INTERNAL inline unsigned barrier(int line, unsigned vote) {
    memory_clobber();
    unsigned votes = runtime->barrier(line, vote);
    memory_clobber();
    return votes;
}

STANDIN_INTERNAL inline void collective(unsigned mask, int line, Complete complete, void* argument,
                                        bool orders) {
    memory_clobber();
    runtime->collective(mask, line, complete, argument, orders);
    memory_clobber();
}

STANDIN_INTERNAL inline void grid_barrier(int line) {
    memory_clobber();
    runtime->grid_barrier(line);
    memory_clobber();
}

[[noreturn]] STANDIN_INTERNAL inline void fail(const char* what) { runtime->fail(what); }
}  // namespace standin

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __shared__ static thread_local
#define __constant__ static const
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

#define threadIdx (standin::thread_index())
#define blockIdx (standin::block_index())
#define blockDim (standin::block_size())
#define gridDim (standin::grid_size())
constexpr int warpSize = 32;
using dim3 = standin::Dim3;

// Vector types.

#define STANDIN_VECTORS(type, name, bytes)                                                      \
    struct alignas(bytes < 8 ? bytes : 2 * sizeof(type)) name##2 { type x, y; };                \
    struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; }; \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
STANDIN_VECTORS(float, float, 8)
STANDIN_VECTORS(int, int, 8)
STANDIN_VECTORS(unsigned, uint, 8)
STANDIN_VECTORS(unsigned char, uchar, 2)
STANDIN_VECTORS(double, double, 16)
#undef STANDIN_VECTORS

/// bfloat16: the upper half of a float, rounded to nearest even; a NaN becomes 0x7fff, as on the device.
struct __nv_bfloat16 {
    uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16(float x) {
    uint32_t u = std::bit_cast<uint32_t>(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __float2bfloat16(x); }
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16(x), __float2bfloat16(y)};
}
inline float __bfloat162float(__nv_bfloat16 x) {
    return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

// Arithmetic. Approximate functions are exact here, so no kernel may rely on their error.

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
// The compiler must not contract the _rn forms into a fused multiply-add.
__attribute__((optimize("fp-contract=off"), noinline)) inline float __fmul_rn(float x, float y) {
    return x * y;
}
__attribute__((optimize("fp-contract=off"), noinline)) inline float __fadd_rn(float x, float y) {
    return x + y;
}
__attribute__((optimize("fp-contract=off"), noinline)) inline double __dmul_rn(double x, double y) {
    return x * y;
}
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(uint64_t{x} * y >> 32); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <typename A, typename B>
constexpr auto min(A a, B b) -> std::common_type_t<A, B> {
    using C = std::common_type_t<A, B>;
    return static_cast<C>(b) < static_cast<C>(a) ? static_cast<C>(b) : static_cast<C>(a);
}
template <typename A, typename B>
constexpr auto max(A a, B b) -> std::common_type_t<A, B> {
    using C = std::common_type_t<A, B>;
    return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(b) : static_cast<C>(a);
}
template <typename T>
T __ldg(const T* at) {
    return *at;
}
template <typename T>
T __ldcs(const T* at) {
    return *at;
}
template <typename T>
void __stcs(T* at, T value) {
    *at = value;
}

// Block and warp. The default argument is the line of the call, which identifies a divergent barrier in
// reports.

inline void __syncthreads(int line = __builtin_LINE()) { standin::barrier(line, 0); }
inline int __syncthreads_count(int vote, int line = __builtin_LINE()) {
    return static_cast<int>(standin::barrier(line, vote != 0));
}
inline int __syncthreads_or(int vote, int line = __builtin_LINE()) {
    return __syncthreads_count(vote, line) != 0;
}
inline int __syncthreads_and(int vote, int line = __builtin_LINE()) {
    return __syncthreads_count(!vote, line) == 0;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { standin::fail("trap"); }

STANDIN_INTERNAL inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
    standin::collective(mask, line, [](void* const*, unsigned) {}, nullptr, true);
}

namespace standin {
template <typename T>
struct Shuffle {
    T value, result;
    int source;  // lane; from a lane outside the mask the value is undefined, here NaN
};

template <typename T>
STANDIN_INTERNAL inline void complete_shuffle(void* const* lanes, unsigned mask) {
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        auto* lane = static_cast<Shuffle<T>*>(lanes[i]);
        if (mask >> lane->source & 1) lane->result = static_cast<Shuffle<T>*>(lanes[lane->source])->value;
        else std::memset(&lane->result, 0xff, sizeof(T));
    }
}

template <typename T>
STANDIN_INTERNAL inline T shuffle(unsigned mask, T value, int source, int line) {
    Shuffle<T> argument{value, value, source};
    collective(mask, line, complete_shuffle<T>, &argument, false);
    return argument.result;
}

struct Vote {
    unsigned mine, all;
};

STANDIN_INTERNAL inline void complete_vote(void* const* lanes, unsigned mask) {
    unsigned all = 0;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1 && static_cast<Vote*>(lanes[i])->mine) all |= 1u << i;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) static_cast<Vote*>(lanes[i])->all = all;
}
}  // namespace standin

/// `width` lanes form a group; what falls outside a lane's group is the lane's own value.
template <typename T>
STANDIN_INTERNAL inline T __shfl_sync(unsigned mask, T v, int from, int width = 32,
                                      int line = __builtin_LINE()) {
    int lane = static_cast<int>(standin::lane());
    return standin::shuffle(mask, v, (lane & ~(width - 1)) + (from & (width - 1)), line);
}
template <typename T>
STANDIN_INTERNAL inline T __shfl_xor_sync(unsigned mask, T v, int with, int width = 32,
                                          int line = __builtin_LINE()) {
    int lane = static_cast<int>(standin::lane()), from = lane ^ with;
    return standin::shuffle(mask, v, from >= (lane & ~(width - 1)) + width ? lane : from, line);
}
template <typename T>
STANDIN_INTERNAL inline T __shfl_down_sync(unsigned mask, T v, int by, int width = 32,
                                           int line = __builtin_LINE()) {
    int lane = static_cast<int>(standin::lane()), from = lane + by;
    return standin::shuffle(mask, v, from >= (lane & ~(width - 1)) + width ? lane : from, line);
}
template <typename T>
STANDIN_INTERNAL inline T __shfl_up_sync(unsigned mask, T v, int by, int width = 32,
                                         int line = __builtin_LINE()) {
    int lane = static_cast<int>(standin::lane()), from = lane - by;
    return standin::shuffle(mask, v, from < (lane & ~(width - 1)) ? lane : from, line);
}
STANDIN_INTERNAL inline unsigned __ballot_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
    standin::Vote argument{vote != 0, 0};
    standin::collective(mask, line, standin::complete_vote, &argument, false);
    return argument.all;
}
STANDIN_INTERNAL inline int __any_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
    return __ballot_sync(mask, vote, line) != 0;
}
STANDIN_INTERNAL inline int __all_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
    return __ballot_sync(mask, !vote, line) == 0;
}

// Atomics. Threads of a launch never run in parallel, so a plain update is atomic, but the shadow memory must
// know.

namespace standin {
template <typename T, typename F>
STANDIN_INTERNAL inline T update(T* at, F next) {
#if STANDIN_CHECKED
    runtime->access(at, sizeof(T), ATOMIC | WRITE, sizeof(T), __builtin_return_address(0));
#endif
    T old = *at;
    *at = next(old);
    memory_clobber();
    return old;
}
}  // namespace standin

#define STANDIN_ATOMIC(name, expression)                                    \
    template <typename T>                                                   \
    STANDIN_INTERNAL inline T name(T* at, std::type_identity_t<T> v) {      \
        return standin::update(at, [v](T old) -> T { return expression; }); \
    }
STANDIN_ATOMIC(atomicAdd, old + v)
STANDIN_ATOMIC(atomicMax, old < v ? v : old)
STANDIN_ATOMIC(atomicMin, v < old ? v : old)
STANDIN_ATOMIC(atomicExch, v)
STANDIN_ATOMIC(atomicOr, old | v)
#undef STANDIN_ATOMIC
template <typename T>
STANDIN_INTERNAL inline T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
    return standin::update(at, [=](T old) { return old == expected ? v : old; });
}
