// The engine: runs one launch at a time, on the calling thread.
#pragma once

#include <string>
#include <vector>

#include "fiber.h"
#include "standin.h"

namespace standin {

struct Block;
struct Warp;

/// An asynchronous copy that has been issued and not yet landed.
struct Copy {
    void* shared;
    const void* source;
    unsigned group, bytes;
};

struct Thread : Place {
    Block* of;
    Warp* warp;
    void* sp;       // where it continues
    unsigned rank;  // within the block
    unsigned id;    // within the launch
    bool done;
    // While it waits in a collective:
    unsigned mask;
    int line;
    Complete complete;
    void* argument;
    std::vector<Copy> copies;
    unsigned group;  // open group of asynchronous copies
};

struct Warp {
    Thread* lanes[32];
    unsigned lanes_present;
    unsigned waiting;  // lanes parked in a collective
    uint32_t ordered;  // time of the last __syncwarp
};

/// What is known of four bytes of memory: who touched them since what is ordered before everything that runs
/// now.
struct Cell {
    struct Touch {
        uint32_t time, thread;
        uint8_t bytes, access;
    } touches[4];
};

/// Shadow of a range of memory; one state byte and one cell for each four bytes. The low half of a state says
/// which bytes are initialised, the high half which may be touched at all.
struct Shadow {
    const char* base;
    size_t size;
    uint8_t* state;
    Cell* cells;
};

struct Block {
    Index index, size;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Thread*> ready;
    std::vector<unsigned> order;  // in which threads start
    unsigned started, live, at_barrier, vote, votes;
    int barrier_line;
    uint32_t ordered;                // time of the block's start or last barrier
    std::vector<char> dynamic;       // dynamic shared memory, with room behind it
    std::vector<char> kept;          // static shared memory while another block uses the segment
    std::vector<uint8_t> states[2];  // shadow of static and of dynamic shared memory
    std::vector<Cell> cells[2];
};

/// A loaded kernel library.
struct Loaded {
    const Library* library;
    size_t tls_module, tls_size;
    const char *image, *image_end;
    int file;  // the shared object
};

struct Launch {
    const Loaded* loaded;
    const Entry* entry;
    Index grid, block;
    unsigned shared;
    void** arguments;
    bool cooperative, checked;
    uint64_t seed;
};

/// Everything that runs; one launch at a time, guarded by the driver's lock.
struct Engine {
    const Launch* launch;
    Thread* current;
    Block* resident;  // whose static shared memory is in the segment
    std::vector<Block*> alive;
    std::vector<Block> pool;
    Stacks stacks;
    void* main;     // context of the caller
    void* spent;    // stack of a fiber that has ended and is still stood on
    char* segment;  // static shared memory of this host thread
    unsigned at_grid_barrier, live;
    uint32_t time;     // grows at every event that orders memory
    uint32_t ordered;  // time of the launch's start or last grid barrier
    uint64_t random;
    std::string error;

    uint64_t next_random() {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        return random;
    }
};
extern Engine engine;

[[noreturn]] void fail(const std::string& what);
/// "kernel `x`, block (0, 0, 0), thread (3, 0, 0)" of a thread.
std::string name_of(const Thread& thread);
unsigned ranks(const Index& size);

/// " (file:line)" of an address in a library's code, the innermost of inlined functions first; empty if
/// unknown.
std::string source_of(const Loaded& loaded, const void* code);

/// Shadow memory (shadow.cpp).
void shadow_launch_start();
void shadow_block_start(Block& block);
void shadow_access(const void* at, size_t size, unsigned access, size_t alignment, const void* code);
/// Bytes of the running block's shared memory count as not written.
void shadow_unwritten(const void* at, size_t size);

}  // namespace standin
