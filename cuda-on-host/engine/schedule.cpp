// The scheduler. A fiber runs threads one after another until one parks; that thread keeps the stack, and
// another fiber continues with the rest. Threads that never park cost no context switch. The next thread is
// drawn at random from the seed.
#include "engine.h"

#include <pthread.h>
#include <signal.h>

#include <cstring>

extern "C" void* __tls_get_addr(size_t*);

namespace standin {

Engine engine;

unsigned ranks(const Dim3& size) { return size.x * size.y * size.z; }

static Dim3 unrank(unsigned rank, const Dim3& size) {
    return {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
}

std::string name_of(const Thread& t) {
    char text[256];
    std::snprintf(text, sizeof text, "kernel `%s`, block (%u, %u, %u), thread (%u, %u, %u)",
                  engine.launch->entry->name, t.block.x, t.block.y, t.block.z, t.thread.x, t.thread.y,
                  t.thread.z);
    return text;
}

/// Abandons the launch: parked fibers are dropped.
static void abandon_launch() {
    void* nowhere;
    standin_switch(&nowhere, engine.main);
    __builtin_unreachable();
}

void fail(const std::string& what) {
    engine.error = name_of(*engine.current) + ": " + what;
    abandon_launch();
    __builtin_unreachable();
}

static pthread_t host_thread;
static struct sigaction previous_action;

/// Turns an access to unmapped memory or a misaligned vector access of a plain kernel into an error instead
/// of a crash.
static void on_fault(int signal, siginfo_t* info, void*) {
    if (engine.current && pthread_equal(host_thread, pthread_self())) {
        char text[120];
        // A misaligned vector access reports no address.
        std::snprintf(text, sizeof text, "accesses unmapped device memory, or is misaligned (address %p)",
                      info->si_addr);
        fail(text);
    }
    sigaction(signal, &previous_action,
              nullptr);  // not a kernel's: the access is retried under the previous handler
}

/// Catches faults during its lifetime.
struct FaultHandler {
    FaultHandler() {
        host_thread = pthread_self();
        struct sigaction action{};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;  // `fail` does not return from the handler
        sigaction(SIGSEGV, &action, &previous_action);
    }
    ~FaultHandler() {
        engine.current = nullptr;
        sigaction(SIGSEGV, &previous_action, nullptr);
    }
};

static void set_current(Thread* t) {
    engine.current = t;
    *engine.launch->loaded->library->context = t;
}

/// Swaps the static shared memory of `block` into the segment.
static void make_resident(Block* block) {
    if (engine.resident == block) return;
    size_t size = engine.launch->loaded->tls_size;
    if (engine.resident) std::memcpy(engine.resident->saved_static.data(), engine.segment, size);
    std::memcpy(engine.segment, block->saved_static.data(), size);
    engine.resident = block;
}

static bool has_work(const Block& b) { return !b.ready.empty() || b.started < b.order.size(); }

static void run_threads();

/// Reports why no thread can run.
static void deadlock() {
    for (Block* b : engine.active)
        for (Thread& t : b->threads)
            if (!t.done) {
                engine.current = &t;
                if (b->at_barrier)
                    fail("deadlock: some threads wait at the barrier in line " +
                         std::to_string(b->barrier_line) +
                         ", which the others never reach: divergent barrier");
                if (engine.at_grid_barrier)
                    fail("deadlock: some threads wait at a grid-wide barrier that the others never reach");
                fail("deadlock: lanes wait in the warp collective in line " + std::to_string(t.line) +
                     " for lanes that never arrive");
            }
    abandon_launch();
}

/// Resumes a thread that can run, or the caller if all are done. The running context is saved in `from`.
static void run_another(void** from) {
    Block* b = engine.resident;
    if (!has_work(*b)) {
        b = nullptr;
        size_t n = engine.active.size(), first = n > 1 ? engine.next_random() % n : 0;
        for (size_t i = 0; i < n && !b; i++) {
            Block* other = engine.active[(first + i) % n];
            if (has_work(*other)) b = other;
        }
        if (!b) {
            if (engine.live) deadlock();
            return standin_switch(from, engine.main);
        }
        make_resident(b);
    }
    bool start = b->started < b->order.size();
    if (start && !b->ready.empty()) start = engine.next_random() & 1;
    if (start) return standin_switch(from, engine.stacks.start(run_threads));
    size_t i = engine.next_random() % b->ready.size();
    Thread* t = b->ready[i];
    b->ready[i] = b->ready.back();
    b->ready.pop_back();
    set_current(t);
    standin_switch(from, t->sp);
}

/// Returns the stack of a finished fiber to the pool, now that it is no longer in use.
static void release_finished_stack() {
    if (engine.finished_stack) engine.stacks.release(engine.finished_stack), engine.finished_stack = nullptr;
}

static void park() {
    Thread* t = engine.current;
    run_another(&t->sp);
    release_finished_stack();
}

static void thread_ends(Thread& t) {
    t.done = true;
    Block& b = *t.owner;
    b.live--;
    engine.live--;
    if (!t.copies.empty()) fail("returns with asynchronous copies that were never waited for");
    if (b.at_barrier)
        fail("returns while other threads wait at the barrier in line " + std::to_string(b.barrier_line) +
             ": divergent barrier");
}

/// The body of a fiber: runs threads of the resident block until all have started.
static void run_threads() {
    release_finished_stack();
    Block* b = engine.resident;
    while (b->started < b->order.size()) {
        Thread& t = b->threads[b->order[b->started++]];
        set_current(&t);
        engine.launch->entry->call(engine.launch->arguments);
        thread_ends(t);
        b = engine.resident;
        // Occasionally resume parked threads first, or threads would always pass a barrier in starting order.
        if (!b->ready.empty() && (engine.next_random() & 3) == 0) break;
    }
    void* end;
    engine.finished_stack = __builtin_frame_address(0);
    run_another(&end);
    __builtin_unreachable();
}

static unsigned barrier(int line, unsigned vote) {
    Thread& t = *engine.current;
    Block& b = *t.owner;
    if (b.at_barrier && b.barrier_line != line)
        fail("waits at the barrier in line " + std::to_string(line) + " while others wait in line " +
             std::to_string(b.barrier_line) + ": divergent barrier");
    if (b.live != b.threads.size())
        fail("waits at the barrier in line " + std::to_string(line) +
             ", but other threads of the block have returned: divergent barrier");
    b.barrier_line = line;
    b.vote += vote;
    if (++b.at_barrier < b.live) {
        park();
    } else {
        b.votes = b.vote;
        b.at_barrier = b.vote = 0;
        b.ordered = ++engine.time;
        for (Thread& other : b.threads)
            if (&other != &t) b.ready.push_back(&other);
    }
    return b.votes;
}

static void grid_barrier(int line) {
    if (!engine.launch->cooperative) fail("uses a grid-wide barrier in a launch that is not cooperative");
    Thread& t = *engine.current;
    t.line = line;
    if (++engine.at_grid_barrier < engine.live) return park();
    engine.at_grid_barrier = 0;
    engine.ordered = ++engine.time;
    for (Block* b : engine.active)
        for (Thread& other : b->threads)
            if (!other.done && &other != &t) b->ready.push_back(&other);
}

static void collective(unsigned mask, int line, Complete complete, void* argument, bool orders) {
    Thread& t = *engine.current;
    Warp& w = *t.warp;
    mask &= w.lanes_present;
    if (!(mask >> t.lane & 1)) fail("calls a warp collective whose mask excludes it");
    t.mask = mask, t.line = line, t.complete = complete, t.argument = argument;
    w.waiting |= 1u << t.lane;
    if ((w.waiting & mask) != mask) return park();
    void* arguments[32];
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        const Thread& other = *w.lanes[lane];
        if (other.mask != mask || other.complete != complete || other.line != line)
            fail("is in the warp collective in line " + std::to_string(line) + " while lane " +
                 std::to_string(lane) + " is in a different one in line " + std::to_string(other.line));
        arguments[lane] = other.argument;
    }
    w.waiting &= ~mask;
    complete(arguments, mask);
    if (orders) w.ordered = ++engine.time;
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1 && lane != t.lane) t.owner->ready.push_back(w.lanes[lane]);
}

