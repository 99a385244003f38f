// A power cut for one process, as a preloaded library: keeps in POWERCUT_SHADOW what the files under POWERCUT_DIR
// would hold if all that was not synced were lost. fsync and fdatasync count; sync_file_range does not, because it
// commits neither a file's size nor the drive's cache.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void die(const char *what, const char *path) {
    fprintf(stderr, "powercut: %s %s\n", what, path);
    _exit(99);
}

static void copy(const char *from, const char *to) {
    char temporary[PATH_MAX + 16], buffer[1 << 16];
    snprintf(temporary, sizeof temporary, "%s.powercut", to);
    int in = open(from, O_RDONLY | O_CLOEXEC);
    if (in < 0) return; // removed meanwhile
    int out = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (out < 0) die("cannot write", temporary);
    ssize_t n;
    while ((n = read(in, buffer, sizeof buffer)) > 0)
        if (write(out, buffer, (size_t)n) != n) die("short write", temporary);
    close(in);
    close(out);
    if (rename(temporary, to) != 0) die("cannot rename", to);
}

// Where `fd` is, and where its shadow is; 0 if it is none of the watched files.
static int locate(int fd, char path[PATH_MAX], char to[2 * PATH_MAX]) {
    const char *dir = getenv("POWERCUT_DIR"), *shadow = getenv("POWERCUT_SHADOW");
    char link[64];
    if (!dir || !shadow) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    size_t len = strlen(dir);
    if (strncmp(path, dir, len) != 0 || (path[len] != '/' && path[len] != 0)) return 0;
    snprintf(to, 2 * PATH_MAX, "%s%s", shadow, path + len);
    return 1;
}

static int is_data(const char *path) {
    size_t len = strlen(path);
    return len > 3 && strcmp(path + len - 3, "/db") == 0;
}

// What was written to the data file since it was last synced, so that a sync need not copy all of it.
#define MAX_DIRTY 4096
static struct { off_t at; size_t len; } dirty[MAX_DIRTY];
static int dirty_count;

static void written(int fd, off_t at, size_t len) {
    char path[PATH_MAX], to[2 * PATH_MAX];
    if (!locate(fd, path, to) || !is_data(path)) return;
    pthread_mutex_lock(&lock);
    if (dirty_count < MAX_DIRTY) {
        dirty[dirty_count].at = at;
        dirty[dirty_count].len = len;
    }
    dirty_count++;
    pthread_mutex_unlock(&lock);
}

// A kill in the middle leaves some of what was being synced, as a power cut would.
static void copy_dirty(const char *from, const char *to, off_t size) {
    int in = open(from, O_RDONLY | O_CLOEXEC), out = open(to, O_WRONLY | O_CLOEXEC);
    if (in < 0 || out < 0 || dirty_count > MAX_DIRTY) {
        copy(from, to);
    } else {
        if (ftruncate(out, size) != 0) die("cannot truncate", to);
        for (int i = 0; i < dirty_count; i++) {
            char *buffer = malloc(dirty[i].len);
            ssize_t n = pread(in, buffer, dirty[i].len, dirty[i].at);
            // Not by our own pwrite below: this file is not watched, but the lock is held.
            if (n > 0 && (lseek(out, dirty[i].at, SEEK_SET) < 0 || write(out, buffer, (size_t)n) != n))
                die("short write", to);
            free(buffer);
        }
    }
    dirty_count = 0;
    if (in >= 0) close(in);
    if (out >= 0) close(out);
}

static void synced(int fd) {
    char path[PATH_MAX], to[2 * PATH_MAX];
    struct stat st;
    if (!locate(fd, path, to) || fstat(fd, &st) != 0) return;
    pthread_mutex_lock(&lock);
    if (S_ISREG(st.st_mode)) {
        if (is_data(path)) copy_dirty(path, to, st.st_size);
        else copy(path, to);
    } else if (S_ISDIR(st.st_mode)) {
        // The entries: new names appear, removed ones go.
        char a[PATH_MAX * 2], b[PATH_MAX * 3];
        mkdir(to, 0700);
        for (int pass = 0; pass < 2; pass++) {
            DIR *entries = opendir(pass ? to : path);
            struct dirent *entry;
            while (entries && (entry = readdir(entries))) {
                if (entry->d_name[0] == '.') continue;
                snprintf(a, sizeof a, "%s/%s", path, entry->d_name);
                snprintf(b, sizeof b, "%s/%s", to, entry->d_name);
                if (pass == 1 && access(a, F_OK) != 0) {
                    remove(b);
                } else if (pass == 0 && access(b, F_OK) != 0) {
                    if (entry->d_type == DT_DIR) mkdir(b, 0700);
                    else copy(a, b);
                } else if (pass == 0 && entry->d_type == DT_REG && strcmp(entry->d_name, "db") != 0) {
                    copy(a, b); // replaced by a rename
                }
            }
            if (entries) closedir(entries);
        }
    }
    pthread_mutex_unlock(&lock);
}

#define WRAP(name)                                              \
    int name(int fd) {                                          \
        static int (*real)(int);                                \
        if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, #name); \
        int result = real(fd);                                  \
        if (result == 0) synced(fd);                            \
        return result;                                          \
    }
WRAP(fsync)
WRAP(fdatasync)

#define WRAP_WRITE(name, offset)                                                      \
    ssize_t name(int fd, const void *bytes, size_t len, offset at) {                  \
        static ssize_t (*real)(int, const void *, size_t, offset);                    \
        if (!real) real = (ssize_t(*)(int, const void *, size_t, offset))dlsym(RTLD_NEXT, #name); \
        ssize_t result = real(fd, bytes, len, at);                                    \
        if (result > 0) written(fd, at, (size_t)result);                              \
        return result;                                                                \
    }
WRAP_WRITE(pwrite, off_t)
WRAP_WRITE(pwrite64, off64_t)
