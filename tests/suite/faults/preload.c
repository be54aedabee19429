// Faults in file-system calls, for `faults.rs`: preloaded into the program under test.
//
// Counts the calls that touch files below FAULTS_FOLDER, those that change something (`change`) apart from those that only read
// (`read`), and does FAULTS_KIND at call number FAULTS_AT of the sort FAULTS_OF. With FAULTS_TRACE, appends a line per call to
// that file: sort, name, path below the folder. Without any of them it only stands in for `fsync`, so that tests do not wait for
// a disk.
//
//   kill       the process is killed before the call
//   half       half of a write is done, then the process is killed
//   cut        as a power cut: what was written and not synced is lost, then the process is killed
//   full       from this call on the disk is full: half of a write is done, then nothing fits any more
//   denied     from this call on nothing can be created, renamed, removed or opened for writing
//   gone       from this call on nothing below FAULTS_PATH can be opened or found
//   EIO, EACCES, ENOENT, EINTR, ...   this call alone fails with this error
//   short      a write or read transfers a single byte
//   remove     FAULTS_PATH is removed before the call, with everything in it
//   stop       the process gets SIGTERM before the call
//   stall      the call never returns, and writes the file FAULTS_HOLD.at
//   hold       the call waits: writes FAULTS_HOLD.at, goes on when FAULTS_HOLD.go exists
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))next(#name))
#define FILES 1024

enum sort { CHANGE, READ };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX], here[PATH_MAX]; // without symbolic links
static size_t folder_length;
static long counts[2], at;
static enum sort of;
static const char *kind = "", *path_of_fault, *hold;
static int trace = -1, begun;
// The path below the folder of each open file, and the length up to which its contents are on the disk.
static char *paths[FILES];
// Files with contents that are not on the disk yet.
static struct {
    dev_t device;
    ino_t number;
    off_t synced;
    int descriptor;
} dirty[FILES];
static int dirties;

