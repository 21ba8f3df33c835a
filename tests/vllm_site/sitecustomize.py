"""Runs first in every Python process of a vLLM server of the tests (see vllm_server.py, which puts it on their path).

The process dies with its parent: a killed server or test run leaves nothing behind. And torchvision, of which the
public index has CUDA builds only, can be imported beside torch's CPU build: it registers a fake kernel for two of its
compiled operators, which it cannot load there, and which nothing here calls.
"""

import ctypes
import signal
import sys
from importlib.abc import MetaPathFinder
from importlib.metadata import version

PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class _BeforeTorchvision(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            if "+" not in version("torchvision"):  # built for this torch: it has its operators
                from torch import library

                for name in ("nms", "qnms"):
                    library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float iou) -> Tensor")
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
