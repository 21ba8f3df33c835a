"""How a command ends that cannot go on: one line, which is the last that is read under torchrun too.

torchrun prints a traceback of its own below whatever its workers said, and ends it with what the first of them has
written to TORCHELASTIC_ERROR_FILE, in the form of torch.distributed.elastic.multiprocessing.errors.
"""

import json
import os
import re
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

from cosmo_rl.data.terminal import printable

QUIET_S = 3.0
"""How long a rank above 0 waits before it ends, in seconds: torchrun ends all others as soon as one has ended."""
LONGEST = 1000
"""Characters of the line in torchrun's summary."""
_FRAMES = re.compile("\x1b\\[[0-9;]*m|[\u2500-\u257f]|-{9,}")
"""Colours and what boxes are drawn with."""


def fail(error: object, prog: str = "train.py", status: int = 1, alike: bool = False) -> int:
    """Say `PROG: error` on stderr, once for all ranks, and leave it to torchrun; returns the exit status.

    Rank 0 speaks for all. Another rank waits for it to, and speaks itself only where no torchrun will show its line:
    it may be the one that has failed, unless all ranks fail `alike`.
    """
    line = f"{prog}: {printable(str(error))}"
    left = leave(line)
    if above := int(os.environ.get("RANK", "0")) > 0:
        time.sleep(QUIET_S)
    if not (above and (left or alike)):
        print(line, file=sys.stderr, flush=True)
    return status


def leave(text: str) -> bool:
    """Have torchrun end with `text`, whose frames are taken off, as one line; False where there is no torchrun."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    plain = printable(_FRAMES.sub(" ", text).replace("\n", " "))
    line = textwrap.shorten(plain, LONGEST, placeholder=" ...")
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    with suppress(OSError):  # as of a full disk: the line is on stderr all the same
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}), encoding="utf-8")
    return True
