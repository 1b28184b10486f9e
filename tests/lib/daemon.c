/* The private daemon: fork and exec, wait for its socket, end it. */
#include "tests/lib/daemon.h"

#include "tests/lib/test.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define ARGUMENTS 32

static pid_t spawn(const char *socket, const char *const *flags, const char *log)
{
    const char *binary = getenv("PIVOTKVD");
    assert_non_null(binary);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid)
        return pid;
    const char *backend = getenv("PIVOTKV_TEST_BACKEND");
    const char *share = getenv("PIVOTKV_TEST_SHARE");
    const char *argv[ARGUMENTS] = {
        binary, "--socket", socket, "--backend", backend ? backend : "host", "--share", share ? share : "auto"};
    for (int i = 0; flags[i] && i + 8 < ARGUMENTS; i++)
        argv[7 + i] = flags[i];
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that dies leaves nothing behind */
    int fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (fd >= 0)
        dup2(fd, STDERR_FILENO);
    execv(binary, (char *const *)(uintptr_t)argv);
    _exit(127);
}

int test_dial(const struct test_daemon *d)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", d->socket);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    if (connect(fd, (const struct sockaddr *)&address, sizeof(address)) == 0)
        return fd;
    close(fd);
    return -1;
}

static void show_log(const struct test_daemon *d)
{
    char line[512];
    FILE *f = fopen(d->log, "r");
    while (f && fgets(line, sizeof(line), f))
        print_message("  %s", line);
    if (f)
        fclose(f);
}

void test_daemon_start(struct test_daemon *d, const char *const *flags)
{
    snprintf(d->folder, sizeof(d->folder), "/tmp/pivotkv-test-XXXXXX");
    assert_non_null(mkdtemp(d->folder)); /* mode 0700 */
    snprintf(d->socket, sizeof(d->socket), "%s/socket", d->folder);
    snprintf(d->log, sizeof(d->log), "%s/log", d->folder);
    d->pid = spawn(d->socket, flags, d->log);
    for (int i = 0; i < 2000; i++) {
        int fd = test_dial(d), status;
        if (fd >= 0) {
            close(fd);
            return;
        }
        if (waitpid(d->pid, &status, WNOHANG) == d->pid)
            break;
        usleep(10000);
    }
    show_log(d);
    fail_msg("the daemon does not listen");
}

static void remove_folder(const struct test_daemon *d)
{
    static const char *const names[] = {"socket", "socket.lock", "admin", "log"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        char path[160];
        snprintf(path, sizeof(path), "%s/%s", d->folder, names[i]);
        unlink(path);
    }
    rmdir(d->folder);
}

static int wait_for(pid_t pid, int seconds)
{
    int status;
    for (int i = 0; i < seconds * 100; i++) {
        if (waitpid(pid, &status, WNOHANG) == pid)
            return status;
        usleep(10000);
    }
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    fail_msg("the daemon did not end in time");
    return -1;
}

void test_daemon_stop(struct test_daemon *d)
{
    kill(d->pid, SIGTERM);
    int status = wait_for(d->pid, 30);
    if (!WIFEXITED(status) || WEXITSTATUS(status))
        show_log(d);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    remove_folder(d);
}

int test_daemon_ended(struct test_daemon *d)
{
    int status = wait_for(d->pid, 30);
    remove_folder(d);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

int test_daemon_said(const struct test_daemon *d, const char *words)
{
    char line[1024];
    int found = 0;
    for (int i = 0; i < 500 && !found; i++) {
        FILE *f = fopen(d->log, "r");
        while (f && !found && fgets(line, sizeof(line), f))
            found = strstr(line, words) != NULL;
        if (f)
            fclose(f);
        if (!found)
            usleep(10000);
    }
    return found;
}

void test_daemon_kill(struct test_daemon *d)
{
    kill(d->pid, SIGKILL);
    waitpid(d->pid, NULL, 0);
    remove_folder(d);
}

int test_daemon_status(const char *socket, const char *const *flags)
{
    int status = wait_for(spawn(socket, flags, "/dev/null"), 30);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

int test_fds(pid_t pid)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    DIR *folder = opendir(path);
    assert_non_null(folder);
    int n = 0;
    while (readdir(folder))
        n++;
    closedir(folder);
    return n;
}
