/* pivotkv doctor: one row per thing that pivotkv wants of a machine; what it found, and what to do. Fails only for what keeps
 * pivotkv from working. */
#include "client/cli/cli.h"

#include "client/pivotkv.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

void doctor_say(json_t *list, const char *check, enum doctor_status status, const char *found, const char *advice)
{
    static const char *const names[] = {"ok", "warn", "fail"};
    json_array_append_new(list, json_pack("{s:s, s:s, s:s, s:s}", "check", check, "status", names[status], "found", found,
                                          "advice", status == DOCTOR_OK ? "" : advice));
}

static bool first_line(const char *path, char *ret, int room)
{
    FILE *f = fopen(path, "re");
    bool good = f && fgets(ret, room, f);
    if (f)
        fclose(f);
    if (good)
        ret[strcspn(ret, "\n")] = 0;
    return good;
}

static uint64_t meminfo(const char *key)
{
    char line[128];
    unsigned long long value = 0;
    size_t n = strlen(key);
    FILE *f = fopen("/proc/meminfo", "re");
    while (f && fgets(line, sizeof(line), f))
        if (!strncmp(line, key, n) && line[n] == ':')
            value = strtoull(line + n + 1, NULL, 10);
    if (f)
        fclose(f);
    return value;
}

static void check_memory(json_t *list)
{
    char found[96], bytes[32];
    uint64_t available = meminfo("MemAvailable") * 1024;
    snprintf(found, sizeof(found), "%s available", format_bytes(available, bytes));
    doctor_say(list, "memory", available >= 2ull << 30 ? DOCTOR_OK : DOCTOR_WARN, found,
               "pivotkvd takes pool-bytes + arena-bytes at its start (5 GiB by default): make them smaller");
    uint64_t pages = meminfo("HugePages_Free"), size = meminfo("Hugepagesize") * 1024;
    snprintf(found, sizeof(found), "%llu free of %s", (unsigned long long)pages, format_bytes(size, bytes));
    doctor_say(
        list, "huge pages", pages ? DOCTOR_OK : DOCTOR_WARN, found,
        "reads are faster from huge pages: sysctl vm.nr_hugepages=N for pool and arena, or transparent ones for shared memory");
    char mode[128] = "not there";
    bool good = first_line("/sys/kernel/mm/transparent_hugepage/shmem_enabled", mode, sizeof(mode));
    bool on = good && (strstr(mode, "[advise]") || strstr(mode, "[always]") || strstr(mode, "[within_size]"));
    doctor_say(list, "transparent huge pages", on ? DOCTOR_OK : DOCTOR_WARN, mode,
               "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled");
}

static void limit(json_t *list, const char *name, int resource, uint64_t enough, enum doctor_status below, const char *advice)
{
    struct rlimit l = {0, 0};
    char found[64] = "unlimited", bytes[32];
    getrlimit(resource, &l);
    bool good = l.rlim_max == RLIM_INFINITY || l.rlim_max >= enough;
    if (l.rlim_max != RLIM_INFINITY && resource == RLIMIT_MEMLOCK)
        snprintf(found, sizeof(found), "%s", format_bytes(l.rlim_max, bytes));
    else if (l.rlim_max != RLIM_INFINITY)
        snprintf(found, sizeof(found), "%llu", (unsigned long long)l.rlim_max);
    doctor_say(list, name, good ? DOCTOR_OK : below, found, advice);
}

static void check_io_uring(json_t *list)
{
    char disabled[32] = "0";
    first_line("/proc/sys/kernel/io_uring_disabled", disabled, sizeof(disabled));
    /* No parameters: a kernel that allows it says EFAULT. */
    long r = syscall(SYS_io_uring_setup, 1, NULL);
    bool there = r < 0 && errno == EFAULT;
    char found[96];
    snprintf(found, sizeof(found), "%s, kernel.io_uring_disabled = %s", there ? "allowed" : strerror(errno), disabled);
    doctor_say(list, "io_uring", there ? DOCTOR_OK : DOCTOR_WARN, found,
               "the daemon falls back to epoll; allow it with sysctl kernel.io_uring_disabled=0, or in the container's seccomp "
               "profile");
}

