"""Runs first in every Python process of a vLLM server that cosmo-rl has started (see ../serve.py).

The process dies with its parent: a killed trainer leaves no server behind, a killed server none of its workers. And
torchvision, of which the public index has CUDA builds only, can be imported beside torch's CPU build: it registers a
fake kernel for two of its compiled operators, which it cannot load there, and which nothing here calls.
"""

import ctypes
import os
import signal
import sys
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, version

PR_SET_PDEATHSIG = 1
if sys.platform == "linux" and "COSMO_RL_PARENT" in os.environ:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1 and os.environ["COSMO_RL_PARENT"] != "1":  # its parent died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


class _BeforeTorchvision(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            try:
                built = version("torchvision")
            except PackageNotFoundError:
                return None
            if "+" not in built and "+cpu" in version("torch"):  # built for another torch: it lacks its operators
                from torch import library

                for name in ("nms", "qnms"):
                    library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float iou) -> Tensor")
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
