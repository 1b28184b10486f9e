/* A private daemon in a folder of its own: started with the given flags, ended with the test. */
#ifndef TESTS_LIB_DAEMON_H
#define TESTS_LIB_DAEMON_H

#include <sys/types.h>

struct test_daemon {
    pid_t pid;
    char folder[64], socket[80], log[80];
};

/* `flags`: NULL-terminated, beside --socket, --backend ($PIVOTKV_TEST_BACKEND, else host) and --share ($PIVOTKV_TEST_SHARE); at
 * most 24. Fails the test if the
 * daemon does not listen within 20 s. */
void test_daemon_start(struct test_daemon *daemon, const char *const *flags);
/* SIGTERM, and fails the test unless it ends cleanly within 10 s. The folder goes. */
void test_daemon_stop(struct test_daemon *daemon);
void test_daemon_kill(struct test_daemon *daemon);
/* One that ends by itself, within 30 s: its exit status. The folder goes. */
int test_daemon_ended(struct test_daemon *daemon);
/* Whether the daemon's log has the words, now or within 5 s: it listens before it is ready. */
int test_daemon_said(const struct test_daemon *daemon, const char *words);
/* Runs pivotkvd with flags and waits: its exit status. */
int test_daemon_status(const char *socket, const char *const *flags);
/* Open descriptors of a process. */
int test_fds(pid_t pid);
/* The connected socket of a raw client. */
int test_dial(const struct test_daemon *daemon);

#endif
