/* One descriptor over a unix socket. */
#ifndef TESTS_LIB_PASS_H
#define TESTS_LIB_PASS_H

#include <stdbool.h>

bool test_send_fd(int socket, int fd);
/* -1: none came. */
int test_receive_fd(int socket);

#endif
