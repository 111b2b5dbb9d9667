"""Become another program, one that dies with the process that started it.

    python -I -S tether.py PARENT_PID PROGRAM ARGUMENT...

A script of its own, never imported: Python code that runs between fork and exec can deadlock in a process
with threads (gRPC has many), so what must happen there happens here, in a fresh interpreter that then turns
into the program. ``-I`` also keeps this folder off the path, where ``queue.py`` would shadow the standard
library's. Where the kernel takes no such request (macOS) the program starts all the same.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        # The setting survives exec. SIGKILL, because nothing that a child could still tidy up is of use once
        # the others are gone, and a child that hangs must not stay either.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            # The parent died before the request was made: nobody will be told any more.
            sys.exit("the process that started this one is gone")
    # Python ignores these two, and what is ignored stays ignored through exec.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execvp(program[0], program)  # noqa: S606 - no shell is the point


if __name__ == "__main__":
    main()
