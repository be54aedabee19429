// Loads the kernel libraries embedded in the driver: each is the shared object of one `.cu` file.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "engine.h"

namespace standin {

/// Fills in the position of the library if `info` is the object that contains it.
static int locate(dl_phdr_info* info, size_t, void* loaded_) {
    auto* loaded = static_cast<Loaded*>(loaded_);
    auto at = reinterpret_cast<const char*>(loaded->library);
    const char *low = nullptr, *high = nullptr;
    size_t tls_size = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& h = info->dlpi_phdr[i];
        auto from = reinterpret_cast<const char*>(info->dlpi_addr + h.p_vaddr);
        if (h.p_type == PT_LOAD) {
            if (!low || from < low) low = from;
            if (from + h.p_memsz > high) high = from + h.p_memsz;
        }
        if (h.p_type == PT_TLS) tls_size = h.p_memsz;
    }
    if (at < low || at >= high) return 0;
    loaded->image = low, loaded->image_end = high;
    loaded->tls_module = info->dlpi_tls_modid, loaded->tls_size = tls_size;
    return 1;
}

std::string source_of(const Loaded& loaded, const void* code) {
    auto at = static_cast<const char*>(code);
    if (at < loaded.image || at >= loaded.image_end) return "";
    char command[120], line[512];
    // Minus one byte: a return address follows the call, which may be the last instruction of its line.
    std::snprintf(command, sizeof command, "addr2line -i -e /proc/%d/fd/%d %#tx 2>/dev/null", getpid(),
                  loaded.file, at - loaded.image - 1);
    FILE* lines = popen(command, "r");
    std::string all;
    while (lines && std::fgets(line, sizeof line, lines)) {
        line[std::strcspn(line, "\n ")] = 0;
        const char* name = std::strrchr(line, '/');
        if (name && !std::strchr(name, '?'))
            all += (all.empty() ? " (" : ", called in ") + std::string(name + 1);
    }
    if (lines) pclose(lines);
    return all.empty() ? all : all + ")";
}

}  // namespace standin

extern "C" {

/// Loads a kernel library from memory. It is never unloaded.
__attribute__((visibility("hidden"))) const standin::Loaded* engine_load(const char* name, const void* bytes,
                                                                         size_t size) {
    int file = memfd_create(name, MFD_CLOEXEC);
    char path[64];
    std::snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    void* handle = nullptr;
    if (file >= 0 && write(file, bytes, size) == static_cast<ssize_t>(size))
        handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    auto library = handle ? static_cast<const standin::Library*>(dlsym(handle, "standin_library")) : nullptr;
    if (!library) {
        const char* why = dlerror();
        std::fprintf(stderr, "stand-in driver: cannot load the kernels of %s: %s\n", name,
                     why ? why : std::strerror(errno));
        std::abort();
    }
    auto* loaded = new standin::Loaded{library, 0, 0, nullptr, nullptr, file};
    dl_iterate_phdr(standin::locate, loaded);
    // The file stays open. If its descriptor were reused, the loader would take the next library for this
    // one, because both would have the same path.
    return loaded;
}

__attribute__((visibility("hidden"))) const standin::Entry* engine_entry(const standin::Loaded* loaded,
                                                                         const char* name) {
    for (size_t i = 0; i < loaded->library->count; i++)
        if (!std::strcmp(loaded->library->entries[i].name, name)) return &loaded->library->entries[i];
    return nullptr;
}
}
