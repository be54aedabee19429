// A device in a process of its own: reads commands from stdin and answers each with a line on stdout, and bytes
// after it where the command reads memory. Kernels may crash or hang; the process that started this one sees it.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "engine.h"

extern "C" {
const standin::Loaded* engine_load(const char* name, const void* bytes, size_t size);
const standin::Entry* engine_entry(const standin::Loaded* loaded, const char* name);
const char* engine_run(const standin::Launch* launch);
void engine_memory(const char* base, size_t size);
void engine_mark(const char* at, size_t size, uint8_t state);
size_t engine_first_unwritten(const char* at, size_t size);
}

namespace {

constexpr size_t RANGE = size_t{1} << 31, GUARD = 256;
constexpr int GUARD_BYTE = 0xa5, POISON = 0xff;
constexpr uint8_t UNWRITTEN = 0xf0, WRITTEN = 0xff;

struct Tensor {
    std::string name;
    char* at;
    size_t size;
};

char* base;
size_t used;
std::vector<Tensor> tensors;
const standin::Loaded* loaded;
FILE* answers;

void answer(const std::string& line) {
    std::fprintf(answers, "%s\n", line.c_str());
    std::fflush(answers);
}

/// Reads a file to its end.
std::string contents(const char* path) {
    std::string all;
    if (FILE* f = std::fopen(path, "rb")) {
        char part[1 << 16];
        for (size_t n; (n = std::fread(part, 1, sizeof part, f));) all.append(part, n);
        std::fclose(f);
    }
    return all;
}

Tensor* tensor(size_t i) {
    if (i < tensors.size()) return &tensors[i];
    std::fprintf(stderr, "no tensor %zu\n", i);
    std::exit(3);
}

void fill_guards(const Tensor& t) {
    std::memset(t.at - GUARD, GUARD_BYTE, GUARD);
    std::memset(t.at + t.size, GUARD_BYTE, GUARD);
}

/// The first tensor whose guards were overwritten; restores them.
std::string overwritten() {
    for (const Tensor& t : tensors)
        for (size_t i = 0; i < GUARD; i++) {
            const char* before = t.at - 1 - i;
            const char* after = t.at + t.size + i;
            bool low = static_cast<unsigned char>(*before) != GUARD_BYTE;
            if (!low && static_cast<unsigned char>(*after) == GUARD_BYTE) continue;
            fill_guards(t);
            return "writes " + std::to_string(low ? i + 1 : i) + " bytes " +
                   (low ? "before the start of `" : "past the end of `") + t.name + "`";
        }
    return "";
}

/// Launches: kernel, grid, block, shared, cooperative, seed, count, then `size hex` for each argument.
void launch(char* words) {
    auto word = [&] { return std::strtok(words, " \n"); };
    auto next = [] {
        const char* w = std::strtok(nullptr, " \n");
        return w ? w : "0";
    };
    std::string name = word();
    auto number = [&] { return std::strtoull(next(), nullptr, 10); };
    auto size = [&] {
        standin::Dim3 d{};
        d.x = static_cast<unsigned>(number());
        d.y = static_cast<unsigned>(number());
        d.z = static_cast<unsigned>(number());
        return d;
    };
    const standin::Entry* entry = engine_entry(loaded, name.c_str());
    if (!entry) return answer("missing " + name);
    standin::Launch l{};
    l.loaded = loaded, l.entry = entry;
    l.grid = size(), l.block = size();
    l.shared = static_cast<unsigned>(number());
    l.cooperative = number() != 0, l.checked = true, l.seed = number();
    size_t count = number();
    std::vector<std::vector<char>> bytes;
    for (size_t i = 0; i < count; i++) {
        size_t length = number();
        const char* hex = next();
        std::vector<char> value;
        for (size_t k = 0; k < length; k++) {
            char pair[3] = {hex[2 * k], hex[2 * k + 1], 0};
            value.push_back(static_cast<char>(std::strtoul(pair, nullptr, 16)));
        }
        bytes.push_back(value);
    }
    if (static_cast<int>(count) != entry->count) return answer("mismatch the kernel takes another number of arguments");
    std::vector<void*> arguments;
    for (size_t i = 0; i < count; i++) {
        if (bytes[i].size() != entry->parameters[i].size)
            return answer("mismatch argument " + std::to_string(i) + " has " +
                          std::to_string(entry->parameters[i].size) + " bytes");
        arguments.push_back(bytes[i].data());
    }
    l.arguments = arguments.data();
    if (const char* error = engine_run(&l)) {
        std::string line = error;
        for (char& c : line)
            if (c == '\n') c = ' ';
        return answer("violation " + line);
    }
    std::string guard = overwritten();
    if (!guard.empty()) return answer("violation kernel `" + name + "`: " + guard);
    answer("done");
}

}  // namespace

