// The interface between kernels compiled for the host and the engine that runs them. Kernel code sees
// `context` and `runtime`; the engine sees `Library`. Everything else is private to one side.
#pragma once

#include <cstddef>
#include <cstdint>

namespace standin {

struct Dim3 {
    unsigned x, y, z;
};

/// The position of the running CUDA thread.
struct ThreadContext {
    Dim3 thread, block, block_dim, grid_dim;
    unsigned lane;
    void* shared;  // dynamic shared memory of the block
};

enum Access : unsigned { READ = 1, WRITE = 2, ATOMIC = 4 };

/// Completes a warp collective. It reads and writes the argument of each lane of `mask`.
using Complete = void (*)(void* const* lanes, unsigned mask);

/// The engine's functions for kernel code. The running thread makes all calls.
struct Runtime {
    /// Parks until every thread of the block has arrived at the same source line; returns the sum of `vote`.
    unsigned (*barrier)(int line, unsigned vote);
    /// Parks until every block of a cooperative launch has arrived.
    void (*grid_barrier)(int line);
    /// Parks until every lane of `mask` has arrived with the same `complete` and line; `complete` then runs
    /// once for all. `orders_memory` is set by __syncwarp, which orders memory, and not by shuffles, which do
    /// not.
    void (*collective)(unsigned mask, int line, Complete complete, void* argument, bool orders_memory);
    /// Issues an asynchronous copy of 8 or 16 bytes to shared memory (zeros if `source` is null); it lands in
    /// `copy_wait`.
    void (*copy_issue)(void* shared, const void* source, unsigned bytes);
    void (*copy_commit)();
    void (*copy_wait)(unsigned groups_left);
    /// Fails the launch with a message.
    [[noreturn]] void (*fail)(const char* what);
    /// Checks a memory access, in the instrumented build; `alignment` 0 requires none. `code` is the address
    /// of the access.
    void (*access)(const void* at, size_t size, unsigned access, size_t alignment, const void* code);
    /// Converts between a pointer to the block's shared memory and its address in the shared state space.
    unsigned (*shared_address)(const void* at);
    void* (*shared_pointer)(unsigned address);
};

/// One kernel.
struct Entry {
    struct Parameter {
        size_t offset, size;
    };
    const char* name;
    void (*call)(void** arguments);
    const Parameter* parameters;
    int count;
    int bounds;  // maximum number of threads per block
};

/// Exported by each kernel library under the name `standin_library`.
struct Library {
    ThreadContext** context;
    const Runtime** runtime;
    const Entry* entries;
    size_t count;
    void* (*allocate_tls)();  // accesses the calling thread's static shared memory, which allocates it
};

}  // namespace standin