static void check_memfd(json_t *list)
{
    int fd = memfd_create("doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE;
    bool good = fd >= 0 && ftruncate(fd, 4096) == 0 && fcntl(fd, F_ADD_SEALS, seals) == 0;
    doctor_say(list, "sealed shared memory", good ? DOCTOR_OK : DOCTOR_FAIL,
               good ? "memfd with F_SEAL_FUTURE_WRITE" : strerror(errno),
               "Linux 5.1 or later, and memfd_create allowed by the sandbox");
    if (fd >= 0)
        close(fd);
}

static void check_cpu(json_t *list)
{
    const char *found = "plain C";
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vpopcntdq"))
        found = "avx512";
    else if (__builtin_cpu_supports("avx2"))
        found = "avx2";
#endif
    doctor_say(list, "instruction set", strcmp(found, "plain C") ? DOCTOR_OK : DOCTOR_WARN, found,
               "the host backend is written for AVX2 and AVX-512");
}

static void check_daemon(const struct cli *cli, json_t *list)
{
    char path[512], folder[512], found[1100];
    struct stat s;
    admin_socket(cli, path, sizeof(path));
    snprintf(folder, sizeof(folder), "%s", path);
    char *slash = strrchr(folder, '/');
    if (slash)
        *slash = 0;
    if (strlen(path) > 107) {
        doctor_say(list, "socket path", DOCTOR_FAIL, path, "a unix socket's path has at most 107 bytes");
    } else if (slash && stat(folder, &s) == 0 && (s.st_uid != geteuid() || s.st_mode & 077)) {
        doctor_say(list, "socket folder", DOCTOR_FAIL, folder,
                   "must be yours with mode 0700: chmod 700, or choose another --socket");
    } else {
        doctor_say(list, "socket folder", DOCTOR_OK, folder, "");
    }
    struct pkv_options o = {.size = sizeof(o), .threads = 1, .label = "doctor", .timeout_ms = (uint32_t)cli->timeout_ms};
    struct pkv *kv;
    if (pkv_connect(path, &o, &kv)) {
        snprintf(found, sizeof(found), "%s: %s", path, pkv_error(NULL));
        doctor_say(list, "daemon", DOCTOR_WARN, found, "start pivotkvd, or name its socket with --socket");
        return;
    }
    uint64_t ns = 0;
    pkv_ping(kv, &ns);
    pkv_ping(kv, &ns);
    snprintf(found, sizeof(found), "answers on %s, round trip %.1f us, %s", path, (double)ns / 1000, pkv_describe(kv));
    doctor_say(list, "daemon", DOCTOR_OK, found, "");
    pkv_close(kv);
}

int cli_doctor(struct cli *cli)
{
    cli_no_more(cli);
    json_t *list = json_array();
    check_memory(list);
    limit(list, "locked memory", RLIMIT_MEMLOCK, 64ull << 20, DOCTOR_WARN,
          "pinning and io_uring on older kernels need more: ulimit -l, LimitMEMLOCK= in a unit");
    limit(list, "open files", RLIMIT_NOFILE, 1024, DOCTOR_FAIL,
          "every chunk is a descriptor: ulimit -n 65536, LimitNOFILE= in a unit");
    check_io_uring(list);
    check_memfd(list);
    check_cpu(list);
    doctor_gpu(list);
    check_daemon(cli, list);
    int code = CLI_GOOD;
    size_t i;
    const json_t *row;
    json_array_foreach(list, i, row)
    {
        if (!strcmp(format_text(row, "status"), "fail"))
            code = CLI_FAILED;
        if (!cli->json) {
            printf("%-4s  %-22s  %s\n", format_text(row, "status"), format_text(row, "check"), format_text(row, "found"));
            if (format_text(row, "advice")[0])
                printf("      %-22s  -> %s\n", "", format_text(row, "advice"));
        }
    }
    if (cli->json)
        format_json(list);
    else
        json_decref(list);
    return code;
}