/// What the shadow memory calls an address of device memory.
extern "C" void standin_describe(const void* at_, char* text, size_t size) {
    auto at = static_cast<const char*>(at_);
    const Tensor* nearest = nullptr;
    size_t best = GUARD + 1;
    for (const Tensor& t : tensors) {
        size_t away = at < t.at ? static_cast<size_t>(t.at - at) : at >= t.at + t.size ? static_cast<size_t>(at - t.at - t.size) : 0;
        if (away < best) best = away, nearest = &t;
    }
    if (!nearest) std::snprintf(text, size, "address %p", at_);
    else if (at < nearest->at)
        std::snprintf(text, size, "%zu bytes before `%s`", best, nearest->name.c_str());
    else if (at >= nearest->at + nearest->size)
        std::snprintf(text, size, "%zu bytes past the end of `%s` (%zu bytes)", best, nearest->name.c_str(), nearest->size);
    else
        std::snprintf(text, size, "offset %td of `%s` (%zu bytes)", at - nearest->at, nearest->name.c_str(), nearest->size);
}

int main() {
    // Whatever a kernel prints goes to stderr.
    answers = fdopen(dup(1), "w");
    dup2(2, 1);
    base = static_cast<char*>(
        mmap(nullptr, RANGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base == MAP_FAILED) return std::perror("cannot reserve device memory"), 3;
    engine_memory(base, RANGE);
    char* line = nullptr;
    size_t room = 0;
    while (getline(&line, &room, stdin) > 0) {
        char command[32] = "";
        int skip = 0;
        std::sscanf(line, "%31s %n", command, &skip);
        char* rest = line + skip;
        std::string what = command;
        if (what == "load") {
            rest[std::strcspn(rest, "\n")] = 0;
            std::string bytes = contents(rest);
            loaded = engine_load("kernel", bytes.data(), bytes.size());
            answer("done");
        } else if (what == "alloc") {  // size name
            size_t size = std::strtoull(rest, &rest, 10);
            char name[128] = "";
            std::sscanf(rest, "%127s", name);
            size_t span = (size + 255) / 256 * 256 + 2 * GUARD;
            if (used + span > RANGE) {
                answer("full");
                continue;
            }
            tensors.push_back({name, base + used + GUARD, size});
            used += span;
            fill_guards(tensors.back());
            std::memset(tensors.back().at, POISON, size);
            engine_mark(tensors.back().at, size, UNWRITTEN);
            answer("done " + std::to_string(reinterpret_cast<size_t>(tensors.back().at)));
        } else if (what == "reset") {
            for (const Tensor& t : tensors) engine_mark(t.at, t.size, 0x00);
            tensors.clear();
            used = 0;
            answer("done");
        } else if (what == "poison") {  // tensor
            Tensor& t = *tensor(std::strtoull(rest, nullptr, 10));
            std::memset(t.at, POISON, t.size);
            engine_mark(t.at, t.size, UNWRITTEN);
            answer("done");
        } else if (what == "write") {  // tensor, then its bytes
            Tensor& t = *tensor(std::strtoull(rest, nullptr, 10));
            if (std::fread(t.at, 1, t.size, stdin) != t.size) return 3;
            engine_mark(t.at, t.size, WRITTEN);
            answer("done");
        } else if (what == "read") {  // tensor: the first unwritten byte, then all bytes
            Tensor& t = *tensor(std::strtoull(rest, nullptr, 10));
            answer("bytes " + std::to_string(t.size) + " " + std::to_string(engine_first_unwritten(t.at, t.size)));
            std::fwrite(t.at, 1, t.size, answers);
            std::fflush(answers);
        } else if (what == "launch") {
            launch(rest);
        } else {
            answer("unknown command");
        }
    }
    return 0;
}
