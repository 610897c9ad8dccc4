/* Signal handlers that use the region's memory whenever they come. */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/time.h>
#include <sys/wait.h>

#include "epc_rig.h"

#define PAGES (4 * LIMIT)
#define FORKS 60
#define DROPS 300

static char *big;
static volatile sig_atomic_t handled;

/* Nearly every page that it touches is evicted: it goes round in four times the limit. */
static void on_alarm(int number) {
    (void)number;
    static size_t at;
    for (int i = 0; i < 32; i++) {
        at = (at + 1) % PAGES;
        big[at * EPC_PAGE]++;
    }
    handled++;
}

/* This runs after the pager's own handler, while it holds still for fork. */
static void during_fork(void) { raise(SIGALRM); }

static bool is_blocked(void) {
    sigset_t now;
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &now) == 0);
    return sigismember(&now, SIGALRM);
}

static void fork_once(void) {
    int before = handled;
    pid_t child = fork();
    CHECK(child >= 0);
    CHECK(!is_blocked());
    if (child == 0) {
        on_alarm(SIGALRM);
        _exit(0);
    }
    int status;
    while (waitpid(child, &status, 0) < 0) {
    }
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(handled > before);
}

/* Promise: a handler may use the region's memory at any time, also while the program forks or gives
 * memory back; and both leave the program's mask as it was. */
int main(void) {
    CHECK(pthread_atfork(during_fork, NULL, NULL) == 0);
    start();
    big = epc_allocate(PAGES * EPC_PAGE, 1, true);
    char *other = epc_allocate(PAGES * EPC_PAGE, 1, false);
    CHECK(big != NULL && other != NULL);
    struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    struct itimerval often = {{0, 2000}, {0, 2000}}, never = {{0, 0}, {0, 0}};
    CHECK(sigaction(SIGALRM, &action, NULL) == 0);
    CHECK(setitimer(ITIMER_REAL, &often, NULL) == 0);
    for (int i = 0; i < FORKS; i++) {
        fork_once();
    }
    for (int i = 0; i < DROPS; i++) {
        memset(other, i, LIMIT / 4 * EPC_PAGE);
        epc_clear(other, PAGES * EPC_PAGE);
        CHECK(other[0] == 0 && !is_blocked());
    }
    CHECK(setitimer(ITIMER_REAL, &never, NULL) == 0);
    CHECK(resident(true) <= LIMIT);
    return 0;
}
