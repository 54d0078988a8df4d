/* A disk that is full from the N-th call on that takes space below a folder. For benchmarks/diskfull.py.

   Preloaded with LD_PRELOAD. Counts the calls of the process, whichever library makes them, that create a file or a
   folder, write, extend, rename or sync below the armed folder. The N-th fails with ENOSPC: a write of several bytes
   first writes half of them, as a disk does that has room for half, and its continuation fails. With `stays`, all later
   calls fail too, until `diskfull_disarm`. Each call is written to a log: number, kind, bytes, path, and what it met. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static size_t root_length;
static long nth, count;
static int stays, log_fd = -1, armed, full, rest_fails;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void diskfull_arm(const char *folder, long number, int for_good, int descriptor) {
    root_length = strlen(folder);
    memcpy(root, folder, root_length + 1);
    nth = number, count = 0, stays = for_good, log_fd = descriptor, full = rest_fails = 0, armed = 1;
}

void diskfull_disarm(void) { armed = 0; }

static int below(const char *path) {
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

/* The path of a name that is relative to a folder's descriptor; 0 if it is not below the root. */
static int resolve(int folder, const char *name, char *path) {
    if (name == NULL) return 0;
    if (name[0] == '/') {
        if (strlen(name) >= PATH_MAX) return 0;
        strcpy(path, name);
        return below(path);
    }
    char link[64];
    if (folder == AT_FDCWD) strcpy(link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    if (n < 0 || n + 1 + strlen(name) >= PATH_MAX) return 0;
    path[n] = '/';
    strcpy(path + n + 1, name);
    return below(path);
}

static int path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

/* Counts a call: 0 it passes, 1 it fails, 2 half of it is written. */
static int counted(const char *kind, const char *path, size_t bytes, int divides) {
    pthread_mutex_lock(&lock);
    int verdict = full || (rest_fails && divides);
    if (verdict && !full) rest_fails = 0;
    count++;
    if (!verdict && count == nth) {
        verdict = divides && bytes > 1 ? 2 : 1;
        full = stays;
        rest_fails = verdict == 2 && !stays;
    }
    if (log_fd >= 0) {
        char line[PATH_MAX + 128];
        int n = snprintf(line, sizeof line, "%ld\t%s\t%zu\t%s\t%d\n", count, kind, bytes, path, verdict);
        syscall(SYS_write, log_fd, line, (size_t)n);
    }
    pthread_mutex_unlock(&lock);
    if (verdict == 1) errno = ENOSPC;
    return verdict;
}

#define REAL(type, name, ...)                                   \
    static type (*real)(__VA_ARGS__);                           \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int exists(const char *path) {
    struct stat found;
    return lstat(path, &found) == 0;
}

/* Where the folder above is missing, or the name is taken, that is what the kernel says. */
static int creates(const char *path) {
    char above[PATH_MAX];
    strcpy(above, path);
    char *slash = strrchr(above, '/');
    if (slash == NULL || slash == above) return 0;
    *slash = 0;
    return exists(above) && !exists(path);
}

/* Opening takes space only where it creates. */
static int open_fails(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    if (!armed || !(flags & O_CREAT) || !resolve(folder, name, path) || !creates(path)) return 0;
    return counted("create", path, 0, 0);
}

#define OPEN(name)                                                    \
    int name(const char *path, int flags, ...) {                      \
        REAL(int, #name, const char *, int, ...);                     \
        va_list rest;                                                 \
        va_start(rest, flags);                                        \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                 \
        return open_fails(AT_FDCWD, path, flags) ? -1 : real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                  \
    int name(int folder, const char *path, int flags, ...) {          \
        REAL(int, #name, int, const char *, int, ...);                \
        va_list rest;                                                 \
        va_start(rest, flags);                                        \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                 \
        return open_fails(folder, path, flags) ? -1 : real(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define CREAT(name)                                                   \
    int name(const char *path, mode_t mode) {                         \
        REAL(int, #name, const char *, mode_t);                       \
        return open_fails(AT_FDCWD, path, O_CREAT) ? -1 : real(path, mode); \
    }
CREAT(creat)
CREAT(creat64)

#define FOPEN(name)                                                   \
    FILE *name(const char *path, const char *mode) {                  \
        REAL(FILE *, #name, const char *, const char *);              \
        return open_fails(AT_FDCWD, path, mode[0] == 'r' ? 0 : O_CREAT) ? NULL : real(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int descriptor, const void *data, size_t bytes) {
    REAL(ssize_t, "write", int, const void *, size_t);
    char path[PATH_MAX];
    if (armed && path_of(descriptor, path)) {
        int verdict = counted("write", path, bytes, 1);
        if (verdict) return verdict == 1 ? -1 : real(descriptor, data, bytes / 2);
    }
    return real(descriptor, data, bytes);
}

#define PWRITE(name, offset_type)                                                   \
    ssize_t name(int descriptor, const void *data, size_t bytes, offset_type at) {  \
        REAL(ssize_t, #name, int, const void *, size_t, offset_type);               \
        char path[PATH_MAX];                                                        \
        if (armed && path_of(descriptor, path)) {                                   \
            int verdict = counted("write", path, bytes, 1);                         \
            if (verdict) return verdict == 1 ? -1 : real(descriptor, data, bytes / 2, at); \
        }                                                                           \
        return real(descriptor, data, bytes, at);                                   \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int descriptor, const struct iovec *parts, int n) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    char path[PATH_MAX];
    if (armed && path_of(descriptor, path)) {
        size_t bytes = 0;
        for (int i = 0; i < n; i++) bytes += parts[i].iov_len;
        if (counted("write", path, bytes, 0)) return -1;
    }
    return real(descriptor, parts, n);
}

#define SYNC(name)                                                              \
    int name(int descriptor) {                                                  \
        REAL(int, #name, int);                                                  \
        char path[PATH_MAX];                                                    \
        return armed && path_of(descriptor, path) && counted("sync", path, 0, 0) ? -1 : real(descriptor); \
    }
SYNC(fsync)
SYNC(fdatasync)

#define TRUNCATE(name, size_type)                                               \
    int name(int descriptor, size_type size) {                                  \
        REAL(int, #name, int, size_type);                                       \
        char path[PATH_MAX];                                                    \
        struct stat now;                                                        \
        if (armed && fstat(descriptor, &now) == 0 && size > now.st_size && path_of(descriptor, path) \
            && counted("extend", path, (size_t)size, 0)) return -1;             \
        return real(descriptor, size);                                          \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define FALLOCATE(name, offset_type)                                            \
    int name(int descriptor, int mode, offset_type at, offset_type size) {      \
        REAL(int, #name, int, int, offset_type, offset_type);                   \
        char path[PATH_MAX];                                                    \
        return armed && path_of(descriptor, path) && counted("extend", path, (size_t)size, 0) \
            ? -1 : real(descriptor, mode, at, size);                            \
    }
FALLOCATE(fallocate, off_t)
FALLOCATE(fallocate64, off64_t)

#define POSIX_FALLOCATE(name, offset_type)                                      \
    int name(int descriptor, offset_type at, offset_type size) {                \
        REAL(int, #name, int, offset_type, offset_type);                        \
        char path[PATH_MAX];                                                    \
        return armed && path_of(descriptor, path) && counted("extend", path, (size_t)size, 0) \
            ? ENOSPC : real(descriptor, at, size);                              \
    }
POSIX_FALLOCATE(posix_fallocate, off_t)
POSIX_FALLOCATE(posix_fallocate64, off64_t)

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *put, size_t bytes, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    char path[PATH_MAX];
    return armed && path_of(to, path) && counted("write", path, 0, 0) ? -1 : real(from, at, to, put, bytes, flags);
}

#define SENDFILE(name, offset_type)                                             \
    ssize_t name(int to, int from, offset_type *at, size_t bytes) {             \
        REAL(ssize_t, #name, int, int, offset_type *, size_t);                  \
        char path[PATH_MAX];                                                    \
        return armed && path_of(to, path) && counted("write", path, 0, 0) ? -1 : real(to, from, at, bytes); \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

static int name_fails(const char *kind, int folder, const char *name) {
    char path[PATH_MAX];
    if (!armed || !resolve(folder, name, path) || (strcmp(kind, "rename") != 0 && !creates(path))) return 0;
    return counted(kind, path, 0, 0);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return name_fails("mkdir", AT_FDCWD, path) ? -1 : real(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    return name_fails("mkdir", folder, path) ? -1 : real(folder, path, mode);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return name_fails("rename", AT_FDCWD, to) ? -1 : real(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    return name_fails("rename", to_folder, to) ? -1 : real(from_folder, from, to_folder, to);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    return name_fails("rename", to_folder, to) ? -1 : real(from_folder, from, to_folder, to, flags);
}

int link(const char *from, const char *to) {
    REAL(int, "link", const char *, const char *);
    return name_fails("link", AT_FDCWD, to) ? -1 : real(from, to);
}

int symlink(const char *from, const char *to) {
    REAL(int, "symlink", const char *, const char *);
    return name_fails("link", AT_FDCWD, to) ? -1 : real(from, to);
}
