// The engine runs one launch at a time, on the calling thread.
#pragma once

#include <string>
#include <vector>

#include "fiber.h"
#include "standin.h"

namespace standin {

struct Block;
struct Warp;

/// An asynchronous copy that has been issued but has not landed yet.
struct Copy {
    void* shared;
    const void* source;
    unsigned group, bytes;
};

struct Thread : ThreadContext {
    Block* owner;
    Warp* warp;
    void* sp;       // where it resumes
    unsigned rank;  // within the block
    unsigned id;    // within the launch
    bool done;
    // Valid while it waits in a collective:
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

/// The last accesses to four bytes of memory that are not yet ordered before all running threads.
struct Cell {
    struct LastAccess {
        uint32_t time, thread;
        uint8_t bytes, access;
    } accesses[4];
};

/// Shadow of a memory range: one state byte and one cell for every four bytes. The low half of a state marks
/// the initialised bytes, the high half the accessible bytes.
struct Shadow {
    const char* base;
    size_t size;
    uint8_t* state;
    Cell* cells;
};

struct Block {
    Dim3 index, size;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Thread*> ready;
    std::vector<unsigned> order;  // in which threads start
    unsigned started, live, at_barrier, vote, votes;
    int barrier_line;
    uint32_t ordered;                // time of the block's start or last barrier
    std::vector<char> dynamic;       // dynamic shared memory, with padding after it
    std::vector<char> saved_static;  // static shared memory while another block uses the segment
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
    Dim3 grid, block;
    unsigned shared;
    void** arguments;
    bool cooperative, checked;
    uint64_t seed;
};

/// State of the running launch, guarded by the driver's lock.
struct Engine {
    const Launch* launch;
    Thread* current;
    Block* resident;  // the block whose static shared memory is in the segment
    std::vector<Block*> active;
    std::vector<Block> pool;
    Stacks stacks;
    void* main;            // context of the caller
    void* finished_stack;  // stack of a finished fiber that is still in use
    char* segment;         // static shared memory of this host thread
    unsigned at_grid_barrier, live;
    uint32_t time;     // increases at every event that orders memory
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
unsigned ranks(const Dim3& size);

/// " (file:line)" of an address in a library's code, the innermost inlined function first; empty if unknown.
std::string source_of(const Loaded& loaded, const void* code);

/// Shadow memory (shadow.cpp).
void shadow_launch_start();
void shadow_block_start(Block& block);
void shadow_access(const void* at, size_t size, unsigned access, size_t alignment, const void* code);
/// Marks bytes of the running block's shared memory as unwritten.
void shadow_mark_unwritten(const void* at, size_t size);

}  // namespace standin
