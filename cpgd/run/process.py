"""Workers that die with whoever started them. Imports nothing of ours, and no torch: it is called before that."""

import ctypes
import os
import signal
import sys


def die_with_parent() -> None:
    """Under torchrun, have the kernel kill this worker when the launcher dies; Linux only, elsewhere nothing.

    torchrun puts its workers into their own process group, so they outlive a launcher killed by SIGKILL and would keep
    the run directory locked. Call it before torch is imported: until then the launcher can die unnoticed.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(os.getppid())


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, of this pid, dies; Linux only, elsewhere nothing."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)
