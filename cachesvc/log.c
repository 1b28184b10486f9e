/* Lines are written whole, so that two threads do not mix theirs. */
#include "cachesvc/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

const char *const log_level_names[LOG_LEVELS] = {"error", "warn", "info", "debug"};
static enum log_level most = LOG_INFO;

void log_set_level(enum log_level level)
{
    most = level;
}

void log_write(enum log_level level, const char *format, ...)
{
    if (level > most)
        return;
    char line[1024];
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int n = snprintf(line, sizeof(line), "pivotkvd %lld.%03ld %s: ", (long long)now.tv_sec, now.tv_nsec / 1000000,
                     log_level_names[level]);
    va_list list;
    va_start(list, format);
    int m = vsnprintf(line + n, sizeof(line) - (size_t)n - 1, format, list);
    va_end(list);
    size_t end = (size_t)n + (m < 0 ? 0 : (size_t)m);
    end = end < sizeof(line) - 1 ? end : sizeof(line) - 2;
    line[end++] = '\n';
    if (write(STDERR_FILENO, line, end) < 0)
        return; /* a log that nobody can read is no reason to stop serving */
}
