/* A disk that fails, and one that remembers what was never flushed: LD_PRELOAD it under the program.
 *
 * Every writer of the program goes through the C library (Python, Arrow's C++, safetensors' Rust, SQLite), so that
 * this is one place for all of them.
 *
 * FAULT_CALL   write | fsync | rename | open: which call fails; unset = none
 * FAULT_PATH   part of the path of the files that it fails on
 * FAULT_ERRNO  the error's number
 * FAULT_AFTER  so many such calls succeed first; all later ones fail
 * FAULT_LOG    file that takes a line for each "w PATH" (written), "s PATH\tSIZE" (flushed), "r OLD\tNEW" (renamed)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int calls;

static int fails(const char *call, const char *path) {
  const char *wanted = getenv("FAULT_CALL"), *part = getenv("FAULT_PATH"), *after = getenv("FAULT_AFTER");
  if (!wanted || strcmp(wanted, call) || !part || !strstr(path, part)) return 0;
  if (__sync_fetch_and_add(&calls, 1) < (after ? atoi(after) : 0)) return 0;
  errno = atoi(getenv("FAULT_ERRNO"));
  return 1;
}

static const char *path_of(int fd, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  path[length < 0 ? 0 : length] = 0;
  return path;
}

static void say(char what, const char *one, const char *two) {
  static __typeof__(&write) out;
  static int log = -2;
  const char *name = getenv("FAULT_LOG");
  if (!name) return;
  int before = errno;
  if (!out) out = (__typeof__(&write))dlsym(RTLD_NEXT, "write");
  if (log == -2) {
    __typeof__(&open) opening = (__typeof__(&open))dlsym(RTLD_NEXT, "open");
    log = opening(name, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  }
  char line[2 * PATH_MAX + 8];
  int length = snprintf(line, sizeof line, two ? "%c %s\t%s\n" : "%c %s\n", what, one, two);
  if (strstr(line, "/runs/")) out(log, line, length);
  errno = before;
}

#define WRITER(name, signature, arguments)            \
  ssize_t name signature {                            \
    REAL(name);                                       \
    char path[PATH_MAX];                              \
    if (fd > 2 && *path_of(fd, path) == '/') {        \
      if (fails("write", path)) return -1;            \
      say('w', path, NULL);                           \
    }                                                 \
    return real arguments;                            \
  }

WRITER(write, (int fd, const void *data, size_t size), (fd, data, size))
WRITER(pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
WRITER(pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
WRITER(writev, (int fd, const struct iovec *data, int count), (fd, data, count))
WRITER(copy_file_range, (int from, off64_t *in, int fd, off64_t *out, size_t size, unsigned flags),
       (from, in, fd, out, size, flags))
WRITER(sendfile, (int fd, int from, off_t *offset, size_t size), (fd, from, offset, size))
WRITER(sendfile64, (int fd, int from, off64_t *offset, size_t size), (fd, from, offset, size))

#define FLUSHER(name)                         \
  int name(int fd) {                          \
    REAL(name);                               \
    char path[PATH_MAX];                      \
    path_of(fd, path);                        \
    if (fails("fsync", path)) return -1;      \
    int code = real(fd);                      \
    struct stat about;                        \
    char size[32] = "0";                      \
    if (!fstat(fd, &about)) snprintf(size, sizeof size, "%lld", (long long)about.st_size); \
    if (!code) say('s', path, size);          \
    return code;                              \
  }

FLUSHER(fsync)
FLUSHER(fdatasync)

static const char *absolute(const char *path, char *whole) {
  if (*path == '/') return path;
  if (!getcwd(whole, PATH_MAX / 2)) return path;
  strcat(whole, "/");
  return strncat(whole, path, PATH_MAX / 2 - 1);
}

int rename(const char *old, const char *new) {
  REAL(rename);
  char first[PATH_MAX], second[PATH_MAX];
  if (fails("rename", absolute(old, first))) return -1;
  int code = real(old, new);
  if (!code) say('r', absolute(old, first), absolute(new, second));
  return code;
}

#define OPENER(name)                                                     \
  int name(const char *path, int flags, ...) {                           \
    REAL(name);                                                          \
    va_list more;                                                        \
    va_start(more, flags);                                               \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
    va_end(more);                                                        \
    char whole[PATH_MAX];                                                \
    if (flags & (O_WRONLY | O_RDWR) && fails("open", absolute(path, whole))) return -1; \
    return real(path, flags, mode);                                      \
  }

OPENER(open)
OPENER(open64)