static void copy_issue(void* shared, const void* source, unsigned bytes) {
    Thread& t = *engine.current;
    if (engine.launch->checked) {
        // The hardware may write at once, so a thread that still reads the destination races with it.
        shadow_access(shared, bytes, WRITE, bytes, nullptr);
        shadow_mark_unwritten(shared, bytes);
        if (source) shadow_access(source, bytes, READ, bytes, nullptr);
    } else if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(source)) % bytes) {
        fail("makes an asynchronous copy from or to an address that is not a multiple of its size");
    }
    std::memset(shared, 0xff, bytes);  // until the copy lands, the destination reads as NaN
    t.copies.push_back({shared, source, t.group, bytes});
}

static void copy_commit() { engine.current->group++; }

static void copy_wait(unsigned groups_left) {
    Thread& t = *engine.current;
    size_t landed = 0;
    for (; landed < t.copies.size(); landed++) {
        const Copy& c = t.copies[landed];
        if (c.group + groups_left >= t.group) break;
        if (engine.launch->checked) shadow_access(c.shared, c.bytes, WRITE, c.bytes, nullptr);
        if (c.source) std::memcpy(c.shared, c.source, c.bytes);
        else std::memset(c.shared, 0, c.bytes);
    }
    t.copies.erase(t.copies.begin(), t.copies.begin() + static_cast<ptrdiff_t>(landed));
}

static void fail_with(const char* what) { fail(what); }

// Addresses in the shared state space: dynamic shared memory from the one, static from the other.
static constexpr unsigned DYNAMIC = 1u << 24, STATIC = 2u << 24;

static unsigned shared_address(const void* at) {
    auto p = static_cast<const char*>(at);
    auto dynamic = static_cast<const char*>(engine.current->shared);
    if (engine.segment && p >= engine.segment && p < engine.segment + engine.launch->loaded->tls_size)
        return STATIC + static_cast<unsigned>(p - engine.segment);
    // A thread may compute the address of the end.
    if (p >= dynamic && p <= dynamic + engine.launch->shared)
        return DYNAMIC + static_cast<unsigned>(p - dynamic);
    fail("converts a pointer to a shared address that does not point to shared memory");
}

