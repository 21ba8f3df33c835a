"""Stage 0: supervised cold start on rows with `chosen`. The trainer's loop, with rows instead of rollouts."""

from collections.abc import Sequence

import numpy as np
import torch

from cosmo_rl.data.collate import EncodedPrompt, TokenSequence
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import Row
from cosmo_rl.model.load import Processor

from .config import Config
from .update import Micro, build_micros


def chosen_ids(row: Row, processor: Processor) -> np.ndarray:
    """(L,) int64, the tokens of `chosen` and the end of the turn.

    Raises:
        UserError: there is none, or it holds a special token.
    """
    if not row.chosen:
        raise UserError(f"row {row.id}: stage 0 imitates `chosen`, which is missing; add it or drop the row")
    ids = processor.tokenizer(row.chosen, add_special_tokens=False)["input_ids"]
    banned = set(ids) & {*processor.suppressed_ids.tolist(), *processor.eos_ids}
    if banned:
        raise UserError(f"row {row.id}: `chosen` holds the special token "
                        f"{processor.tokenizer.convert_ids_to_tokens(min(banned))}; remove it")
    return np.array([*ids, processor.tokenizer.eos_token_id], dtype=np.int64)


def sft_micros(rows: Sequence[Row], prompts: Sequence[EncodedPrompt], config: Config, processor: Processor,
               device: torch.device) -> list[Micro]:
    """This rank's micro-batches of one step: `chosen` closed by the end-of-turn token, mean over all tokens."""
    sequences = [TokenSequence(prompt, chosen_ids(row, processor)) for row, prompt in zip(rows, prompts, strict=True)]
    none, groups = [0.0] * len(rows), list(range(len(rows)))
    return build_micros(sequences, none, groups, len(rows), "token", config, processor, device)
