"""Run as a script: become another program that the kernel kills when its parent dies.

``python -I -S die_with_host.py PARENT_PID [NAME=VALUE...] -- PROGRAM ARGUMENT...`` asks for
SIGKILL at the parent's death (prctl(2), PR_SET_PDEATHSIG, kept over execve) and turns into the
program, with those variables beside its own: LD_PRELOAD is for the program alone. A function run
between fork and exec (``preexec_fn``) could do it too, but is not safe in a process with threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the host has died already")
    middle = sys.argv.index("--")
    variables = dict(item.split("=", 1) for item in sys.argv[2:middle])
    program = sys.argv[middle + 1 :]
    os.execve(program[0], program, os.environ | variables)  # noqa: S606 - the host's own choice
