/* What a test may do to the fake device (tests/fake/module.c): a file that the test and the processes that it starts map, named
 * by $PIVOTKV_FAKE_FAULTS. Words are atomic; zero is a device without faults. */
#ifndef TESTS_FAKE_FAULTS_H
#define TESTS_FAKE_FAULTS_H

#include <stdint.h>

struct fake_faults {
    /* written by the test */
    uint32_t lost;           /* every call from now on says that the device is lost */
    uint32_t lost_in_copies; /* counts down: the copy that takes it to zero stops half way and loses the device */
    uint32_t copies_fail;    /* counts down: each such call of copy fails, nothing of it is done */
    uint32_t copies_hang;    /* while set, copies do not end */
    uint32_t steps_hang;     /* while set, streams do not come to the end of a batch's step */
    uint32_t copy_delay_us;  /* before each copy */
    uint32_t refuse_create, refuse_import, refuse_register, refuse_read_only; /* while set */
    uint32_t no_export, no_ipc; /* the device says that it cannot share memory by VMM descriptors, by cudaIpc handles */
    uint32_t refuse_export;     /* it says that it can by descriptors, and cannot */
    /* written by the device */
    uint32_t copies, bytes_copied, chunks, pins; /* done so far; alive now, in all processes */
    uint32_t zeroed;
};

/* Beside it: $PIVOTKV_FAKE_DEVICES, how many devices a process sees; 1 where it is not set. */

#endif
