/* A GPU on a CPU: the fake CUDA module for this process and those that it starts, and its faults. */
#ifndef TESTS_LIB_FAULTS_H
#define TESTS_LIB_FAULTS_H

#include "tests/fake/faults.h"

/* Before anything opens the module; the same faults every time. The file is gone when the process ends. */
struct fake_faults *test_faults(void);

#endif
