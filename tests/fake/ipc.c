/* cudaIpc of the fake device: memory is a memfd, a handle says where /proc has it. As strict as the oldest driver: no process
 * opens its own handle, nor one twice; nobody opens one whose maker is gone. */
#include "tests/fake/fake.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct handle {
    int pid, fd;
    uint64_t inode;
    uint8_t zero[GPU_IPC_HANDLE - 16];
};
static_assert(sizeof(struct handle) == GPU_IPC_HANDLE, "as large as a real one");

/* What this process has of it, its own or opened. */
struct piece {
    struct handle handle;
    void *at;
    uint64_t bytes;
    int fd;
    struct piece *next;
};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct piece *pieces;

static int keep(const struct piece *p, uint64_t *ret_at)
{
    struct piece *mine = malloc(sizeof(*mine));
    if (!mine || p->at == MAP_FAILED) {
        free(mine);
        return -PKV_ERR_GPU_MEMORY;
    }
    *mine = *p;
    pthread_mutex_lock(&lock);
    mine->next = pieces;
    pieces = mine;
    pthread_mutex_unlock(&lock);
    fake_add(&fake_faults()->chunks, 1);
    *ret_at = (uint64_t)(uintptr_t)p->at;
    return 0;
}

int fake_ipc_take(struct gpu_device *d, uint64_t bytes, uint64_t *ret_at, uint8_t ret_handle[])
{
    struct stat s;
    if (gpu_device_lost(d))
        return -PKV_ERR_GPU_LOST;
    if (fake_get(&fake_faults()->refuse_create) || bytes > FAKE_CHUNK_MAX)
        return -PKV_ERR_GPU_MEMORY;
    struct piece p = {.bytes = bytes, .fd = memfd_create("fake-ipc", MFD_CLOEXEC)};
    if (p.fd < 0 || ftruncate(p.fd, (off_t)bytes) || fstat(p.fd, &s))
        return -PKV_ERR_GPU_MEMORY;
    p.handle = (struct handle){.pid = (int)getpid(), .fd = p.fd, .inode = s.st_ino};
    p.at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, p.fd, 0);
    memcpy(ret_handle, &p.handle, sizeof(p.handle));
    return keep(&p, ret_at);
}

static bool opened(const struct handle *h)
{
    bool found = false;
    pthread_mutex_lock(&lock);
    for (const struct piece *p = pieces; p && !found; p = p->next)
        found = !memcmp(&p->handle, h, sizeof(*h));
    pthread_mutex_unlock(&lock);
    return found;
}

int fake_ipc_open(struct gpu_device *d, const uint8_t handle[], uint64_t bytes, uint64_t *ret_at)
{
    struct piece p = {.bytes = bytes, .fd = -1};
    struct stat s;
    char path[64];
    memcpy(&p.handle, handle, sizeof(p.handle));
    if (gpu_device_lost(d))
        return -PKV_ERR_GPU_LOST;
    if (fake_get(&fake_faults()->refuse_import) || p.handle.pid == (int)getpid() || opened(&p.handle))
        return -PKV_ERR_GPU_IPC;
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", p.handle.pid, p.handle.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return -PKV_ERR_GPU_IPC;
    bool right = !fstat(fd, &s) && s.st_ino == p.handle.inode && (uint64_t)s.st_size >= bytes;
    p.at = right ? mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
    close(fd);
    return right ? keep(&p, ret_at) : -PKV_ERR_GPU_IPC;
}

void fake_ipc_give(struct gpu_device *d, uint64_t address, bool own)
{
    (void)d;
    pthread_mutex_lock(&lock);
    struct piece **at = &pieces, *p;
    while (*at && (uint64_t)(uintptr_t)(*at)->at != address)
        at = &(*at)->next;
    p = *at;
    if (!p || (p->fd >= 0) != own)
        abort(); /* freed what is not one's own, or given up twice */
    *at = p->next;
    pthread_mutex_unlock(&lock);
    munmap(p->at, p->bytes);
    if (p->fd >= 0)
        close(p->fd);
    free(p);
    fake_add(&fake_faults()->chunks, UINT32_MAX);
}
