// The scheduler. A fiber runs threads one after another until one parks; that one keeps the stack, and
// another fiber goes on with the rest. Threads that never park thus cost no switch. Who continues is drawn at
// random from the seed.
#include "engine.h"

#include <pthread.h>
#include <signal.h>

#include <cstring>

extern "C" void* __tls_get_addr(size_t*);

namespace standin {

Engine engine;

unsigned ranks(const Index& size) { return size.x * size.y * size.z; }

static Index unrank(unsigned rank, const Index& size) {
    return {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
}

std::string name_of(const Thread& t) {
    char text[256];
    std::snprintf(text, sizeof text, "kernel `%s`, block (%u, %u, %u), thread (%u, %u, %u)",
                  engine.launch->entry->name, t.block.x, t.block.y, t.block.z, t.thread.x, t.thread.y,
                  t.thread.z);
    return text;
}

/// Leaves the launch for good: parked fibers are dropped where they stand.
static void leave() {
    void* nowhere;
    standin_switch(&nowhere, engine.main);
    __builtin_unreachable();
}

void fail(const std::string& what) {
    engine.error = name_of(*engine.current) + ": " + what;
    leave();
    __builtin_unreachable();
}

/// A plain kernel that touches what is not mapped, or a vector that is not aligned, ends as an error, not as
/// a crash.
static pthread_t host_thread;
static struct sigaction before_fault;

static void on_fault(int signal, siginfo_t* info, void*) {
    if (engine.current && pthread_equal(host_thread, pthread_self())) {
        char text[120];
        // A misaligned vector access has no address to show.
        std::snprintf(text, sizeof text,
                      "touches what is no memory of the device, or is misaligned (address %p)",
                      info->si_addr);
        fail(text);
    }
    sigaction(signal, &before_fault,
              nullptr);  // not a kernel's: the access is made again, for the handler before
}

/// Catches faults while it lives.
struct Faults {
    Faults() {
        host_thread = pthread_self();
        struct sigaction action{};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;  // `fail` does not return from the handler
        sigaction(SIGSEGV, &action, &before_fault);
    }
    ~Faults() {
        engine.current = nullptr;
        sigaction(SIGSEGV, &before_fault, nullptr);
    }
};

static void set_current(Thread* t) {
    engine.current = t;
    *engine.launch->loaded->library->here = t;
}

/// Makes `block` the one whose static shared memory is in the segment.
static void make_resident(Block* block) {
    if (engine.resident == block) return;
    size_t size = engine.launch->loaded->tls_size;
    if (engine.resident) std::memcpy(engine.resident->kept.data(), engine.segment, size);
    std::memcpy(engine.segment, block->kept.data(), size);
    engine.resident = block;
}

static bool has_work(const Block& b) { return !b.ready.empty() || b.started < b.order.size(); }

static void run_threads();

/// Says why nothing can run.
static void deadlock() {
    for (Block* b : engine.alive)
        for (Thread& t : b->threads)
            if (!t.done) {
                engine.current = &t;
                if (b->at_barrier)
                    fail("deadlock: some threads wait at the barrier in line " +
                         std::to_string(b->barrier_line) + ", others will never come: divergent barrier");
                if (engine.at_grid_barrier)
                    fail("deadlock: some threads wait at a grid-wide barrier that others never reach");
                fail("deadlock: lanes wait in the warp collective in line " + std::to_string(t.line) +
                     " for lanes that never come");
            }
    leave();
}

/// Continues some thread that can run, or the caller if all are done. `from` is where the running context is
/// saved.
static void run_another(void** from) {
    Block* b = engine.resident;
    if (!has_work(*b)) {
        b = nullptr;
        size_t n = engine.alive.size(), first = n > 1 ? engine.next_random() % n : 0;
        for (size_t i = 0; i < n && !b; i++) {
            Block* other = engine.alive[(first + i) % n];
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

/// A stack can be reused only when nobody stands on it any more.
static void collect_spent() {
    if (engine.spent) engine.stacks.give_back(engine.spent), engine.spent = nullptr;
}

static void park() {
    Thread* t = engine.current;
    run_another(&t->sp);
    collect_spent();
}

static void thread_ends(Thread& t) {
    t.done = true;
    Block& b = *t.of;
    b.live--;
    engine.live--;
    if (!t.copies.empty()) fail("ends with asynchronous copies that nobody waited for");
    if (b.at_barrier)
        fail("returns while other threads wait at the barrier in line " + std::to_string(b.barrier_line) +
             ": divergent barrier");
}

/// What a fiber does: threads of the resident block until none is left to start.
static void run_threads() {
    collect_spent();
    Block* b = engine.resident;
    while (b->started < b->order.size()) {
        Thread& t = b->threads[b->order[b->started++]];
        set_current(&t);
        engine.launch->entry->call(engine.launch->arguments);
        thread_ends(t);
        b = engine.resident;
        // Threads that others wait for come first now and then, or a barrier would always find them in
        // starting order.
        if (!b->ready.empty() && (engine.next_random() & 3) == 0) break;
    }
    void* end;
    engine.spent = __builtin_frame_address(0);
    run_another(&end);
    __builtin_unreachable();
}

static unsigned barrier(int line, unsigned vote) {
    Thread& t = *engine.current;
    Block& b = *t.of;
    if (b.at_barrier && b.barrier_line != line)
        fail("is at the barrier in line " + std::to_string(line) + " while others wait in line " +
             std::to_string(b.barrier_line) + ": divergent barrier");
    if (b.live != b.threads.size())
        fail("is at the barrier in line " + std::to_string(line) +
             " that other threads of the block have returned without: divergent barrier");
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
    if (!engine.launch->cooperative) fail("a grid-wide barrier in a launch that is not cooperative");
    Thread& t = *engine.current;
    t.line = line;
    if (++engine.at_grid_barrier < engine.live) return park();
    engine.at_grid_barrier = 0;
    engine.ordered = ++engine.time;
    for (Block* b : engine.alive)
        for (Thread& other : b->threads)
            if (!other.done && &other != &t) b->ready.push_back(&other);
}

static void collective(unsigned mask, int line, Complete complete, void* argument, bool orders) {
    Thread& t = *engine.current;
    Warp& w = *t.warp;
    mask &= w.lanes_present;
    if (!(mask >> t.lane & 1)) fail("calls a warp collective whose mask leaves it out");
    t.mask = mask, t.line = line, t.complete = complete, t.argument = argument;
    w.waiting |= 1u << t.lane;
    if ((w.waiting & mask) != mask) return park();
    void* arguments[32];
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        const Thread& other = *w.lanes[lane];
        if (other.mask != mask || other.complete != complete || other.line != line)
            fail("is in the warp collective in line " + std::to_string(line) + " while lane " +
                 std::to_string(lane) + " is in another, in line " + std::to_string(other.line));
        arguments[lane] = other.argument;
    }
    w.waiting &= ~mask;
    complete(arguments, mask);
    if (orders) w.ordered = ++engine.time;
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1 && lane != t.lane) t.of->ready.push_back(w.lanes[lane]);
}

static void copy_issue(void* shared, const void* source, unsigned bytes) {
    Thread& t = *engine.current;
    if (engine.launch->checked) {
        // The hardware may write at once: whoever still reads the place races with it.
        shadow_access(shared, bytes, WRITE, bytes, nullptr);
        shadow_unwritten(shared, bytes);
        if (source) shadow_access(source, bytes, READ, bytes, nullptr);
    } else if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(source)) % bytes) {
        fail("an asynchronous copy from or to an address that is no multiple of its size");
    }
    std::memset(shared, 0xff, bytes);  // until it lands, whoever reads the place finds NaN
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

static const Runtime RUNTIME = {barrier,     grid_barrier, collective, copy_issue,
                                copy_commit, copy_wait,    fail_with,  shadow_access};

static bool same(const Index& a, const Index& b) { return a.x == b.x && a.y == b.y && a.z == b.z; }

/// Lays the block out and forgets what the one before it in the same place did.
static void set_up(Block& b, unsigned rank, const Launch& l) {
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
    // Warps start in random order, and lanes in one of 32 random orders: cheaper than a shuffle, and as
    // unforeseeable.
    unsigned turn = static_cast<unsigned>(engine.next_random());
    unsigned whole = n / 32 * 32, first = whole ? turn / 32 % (whole / 32) : 0;
    for (unsigned i = 0; i < n; i++) {
        Thread& t = b.threads[i];
        t.block = b.index, t.grid_dim = l.grid, t.shared = dynamic;
        t.of = &b, t.warp = &b.warps[i / 32];
        t.id = rank * n + i;
        t.done = false, t.line = 0, t.group = 0;
        t.copies.clear();
        t.warp->lanes[t.lane] = &t;
        unsigned other = i + first * 32 < whole ? i + first * 32 : i + first * 32 - whole;
        b.order[i] = i < whole ? other ^ turn % 32 : i;
    }
    for (Warp& w : b.warps) w.waiting = 0, w.ordered = b.ordered, w.lanes_present = ~0u;
    if (n % 32) b.warps.back().lanes_present = (1u << n % 32) - 1;
    if (l.checked) shadow_block_start(b);
}

/// Runs the blocks that are alive until all their threads are done, or one fails.
static void run_alive() {
    engine.live = engine.at_grid_barrier = 0;
    for (Block* b : engine.alive) engine.live += b->live;
    engine.resident = engine.alive[0];
    run_another(&engine.main);
    collect_spent();
}

static void run(const Launch& l) {
    engine.launch = &l;
    engine.error.clear();
    engine.random = l.seed * 0x9e3779b97f4a7c15ull | 1;
    engine.spent = nullptr;
    if (l.checked) shadow_launch_start();
    engine.ordered = ++engine.time;
    *l.loaded->library->runtime = &RUNTIME;
    size_t size = l.loaded->tls_size;
    engine.segment = nullptr;
    if (size) {
        l.loaded->library->own_memory();
        size_t at[2] = {l.loaded->tls_module, 0};
        engine.segment = static_cast<char*>(__tls_get_addr(at));
    }
    Faults faults;
    unsigned blocks = ranks(l.grid);
    unsigned together = l.cooperative ? blocks : 1;
    if (engine.pool.size() < together) engine.pool.resize(together);
    unsigned first = static_cast<unsigned>(engine.next_random() % blocks);
    engine.alive.clear();
    for (unsigned i = 0; i < together; i++) engine.alive.push_back(&engine.pool[i]);
    for (unsigned done = 0; done < blocks && engine.error.empty(); done += together) {
        for (unsigned i = 0; i < together; i++) {
            Block& b = engine.pool[i];
            set_up(b, (first + done + i) % blocks, l);
            if (together > 1) b.kept.assign(size, static_cast<char>(0xff));
        }
        if (size) std::memset(engine.segment, 0xff, size);
        run_alive();
    }
    if (!engine.error.empty()) engine.stacks.reset();
}

}  // namespace standin

extern "C" {

/// Runs a launch to its end. Returns null, or what went wrong; the text is valid until the next launch.
__attribute__((visibility("hidden"))) const char* engine_run(const standin::Launch* launch) {
    standin::run(*launch);
    return standin::engine.error.empty() ? nullptr : standin::engine.error.c_str();
}
}
