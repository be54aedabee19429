// The seam between kernels compiled for the host and the engine that runs them. Kernel code sees `here` and
// `runtime`; the engine sees `Library`. Everything else is private to one side.
#pragma once

#include <cstddef>
#include <cstdint>

namespace standin {

struct Index {
    unsigned x, y, z;
};

/// What the running CUDA thread sees of where it is.
struct Place {
    Index thread, block, block_dim, grid_dim;
    unsigned lane;
    void* shared;  // dynamic shared memory of the block
};

enum Access : unsigned { READ = 1, WRITE = 2, ATOMIC = 4 };

/// What `complete` of a warp collective gets: the argument of each lane of `mask`, which it reads and writes.
using Complete = void (*)(void* const* lanes, unsigned mask);

/// What kernel code may ask of the engine. All calls are made by the running thread.
struct Runtime {
    /// Parks until every thread of the block is here, at the same source line; sums `vote` over them.
    unsigned (*barrier)(int line, unsigned vote);
    /// Parks until every block of a cooperative launch is here.
    void (*grid_barrier)(int line);
    /// Parks until every lane of `mask` is here with the same `complete` and line, which then runs once for
    /// all. `orders_memory` is what __syncwarp promises and shuffles do not.
    void (*collective)(unsigned mask, int line, Complete complete, void* argument, bool orders_memory);
    /// Asynchronous copy of 8 or 16 bytes to shared memory (zeros without `source`); lands in `copy_wait`.
    void (*copy_issue)(void* shared, const void* source, unsigned bytes);
    void (*copy_commit)();
    void (*copy_wait)(unsigned groups_left);
    /// Ends the launch with a message.
    [[noreturn]] void (*fail)(const char* what);
    /// An access to memory, in the instrumented build; `alignment` 0 asks for none. `code` is where it is
    /// made.
    void (*access)(const void* at, size_t size, unsigned access, size_t alignment, const void* code);
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
    int bounds;  // most threads a block may have
};

/// What a kernel library exports under the name `standin_library`.
struct Library {
    Place** here;
    const Runtime** runtime;
    const Entry* entries;
    size_t count;
    void* (*own_memory)();  // touches the calling thread's static shared memory so that it exists
};

}  // namespace standin
