"""Whether an engine's vision tower is given the pixels that the trainer's is, looked at for a few at the start.

Later pictures are held to it by their number of tokens, which comes back with every reply.
"""

import logging
from typing import Any

import numpy as np

from cosmo_rl.model.load import Processor

from ..values import Request
from .wire import ReplyError, mm_limits, unnormalised

logger = logging.getLogger(__name__)

PIXELS, TOLERANCE = 4096, {"float32": 1e-5, "bfloat16": 2e-2}
"""Values of a picture that are compared with the engine's, and how far they may be apart where it has normalised them:
two implementations differ in the last bit, another size or resampling by far more."""


def compare_pixels(request: Request, where: str, seen: list[Any], processor: Processor, dtype: str) -> None:
    """Compare what a tower was given for a request with the trainer's.

    Args:
        where: names the engine. seen: what `cosmo_pixels_seen` returns. dtype: the engine's.
    Raises:
        ReplyError: it was given other pixels, or another number of patches.
    """
    ours, start = request.prompt.pixel_values, 0
    if ours is None:
        return
    if not seen:
        logger.warning("WARNING: %s ran its vision tower unseen; the pixels are not compared", where)
        return
    rows = sum(count for count, _, _ in seen)
    if rows != len(ours):
        raise ReplyError(f"request {request.id}: {where} sees {rows} patches, and the trainer {len(ours)}: it resizes "
                         f"pictures by other limits; give it --mm-processor-kwargs '{mm_limits(processor)}'")
    for count, raw, values in seen:
        mine = ours[start:start + count]
        mine = (unnormalised(mine, processor) if raw else mine).ravel()
        gap = float(np.abs(mine[::max(1, mine.size // PIXELS)] - np.array(values)).max())
        if not gap <= (0 if raw else TOLERANCE[dtype]):
            raise ReplyError(f"request {request.id}: pixels that {where} sees are up to {gap:.3g} from the trainer's: "
                             "it resamples or normalises pictures in another way; serve the run's own "
                             "preprocessor_config.json")
        start += count