static void* shared_pointer(unsigned address) {
    if (address >= STATIC && engine.segment) return engine.segment + (address - STATIC);
    if (address >= DYNAMIC && address < STATIC)
        return static_cast<char*>(engine.current->shared) + (address - DYNAMIC);
    fail("uses an address of shared memory that no pointer was converted to");
}

static const Runtime RUNTIME = {barrier,   grid_barrier, collective,    copy_issue,     copy_commit,
                                copy_wait, fail_with,    shadow_access, shared_address, shared_pointer};

static bool same(const Dim3& a, const Dim3& b) { return a.x == b.x && a.y == b.y && a.z == b.z; }

/// Initialises the block, and clears the state of the block that used the slot before.
static void init_block(Block& b, unsigned rank, const Launch& l) {
    unsigned n = ranks(l.block);
    if (!same(b.size, l.block)) {
        b.size = l.block;
        b.threads.resize(n);
        b.warps.resize((n + 31) / 32);
        b.order.resize(n);
        for (unsigned i = 0; i < n; i++) {
            Thread& t = b.threads[i];
            t.thread = unrank(i, l.block), t.block_dim = l.block;
            t.rank = i, t.lane = i % 32;
        }
    }
    b.index = unrank(rank, l.grid);
    b.ready.clear();
    b.started = b.at_barrier = b.vote = 0;
    b.live = n;
    b.barrier_line = 0;
    b.ordered = ++engine.time;
    b.dynamic.resize(l.shared + 512);
    auto dynamic =
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(b.dynamic.data()) + 255) & ~uintptr_t{255});
    std::memset(b.dynamic.data(), 0xff, b.dynamic.size());
    // Warps start from a random one, and lanes in one of 32 random orders: cheaper than a shuffle, and as
    // unpredictable.
    unsigned pick = static_cast<unsigned>(engine.next_random());
    unsigned full = n / 32 * 32, first = full ? pick / 32 % (full / 32) : 0;
    for (unsigned i = 0; i < n; i++) {
        Thread& t = b.threads[i];
        t.block = b.index, t.grid_dim = l.grid, t.shared = dynamic;
        t.owner = &b, t.warp = &b.warps[i / 32];
        t.id = rank * n + i;
        t.done = false, t.line = 0, t.group = 0;
        t.copies.clear();
        t.warp->lanes[t.lane] = &t;
        unsigned other = i + first * 32 < full ? i + first * 32 : i + first * 32 - full;
        b.order[i] = i < full ? other ^ pick % 32 : i;
    }
    for (Warp& w : b.warps) w.waiting = 0, w.ordered = b.ordered, w.lanes_present = ~0u;
    if (n % 32) b.warps.back().lanes_present = (1u << n % 32) - 1;
    if (l.checked) shadow_block_start(b);
}

/// Runs the active blocks until all their threads are done, or one fails.
static void run_active() {
    engine.live = engine.at_grid_barrier = 0;
    for (Block* b : engine.active) engine.live += b->live;
    engine.resident = engine.active[0];
    run_another(&engine.main);
    release_finished_stack();
}

static void run(const Launch& l) {
    engine.launch = &l;
    engine.error.clear();
    engine.random = l.seed * 0x9e3779b97f4a7c15ull | 1;
    engine.finished_stack = nullptr;
    if (l.checked) shadow_launch_start();
    engine.ordered = ++engine.time;
    *l.loaded->library->runtime = &RUNTIME;
    size_t size = l.loaded->tls_size;
    engine.segment = nullptr;
    if (size) {
        l.loaded->library->allocate_tls();
        size_t at[2] = {l.loaded->tls_module, 0};
        engine.segment = static_cast<char*>(__tls_get_addr(at));
    }
    FaultHandler fault_handler;
    unsigned blocks = ranks(l.grid);
    unsigned concurrent = l.cooperative ? blocks : 1;
    if (engine.pool.size() < concurrent) engine.pool.resize(concurrent);
    unsigned first = static_cast<unsigned>(engine.next_random() % blocks);
    engine.active.clear();
    for (unsigned i = 0; i < concurrent; i++) engine.active.push_back(&engine.pool[i]);
    for (unsigned done = 0; done < blocks && engine.error.empty(); done += concurrent) {
        for (unsigned i = 0; i < concurrent; i++) {
            Block& b = engine.pool[i];
            init_block(b, (first + done + i) % blocks, l);
            if (concurrent > 1) b.saved_static.assign(size, static_cast<char>(0xff));
        }
        if (size) std::memset(engine.segment, 0xff, size);
        run_active();
    }
    if (!engine.error.empty()) engine.stacks.reset();
}

}  // namespace standin

extern "C" {

/// Runs a launch to completion. Returns null, or the error, whose text is valid until the next launch.
__attribute__((visibility("hidden"))) const char* engine_run(const standin::Launch* launch) {
    standin::run(*launch);
    return standin::engine.error.empty() ? nullptr : standin::engine.error.c_str();
}
}