static void *next(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

__attribute__((constructor)) static void start(void) {
    const char *value = getenv("FAULTS_FOLDER");
    if (!value || !realpath(value, folder) || !getcwd(here, sizeof here)) return;
    folder_length = strlen(folder);
    if ((value = getenv("FAULTS_KIND"))) kind = value;
    if ((value = getenv("FAULTS_AT"))) at = atol(value);
    if ((value = getenv("FAULTS_OF"))) of = strcmp(value, "read") ? CHANGE : READ;
    path_of_fault = getenv("FAULTS_PATH");
    hold = getenv("FAULTS_HOLD");
    if ((value = getenv("FAULTS_TRACE")))
        trace = REAL(open64)(value, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
}

// The path below the folder; NULL if it lies elsewhere.
static const char *below(int from, const char *path, char *into) {
    if (!folder_length) return NULL;
    const char *start = "", *inner = "";
    if (path[0] != '/') {
        if (from == AT_FDCWD) start = here;
        else if (from >= 0 && from < FILES && paths[from]) start = folder, inner = paths[from];
        else return NULL;
    }
    if (snprintf(into, PATH_MAX, "%s/%s%s%s", start, inner, *inner ? "/" : "", path + (path[0] == '/')) >= PATH_MAX) abort();
    if (strncmp(into, folder, folder_length)) return NULL;
    if (!into[folder_length]) return ".";
    return into[folder_length] == '/' ? into + folder_length + 1 : NULL;
}

static const char *of_file(int file) { return file >= 0 && file < FILES ? paths[file] : NULL; }

static int remove_one(const char *path, const struct stat *data, int flag, struct FTW *place) {
    (void)data, (void)flag, (void)place;
    return syscall(SYS_unlinkat, AT_FDCWD, path, flag == FTW_DP ? AT_REMOVEDIR : 0);
}

// Loses what was not synced.
static void cut(void) {
    struct stat data;
    for (int i = 0; i < dirties; i++)
        if (!fstat(dirty[i].descriptor, &data) && data.st_size > dirty[i].synced)
            if (REAL(ftruncate64)(dirty[i].descriptor, dirty[i].synced)) abort();
}

static void wait_for_go(int for_ever) {
    char name[PATH_MAX];
    snprintf(name, sizeof name, "%s.at", hold);
    close(REAL(open64)(name, O_WRONLY | O_CREAT | O_CLOEXEC, 0666));
    snprintf(name, sizeof name, "%s.go", hold);
    while (for_ever || syscall(SYS_faccessat, AT_FDCWD, name, F_OK)) usleep(2000);
}

static int error_named(const char *name) {
    static const struct { const char *name; int number; } errors[] = {
        {"EIO", EIO}, {"EACCES", EACCES}, {"ENOENT", ENOENT}, {"EINTR", EINTR}, {"ENOSPC", ENOSPC}, {"EROFS", EROFS},
        {"EMFILE", EMFILE}, {"ESTALE", ESTALE}, {"EDQUOT", EDQUOT},
    };
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (!strcmp(name, errors[i].name)) return errors[i].number;
    return 0;
}

static int starts_with(const char *path, const char *start) {
    size_t length = strlen(start);
    return !strncmp(path, start, length) && (!path[length] || path[length] == '/');
}

// Counts a call and does what is due. Returns 0 or the error of the call; `*most` is the most bytes that it may transfer.
static int meet(enum sort sort, const char *call, const char *path, size_t *most) {
    if (!path) return 0;
    pthread_mutex_lock(&lock);
    long count = ++counts[sort];
    if (trace >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", sort == CHANGE ? "change" : "read", call, path);
        if (REAL(write)(trace, line, length) != length) abort();
    }
    int due = at && sort == of && count == at, after = at && (begun || due), error = 0, wait = 0;
    begun = after;
    if (due && !strcmp(kind, "kill")) {
        kill(getpid(), SIGKILL);
    } else if (due && !strcmp(kind, "half") && most) {
        *most = *most / 2; // the caller kills
    } else if (due && !strcmp(kind, "cut")) {
        cut();
        kill(getpid(), SIGKILL);
    } else if (due && !strcmp(kind, "short") && most) {
        if (*most > 1) *most = 1;
    } else if (due && !strcmp(kind, "remove")) {
        char whole[2 * PATH_MAX];
        snprintf(whole, sizeof whole, "%s/%s", folder, path_of_fault);
        nftw(whole, remove_one, 8, FTW_DEPTH | FTW_PHYS);
    } else if (due && !strcmp(kind, "stop")) {
        kill(getpid(), SIGTERM);
    } else if (due && (!strcmp(kind, "stall") || !strcmp(kind, "hold"))) {
        wait = 1;
    } else if (after && !strcmp(kind, "full") && sort == CHANGE) {
        int grows = most || !strcmp(call, "create") || !strcmp(call, "mkdir") || !strcmp(call, "link");
        if (due && most && *most > 1) *most /= 2;
        else if (grows) error = ENOSPC;
    } else if (after && !strcmp(kind, "denied") && sort == CHANGE) {
        int open = most || !strcmp(call, "sync") || !strcmp(call, "truncate") || !strcmp(call, "lock");
        if (!open) error = EACCES;
    } else if (after && !strcmp(kind, "gone") && starts_with(path, path_of_fault)) {
        if (strcmp(call, "read") && most == NULL) error = ENOENT;
    } else if (due) {
        error = error_named(kind);
    }
    int half = due && !strcmp(kind, "half") && most;
    pthread_mutex_unlock(&lock);
    if (wait) wait_for_go(!strcmp(kind, "stall"));
    return half ? -1 : error;
}

#define FAIL(error) do { errno = (error); return -1; } while (0)

static void remember(int file, const char *path) {
    if (file < 0 || file >= FILES) return;
    pthread_mutex_lock(&lock);
    free(paths[file]);
    paths[file] = path ? strdup(path) : NULL;
    pthread_mutex_unlock(&lock);
}

// Notes that a file has contents that are not on the disk, or that they are now.
static void note(int file, int synced) {
    struct stat data;
    if (!of_file(file) || fstat(file, &data) || !S_ISREG(data.st_mode)) return;
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < dirties && (dirty[i].device != data.st_dev || dirty[i].number != data.st_ino)) i++;
    if (i == dirties && !synced && dirties < FILES) {
        char name[64];
        snprintf(name, sizeof name, "/proc/self/fd/%d", file);
        dirty[i].descriptor = REAL(open64)(name, O_WRONLY | O_CLOEXEC);
        dirty[i].device = data.st_dev;
        dirty[i].number = data.st_ino;
        dirty[i].synced = data.st_size;
        dirties++;
    }
    if (i < dirties && synced) dirty[i].synced = data.st_size;
    pthread_mutex_unlock(&lock);
}

static int open_any(int from, const char *path, int flags, mode_t mode) {
    char into[PATH_MAX];
    const char *name = below(from, path, into);
    if (name) {
        int is_new = (flags & O_CREAT) && faccessat(from, path, F_OK, AT_SYMLINK_NOFOLLOW);
        int changes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
        int error = meet(changes ? CHANGE : READ, is_new ? "create" : "open", name, NULL);
        if (error) FAIL(error);
    }
    int file = REAL(openat64)(from, path, flags, mode);
    if (name) remember(file, name);
    if (name && file >= 0 && (flags & O_TRUNC)) note(file, 0);
    return file;
}

#define MODE(flags, mode) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list list; \
        va_start(list, flags); \
        mode = va_arg(list, mode_t); \
        va_end(list); \
    }

int open(const char *path, int flags, ...) { MODE(flags, mode) return open_any(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags, mode) return open_any(AT_FDCWD, path, flags, mode); }
int openat(int from, const char *path, int flags, ...) { MODE(flags, mode) return open_any(from, path, flags, mode); }
int openat64(int from, const char *path, int flags, ...) { MODE(flags, mode) return open_any(from, path, flags, mode); }

