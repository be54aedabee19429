// Shadow memory of the instrumented build. Every access to device and shared memory arrives here with address
// and size. It is checked against the state of the memory and against other threads' accesses since the last
// barrier that orders the two.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "engine.h"

namespace standin {

static Shadow device;  // the address range of all device and pinned memory

// What the running launch has moved: for every four bytes of device memory those that it has read in the low
// half and those that it has written in the high half, and which of these are not 0.
static uint8_t* moved;
static std::vector<size_t> moved_granules;

static void* reserve(size_t size) {
    void* at =
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) std::perror("stand-in driver: cannot reserve shadow memory"), std::abort();
    return at;
}

static Shadow shared_shadow(Block& b, bool dynamic) {
    const char* base = dynamic ? b.dynamic.data() : engine.segment;
    size_t size = dynamic ? b.dynamic.size() : engine.launch->loaded->tls_size;
    return {base, size, b.states[dynamic].data(), b.cells[dynamic].data()};
}

static void mark(const Shadow& s, const char* at, size_t size, uint8_t state) {
    size_t from = static_cast<size_t>(at - s.base), to = from + size;
    for (; from < to && from % 4; from++)
        s.state[from / 4] =
            static_cast<uint8_t>((s.state[from / 4] & ~(0x11 << from % 4)) | (state & 0x11 << from % 4));
    if (to > from) std::memset(s.state + from / 4, state, (to - from) / 4);
    for (from = to - (to > from ? (to - from) % 4 : 0); from < to; from++)
        s.state[from / 4] =
            static_cast<uint8_t>((s.state[from / 4] & ~(0x11 << from % 4)) | (state & 0x11 << from % 4));
}

void shadow_launch_start() {
    for (size_t granule : moved_granules) moved[granule] = 0;
    moved_granules.clear();
    size_t size = device.size / 4 * sizeof(Cell);
    // Twelve times the size of the range, so reserved only when instrumented kernels run.
    if (!device.cells) {
        device.cells = static_cast<Cell*>(reserve(size));
        moved = static_cast<uint8_t*>(reserve(device.size / 4));
    }
    if (engine.time < 1u << 31) return;
    // The clock would overflow. All earlier accesses are ordered by now, so forget them.
    madvise(device.cells, size, MADV_DONTNEED);
    engine.time = 0;
}

void shadow_block_start(Block& b) {
    for (bool dynamic : {false, true}) {
        size_t granules = (dynamic ? b.dynamic.size() : engine.launch->loaded->tls_size) / 4 + 2;
        b.states[dynamic].assign(granules, dynamic ? 0x00 : 0xf0);
        b.cells[dynamic].assign(granules, Cell{});
    }
    mark(shared_shadow(b, true), static_cast<const char*>(b.threads[0].shared), engine.launch->shared, 0xf0);
}

void shadow_mark_unwritten(const void* at, size_t size) {
    auto p = static_cast<const char*>(at);
    for (bool dynamic : {false, true}) {
        Shadow s = shared_shadow(*engine.current->owner, dynamic);
        if (p >= s.base && p < s.base + s.size) mark(s, p, size, 0xf0);
    }
}

static const char* verb(unsigned access) {
    return access & ATOMIC ? "updates atomically" : access & WRITE ? "writes" : "reads";
}

extern "C" void standin_describe(const void* at, char* text, size_t size);

/// Fails the launch with "writes 4 bytes at <where>: <what>".
[[noreturn]] static void report(const void* at, size_t size, unsigned access, const void* code,
                                const std::string& what) {
    char where[256];
    Block& b = *engine.current->owner;
    ptrdiff_t in_static = static_cast<const char*>(at) - engine.segment;
    ptrdiff_t in_dynamic = static_cast<const char*>(at) - static_cast<const char*>(b.threads[0].shared);
    if (engine.segment && in_static >= 0 &&
        in_static < static_cast<ptrdiff_t>(engine.launch->loaded->tls_size))
        std::snprintf(where, sizeof where, "static shared memory");
    else if (in_dynamic >= -512 && in_dynamic < static_cast<ptrdiff_t>(engine.launch->shared) + 512)
        std::snprintf(where, sizeof where, "offset %td of %u bytes of dynamic shared memory", in_dynamic,
                      engine.launch->shared);
    else standin_describe(at, where, sizeof where);
    fail(std::string(verb(access)) + " " + std::to_string(size) + " bytes at " + where + ": " + what +
         source_of(*engine.launch->loaded, code));
}

/// Whether a barrier orders an earlier access before the running thread.
static bool ordered(const Cell::LastAccess& earlier, const Thread& t, unsigned block_size) {
    if (earlier.time < engine.ordered) return true;
    unsigned first = t.id - t.rank;
    if (earlier.thread - first >= block_size) return false;
    return earlier.time < t.owner->ordered ||
           ((earlier.thread - first) / 32 == t.rank / 32 && earlier.time < t.warp->ordered);
}

