/* pivotkvd: reads its settings, serves until it is told to end. */
#include "cachesvc/daemon.h"

#include <errno.h>
#include <signal.h>
#include <sys/resource.h>

/* Every chunk is a descriptor. */
static void raise_limits(void)
{
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}

int main(int argc, char **argv)
{
    struct config config;
    struct daemon *daemon;
    enum config_outcome outcome = config_read(argc, argv, &config);
    if (outcome != CONFIG_RUN)
        return outcome == CONFIG_DONE ? 0 : 2;
    log_set_level((enum log_level)config.log_level);
    signal(SIGPIPE, SIG_IGN);
    raise_limits();
    if (daemon_create(&config, &daemon))
        return 1;
    int r = daemon_run(daemon);
    daemon_destroy(daemon);
    log_info("ended");
    return r == -ENOTRECOVERABLE ? DAEMON_EXIT_GPU_LOST : r ? 1 : 0;
}
