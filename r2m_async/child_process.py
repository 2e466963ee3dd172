"""What a process owes to the one that started it: to end with it, and the address it was told. Linux only."""

import ctypes
import multiprocessing
import os
import signal

NODE_ADDRESS = "R2M_NODE_ADDRESS"
"""Environment variable of a stage's process: the address of its machine as the other stages' machines know it."""


def end_with_parent() -> None:
    """Makes the kernel kill this process when its parent ends.

    Call it at the start of a process that `multiprocessing` started. Beware: the kernel already kills this process when
    the thread that started it ends, even if the parent lives on.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was not started by multiprocessing"
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent.pid:
        # The parent ended before `prctl` was called, so no signal will come.
        os._exit(1)
