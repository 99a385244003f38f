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

static void synced(int fd) {
    const char *dir = getenv("POWERCUT_DIR"), *shadow = getenv("POWERCUT_SHADOW");
    char link[64], path[PATH_MAX], to[2 * PATH_MAX];
    if (!dir || !shadow) return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return;
    path[n] = 0;
    size_t len = strlen(dir);
    if (strncmp(path, dir, len) != 0 || (path[len] != '/' && path[len] != 0)) return;
    snprintf(to, sizeof to, "%s%s", shadow, path + len);
    struct stat st;
    if (fstat(fd, &st) != 0) return;
    pthread_mutex_lock(&lock);
    if (S_ISREG(st.st_mode)) {
        copy(path, to);
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