static void track(Cell& cell, const Thread& t, uint8_t bytes, unsigned access, const void* at, size_t size,
                  const void* code) {
    unsigned block_size = static_cast<unsigned>(t.owner->threads.size());
    Cell::LastAccess* slot = nullptr;
    for (Cell::LastAccess& other : cell.accesses) {
        bool old = other.access == 0 || ordered(other, t, block_size);
        if (old) {
            if (!slot) slot = &other;
            continue;
        }
        if (other.thread == t.id) {
            // A thread's own write implies more conflicts than its later read, so it is kept.
            if (other.bytes == bytes && (access & WRITE || other.access & WRITE || other.access == access))
                access |= other.access & WRITE, slot = &other;
            continue;
        }
        bool conflict =
            other.bytes & bytes && (access | other.access) & WRITE && !(access & other.access & ATOMIC);
        if (conflict) {
            unsigned block = other.thread / block_size, rank = other.thread % block_size;
            const Dim3& g = engine.launch->grid;
            const Dim3& n = engine.launch->block;
            char text[200];
            std::snprintf(
                text, sizeof text,
                "race: thread (%u, %u, %u) of block (%u, %u, %u) %s them too, with no barrier in between",
                rank % n.x, rank / n.x % n.y, rank / n.x / n.y, block % g.x, block / g.x % g.y,
                block / g.x / g.y, verb(other.access));
            report(at, size, access, code, text);
        }
    }
    if (!slot) slot = &cell.accesses[engine.next_random() % 4];
    *slot = {engine.time, t.id, bytes, static_cast<uint8_t>(access)};
}

/// Notes that the launch moves these bytes of a granule of device memory.
static void move(size_t granule, unsigned bytes, unsigned access) {
    unsigned now = (access & (READ | ATOMIC) ? bytes : 0) | (access & (WRITE | ATOMIC) ? bytes << 4 : 0);
    if (!moved[granule]) moved_granules.push_back(granule);
    moved[granule] |= static_cast<uint8_t>(now);
}

void shadow_access(const void* at, size_t size, unsigned access, size_t alignment, const void* code) {
    auto p = static_cast<const char*>(at);
    if (engine.stacks.holds(at)) return;
    Thread& t = *engine.current;
    Shadow s = device;
    if (p < s.base || p >= s.base + s.size) s = shared_shadow(*t.owner, false);
    if (p < s.base || p >= s.base + s.size) s = shared_shadow(*t.owner, true);
    if (p < s.base || p >= s.base + s.size) {
        const Loaded& l = *engine.launch->loaded;
        if (p >= l.image && p < l.image_end) return;  // constants of the kernel library
        report(at, size, access, code, "unmapped device memory");
    }
    if (alignment && reinterpret_cast<uintptr_t>(at) % alignment)
        report(at, size, access, code, "misaligned, not a multiple of " + std::to_string(alignment));
    size_t from = static_cast<size_t>(p - s.base), to = from + size;
    for (size_t g = from / 4; g * 4 < to; g++) {
        unsigned bytes = 0xf;
        if (g * 4 < from) bytes &= 0xfu << from % 4;
        if (g * 4 + 4 > to) bytes &= 0xfu >> (g * 4 + 4 - to);
        uint8_t& state = s.state[g];
        if ((state >> 4 & bytes) != bytes) report(at, size, access, code, "out of bounds");
        if (access & (READ | ATOMIC) && (state & bytes) != bytes)
            report(at, size, access, code, "uninitialised");
        track(s.cells[g], t, static_cast<uint8_t>(bytes), access, at, size, code);
        if (access & WRITE) state |= static_cast<uint8_t>(bytes);
        if (s.base == device.base) move(g, bytes, access);
    }
}

}  // namespace standin

extern "C" {

/// Sets the address range of device memory.
__attribute__((visibility("hidden"))) void engine_memory(const char* base, size_t size) {
    using namespace standin;
    device = {base, size, static_cast<uint8_t*>(reserve(size / 4)), nullptr};
}

/// Sets the state of bytes of device memory (see `Shadow`).
__attribute__((visibility("hidden"))) void engine_mark(const char* at, size_t size, uint8_t state) {
    standin::mark(standin::device, at, size, state);
}

/// Bytes of device memory that the last launch of the instrumented build has read and written, each once
/// however often.
__attribute__((visibility("hidden"))) void engine_moved(uint64_t* read, uint64_t* written) {
    *read = *written = 0;
    for (size_t granule : standin::moved_granules) {
        *read += static_cast<unsigned>(__builtin_popcount(standin::moved[granule] & 0x0fu));
        *written += static_cast<unsigned>(__builtin_popcount(standin::moved[granule] & 0xf0u));
    }
}

/// Returns the offset from `at` of the first unwritten byte of device memory; `size` if all are written.
__attribute__((visibility("hidden"))) size_t engine_first_unwritten(const char* at, size_t size) {
    using standin::device;
    for (size_t i = 0; i < size; i++) {
        size_t from = static_cast<size_t>(at + i - device.base);
        if (!(device.state[from / 4] >> from % 4 & 1)) return i;
    }
    return size;
}
}
