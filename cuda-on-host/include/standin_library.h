// Follows each `.cu` file in its kernel library: the table of its kernels and, in the instrumented build, the
// callbacks that the compiler inserts before every access.
#pragma once

#include <utility>

#include "cuda_on_host.h"

namespace standin {

/// Calls a kernel with a launch's array of pointers to arguments, and computes the offset of each argument in
/// the device's parameter block: in order, each at a multiple of its size.
template <auto KERNEL_FUNCTION>
struct Call;

template <typename... A, void (*F)(A...)>
struct Call<F> {
    static constexpr int COUNT = sizeof...(A);

    template <size_t... I>
    STANDIN_INTERNAL static void with(void** arguments, std::index_sequence<I...>) {
        F(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
    }
    STANDIN_INTERNAL static void with_all(void** arguments) {
        with(arguments, std::index_sequence_for<A...>{});
    }
    static void call(void** arguments) { with_all(arguments); }

    struct Table {
        Entry::Parameter of[COUNT + 1];
    };
    static constexpr Table table() {
        Table t{};
        size_t sizes[] = {sizeof(A)..., 1}, end = 0;
        for (int i = 0; i < COUNT; i++) {
            end = (end + sizes[i] - 1) / sizes[i] * sizes[i];
            t.of[i] = {end, sizes[i]};
            end += sizes[i];
        }
        return t;
    }
    static constexpr Table TABLE = table();
};

template <auto KERNEL_FUNCTION>
constexpr Entry entry(const char* name, int bounds) {
    using C = Call<KERNEL_FUNCTION>;
    return {name, C::call, C::TABLE.of, C::COUNT, bounds};
}

/// A marker in the segment of static shared memory, for finding the segment.
inline thread_local char tls_marker;
}  // namespace standin

#if STANDIN_CHECKED
extern "C" {
#define STANDIN_CODE __builtin_return_address(0)
#define STANDIN_HIDDEN __attribute__((visibility("hidden"), no_sanitize("thread")))
STANDIN_HIDDEN void __tsan_init() {}
STANDIN_HIDDEN void __tsan_func_entry(void*) {}
STANDIN_HIDDEN void __tsan_func_exit() {}
#define STANDIN_ACCESS(size)                                                    \
    STANDIN_HIDDEN void __tsan_read##size(void* at) {                           \
        standin::runtime->access(at, size, standin::READ, size, STANDIN_CODE);  \
    }                                                                           \
    STANDIN_HIDDEN void __tsan_write##size(void* at) {                          \
        standin::runtime->access(at, size, standin::WRITE, size, STANDIN_CODE); \
    }                                                                           \
    STANDIN_HIDDEN void __tsan_unaligned_read##size(void* at) {                 \
        standin::runtime->access(at, size, standin::READ, 0, STANDIN_CODE);     \
    }                                                                           \
    STANDIN_HIDDEN void __tsan_unaligned_write##size(void* at) {                \
        standin::runtime->access(at, size, standin::WRITE, 0, STANDIN_CODE);    \
    }
STANDIN_ACCESS(1)
STANDIN_ACCESS(2)
STANDIN_ACCESS(4)
STANDIN_ACCESS(8)
STANDIN_ACCESS(16)
STANDIN_HIDDEN void __tsan_read_range(void* at, size_t size) {
    standin::runtime->access(at, size, standin::READ, 0, STANDIN_CODE);
}
STANDIN_HIDDEN void __tsan_write_range(void* at, size_t size) {
    standin::runtime->access(at, size, standin::WRITE, 0, STANDIN_CODE);
}
}
#endif

#define STANDIN_LIBRARY(entries)                                                              \
    static void* allocate_tls() { return &standin::tls_marker; }                              \
    extern "C" __attribute__((visibility("default"))) const standin::Library standin_library; \
    const standin::Library standin_library = {&standin::context, &standin::runtime, entries,  \
                                              sizeof(entries) / sizeof(entries[0]), allocate_tls};
