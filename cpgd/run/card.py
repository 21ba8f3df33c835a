"""README.md of an exported model: what it is, the system prompt that it was trained with, what it answers."""

import os
import re
from pathlib import Path

from cosmo_rl.data.disk import replace_file

from ..config import Config

_STAGES = ("SFT cold start", "general reasoning", "safety, value and general capability together")


def write_card(folder: Path, config: Config, start: Path) -> None:
    """Write README.md into the exported model `folder`; loaders do not read it.

    Args:
        start: folder that the stage started from; only its name is told.
    Raises:
        UserError: it cannot be written.
    """
    replace_file(folder / "README.md", card(config, start))


def card(config: Config, start: Path) -> str:
    """The text of `write_card`."""
    path = Path(os.path.abspath(start))
    base = f"{path.parent.name}/hf" if path.name == "hf" else path.name  # a stage's; of which run is not known
    prompt = config.data.system_prompt
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", prompt)), 0)
    given = [
        "Training and evaluation put this system message before every prompt that had none of its own. Give it to the",
        "model word for word:", "", f"{fence}text", prompt, fence, "",
        '    messages = [{"role": "system", "content": SYSTEM_PROMPT},',
        '                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}]',
        "    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
    ] if prompt else ["None: give no system message. If the chat template writes a line of its own then, it was there",
                      "in training too."]
    wanted = ("Rewarded was the form `<think>...</think>`, once and at the start, then the answer."
              if config.stage and config.reward.format else "As the rows' `chosen` that it imitates."
              if not config.stage else "No form was rewarded.")
    sampled = f" Sampled at temperature {config.rollout.temperature:g}." if config.stage else ""
    lines = [
        f"# cosmo-rl, stage {config.stage}: {_STAGES[config.stage]}", "",
        f"Preset {config.preset}, {config.steps} optimizer steps, seed {config.seed}, started from `{base}`.", "",
        "## System prompt", *given, "", "## Response", wanted + sampled, "",
    ]
    return "\n".join(lines)