int close(int file) {
    if (of_file(file)) remember(file, NULL);
    return REAL(close)(file);
}

#define TRANSFER(sort, call, file, size, what) \
    size_t most = size; \
    const char *name = of_file(file); \
    int error = meet(sort, call, name, &most); \
    if (error > 0) FAIL(error); \
    if (name && sort == CHANGE) note(file, 0); \
    ssize_t done = what; \
    if (error < 0) kill(getpid(), SIGKILL); \
    return done;

ssize_t write(int file, const void *from, size_t size) {
    TRANSFER(CHANGE, "write", file, size, REAL(write)(file, from, most))
}
ssize_t pwrite64(int file, const void *from, size_t size, off64_t place) {
    TRANSFER(CHANGE, "write", file, size, REAL(pwrite64)(file, from, most, place))
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    // Only its first part, as the interface allows.
    if (of_file(file) && count > 0) return write(file, parts[0].iov_base, parts[0].iov_len);
    return REAL(writev)(file, parts, count);
}
ssize_t copy_file_range(int from, off64_t *in, int to, off64_t *out, size_t size, unsigned flags) {
    TRANSFER(CHANGE, "write", to, size, REAL(copy_file_range)(from, in, to, out, most, flags))
}
ssize_t read(int file, void *to, size_t size) { TRANSFER(READ, "read", file, size, REAL(read)(file, to, most)) }
ssize_t pread64(int file, void *to, size_t size, off64_t place) {
    TRANSFER(READ, "read", file, size, REAL(pread64)(file, to, most, place))
}

static int sync_any(int file) {
    struct stat data;
    const char *name = of_file(file);
    int error = meet(CHANGE, name && !fstat(file, &data) && S_ISDIR(data.st_mode) ? "sync folder" : "sync", name, NULL);
    if (error) FAIL(error);
    note(file, 1);
    return 0;
}
int fsync(int file) { return sync_any(file); }
int fdatasync(int file) { return sync_any(file); }

int ftruncate64(int file, off64_t length) {
    int error = meet(CHANGE, "truncate", of_file(file), NULL);
    if (error) FAIL(error);
    note(file, 0);
    return REAL(ftruncate64)(file, length);
}
int flock(int file, int operation) {
    int error = meet(CHANGE, "lock", of_file(file), NULL);
    if (error) FAIL(error);
    return ((int (*)(int, int))next("flock"))(file, operation);
}

#define NAMED(sort, call, from, path, what) \
    char into[PATH_MAX]; \
    int error = meet(sort, call, below(from, path, into), NULL); \
    if (error) FAIL(error); \
    return what;

int rename(const char *old, const char *path) { NAMED(CHANGE, "rename", AT_FDCWD, path, REAL(rename)(old, path)) }
int unlink(const char *path) { NAMED(CHANGE, "remove", AT_FDCWD, path, REAL(unlink)(path)) }
int unlinkat(int from, const char *path, int flags) {
    NAMED(CHANGE, "remove", from, path, REAL(unlinkat)(from, path, flags))
}
int rmdir(const char *path) { NAMED(CHANGE, "remove", AT_FDCWD, path, REAL(rmdir)(path)) }
int mkdir(const char *path, mode_t mode) { NAMED(CHANGE, "mkdir", AT_FDCWD, path, REAL(mkdir)(path, mode)) }
int link(const char *old, const char *path) { NAMED(CHANGE, "link", AT_FDCWD, path, REAL(link)(old, path)) }
int linkat(int from, const char *old, int to, const char *path, int flags) {
    NAMED(CHANGE, "link", to, path, REAL(linkat)(from, old, to, path, flags))
}
int stat64(const char *path, struct stat64 *data) { NAMED(READ, "stat", AT_FDCWD, path, REAL(stat64)(path, data)) }
int lstat64(const char *path, struct stat64 *data) { NAMED(READ, "stat", AT_FDCWD, path, REAL(lstat64)(path, data)) }
int statx(int from, const char *path, int flags, unsigned mask, struct statx *data) {
    // Of an open file; or without any, by which Rust finds out whether the call exists. The declaration says it cannot be.
    const char *volatile given = path;
    if (!given || !*given) return REAL(statx)(from, path, flags, mask, data);
    NAMED(READ, "stat", from, path, REAL(statx)(from, path, flags, mask, data))
}

DIR *opendir(const char *path) {
    char into[PATH_MAX];
    const char *name = below(AT_FDCWD, path, into);
    int error = meet(READ, "list", name, NULL);
    if (error) return errno = error, NULL;
    DIR *listed = REAL(opendir)(path);
    if (name && listed) remember(dirfd(listed), name);
    return listed;
}
struct dirent64 *readdir64(DIR *listed) {
    int error = meet(READ, "entry", of_file(dirfd(listed)), NULL);
    if (error) return errno = error, NULL;
    return REAL(readdir64)(listed);
}
int closedir(DIR *listed) {
    if (of_file(dirfd(listed))) remember(dirfd(listed), NULL);
    return REAL(closedir)(listed);
}
