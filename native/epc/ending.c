/* A process ends when its last thread does. The pager's two never do, so somebody has to notice when they
 * are the only ones left, as after pthread_exit in main. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pager_state.h"

/* Links of a task folder: two as of any folder, one for each thread. */
#define OURS_AND_THE_FIRST (2 + 2 + 1)

/* Whether all threads of the program have ended; the first one stays as a zombie while there are others. No
 * file is opened: the program may be about to open one and count on its number. */
static bool alone(void) {
    struct stat tasks;
    char path[64], to[1];
    if (stat("/proc/self/task", &tasks) != 0 || tasks.st_nlink != OURS_AND_THE_FIRST) {
        return false;
    }
    snprintf(path, sizeof path, "/proc/self/task/%d/cwd", (int)getpid());
    return readlink(path, to, sizeof to) < 0 && errno == ENOENT; /* a zombie has none */
}

/* As the C library does when the last thread ends, and with a thread of the program's priority, which
 * takes signals: its exit handlers may take long. */
static void *end(void *unused) {
    (void)unused;
    struct sched_param none = {0};
    sigset_t all;
    sigfillset(&all);
    pthread_setschedparam(pthread_self(), SCHED_OTHER, &none);
    pthread_sigmask(SIG_UNBLOCK, &all, NULL);
    exit(0);
}

void epc_end_if_alone(void) {
    static bool ending;
    pthread_t thread; /* not the reclaimer: exit handlers may need frames */
    if (!ending && alone() && pthread_create(&thread, NULL, end, NULL) == 0) {
        ending = true;
    }
}
