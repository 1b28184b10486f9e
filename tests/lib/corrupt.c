/* Through /proc: the arena's mappings in the daemon are those of the files that are sealed against writers to come. */
#include "tests/lib/corrupt.h"

#include "tests/lib/test.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

/* Whether the file of that inode, open in the process, is such a one, and as large as a chunk. */
static int is_arena(pid_t pid, unsigned long inode)
{
    char path[300];
    int found = 0;
    snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    DIR *folder = opendir(path);
    struct dirent *e;
    while (folder && !found && (e = readdir(folder))) {
        struct stat s;
        snprintf(path, sizeof(path), "/proc/%d/fd/%s", (int)pid, e->d_name);
        int fd = stat(path, &s) || s.st_ino != inode || s.st_size < 1 << 16 ? -1 : open(path, O_RDONLY | O_CLOEXEC);
        int seals = fd < 0 ? -1 : fcntl(fd, F_GET_SEALS);
        found = seals >= 0 && seals & F_SEAL_FUTURE_WRITE;
        if (fd >= 0)
            close(fd);
    }
    if (folder)
        closedir(folder);
    return found;
}

static int corrupt(int memory, unsigned long begin, unsigned long end, const void *bytes, size_t count)
{
    char *copy = malloc(end - begin);
    int found = 0;
    assert_non_null(copy);
    if (pread(memory, copy, end - begin, (off_t)begin) != (ssize_t)(end - begin)) {
        free(copy);
        return -1;
    }
    for (char *at = copy; at && (at = memmem(at, (size_t)(copy + (end - begin) - at), bytes, count)); at += count) {
        char flipped = (char)(*at ^ 4);
        if (pwrite(memory, &flipped, 1, (off_t)(begin + (unsigned long)(at - copy))) != 1) {
            free(copy);
            return -1;
        }
        found++;
    }
    free(copy);
    return found;
}

int test_corrupt_arena(pid_t daemon, const void *bytes, size_t count)
{
    char path[64], line[512];
    int found = 0;
    snprintf(path, sizeof(path), "/proc/%d/mem", (int)daemon);
    int memory = open(path, O_RDWR | O_CLOEXEC);
    snprintf(path, sizeof(path), "/proc/%d/maps", (int)daemon);
    FILE *maps = memory < 0 ? NULL : fopen(path, "re");
    if (!maps) {
        if (memory >= 0)
            close(memory);
        return -1;
    }
    while (found >= 0 && fgets(line, sizeof(line), maps)) {
        unsigned long begin, end, inode = 0;
        if (!strstr(line, "/memfd:pivotkv ") || sscanf(line, "%lx-%lx %*s %*s %*s %lu", &begin, &end, &inode) != 3 ||
            !is_arena(daemon, inode))
            continue;
        int more = corrupt(memory, begin, end, bytes, count);
        found = more < 0 ? -1 : found + more;
    }
    fclose(maps);
    close(memory);
    return found;
}
