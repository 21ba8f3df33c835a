"""`train.py --dry-run`: all that a run would stumble over, and what it will take, without loading weights or training.

Read are the rows, the tokenizer, the image processor and config.json; written is nothing; judges are not asked, and a
reward function of the user's is called once. Rank 0 does it alone, for as many ranks as the launcher started. Shown
are, by domain: rows, shares, tasks and lengths; the system prompt and the first row, as the model sees them; the
fullest micro-batch of the first rollouts, by the sampler and the planner of training, and the memory that it will take
(footprint.py); every row that is rejected, by reason. The exit status is 1 if anything is.
"""

import asyncio
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from cosmo_rl.data.collate import check_prompt, plan_microbatches
from cosmo_rl.data.errors import RowError, UserError
from cosmo_rl.data.index import Index
from cosmo_rl.data.prompts import check_system_prompt, introduce
from cosmo_rl.data.sampler import PromptSampler
from cosmo_rl.data.schema import Row
from cosmo_rl.data.terminal import printable, shortened
from cosmo_rl.model.liger import wants_liger
from cosmo_rl.model.load import Processor, check_attention, load_processor
from cosmo_rl.model.tiny import TINY_PATH

from ..config import Config
from ..rewards.base import Failed, NotApplicable, Score
from ..rewards.build import build_scorer
from ..rewards.function import UserFunction
from ..rewards.task_aware import rules
from ..rewards.word_rules import CAUTION, by_words
from ..rollout.engine import cache_fits, form_batches
from .ending import fail, leave
from .evaluation import call_size, eval_batches, eval_suite
from .footprint import NOTHING, Calls, Load, Parameters, Term, by_phase, count_parameters, footprint, peak
from .guard import WATCHED, no_rows
from .plan import Faults, Plan, RowSize, given_path, plan
from .recipes import mixture

ITERATIONS = 20
"""Rollouts (steps of stage 0) whose micro-batches are planned."""
LARGEST_GPU = 288 * 2**30
"""Bytes of memory of the largest GPU that is sold (B300, MI355X)."""
MENDS = {
    "always": "give more ranks, --model.dtype bfloat16 or a smaller model",
    "update": "lower --batch.max-tokens, or give --model.gradient-checkpointing True or more ranks",
    "rollout": "lower --rollout.cache-gib or --rollout.batch-size",
    "evaluation": "lower --rollout.cache-gib or --rollout.batch-size",
}
EXAMPLES = 3
"""Rows named for each reason."""
_BINS = 24
_WIDTH = 100
"""Columns where the output is no terminal."""
_BLOCKS, _ASCII = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588", " .:-=+*#@"


@dataclass(slots=True)
class Findings(Faults):
    """What was found; see the functions that fill it in."""

    domains: list[str] = field(default_factory=list)
    """Of the rows that are left, as `tasks` and `sizes`."""
    tasks: list[str] = field(default_factory=list)
    sizes: list[RowSize] = field(default_factory=list)
    prompts: str = ""
    """The system prompt and the first row, as the model sees them."""
    shares: dict[str, float] = field(default_factory=dict)
    asked: dict[str, list[RowSize]] = field(default_factory=dict)
    """Of the evaluation, by group of its rows."""
    load: Load | None = None
    """Of the micro-batch that takes the most memory."""
    terms: list[Term] = field(default_factory=list)


def dry_run(config: Config) -> int:
    """Check and show; returns the exit status. User errors beside the rows are printed without a traceback."""
    if int(os.environ.get("RANK", "0")):
        return 0
    transformers.utils.logging.disable_progress_bar()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        run = Path(config.run_dir or Path("runs") / config.preset)
        # the tokenizer and the shape of the model that stage 0 of `tiny` builds are those of the shipped one
        path = given_path(config, run) or TINY_PATH
        processor = load_processor(path, config.data.resize_pixels, with_weights=False)
        found = inspect(config, processor, world_size)
    except (UserError, OSError) as error:
        return fail(error)
    show(found, config, path, world_size,
         Console(width=None if sys.stdout.isatty() else _WIDTH, markup=False, highlight=False, emoji=False))
    if not (found.rejected or found.settings):
        return 0
    leave(f"train.py: the dry run has rejected {len({one.where for one in found.rejected}):,} rows or files"
          + "".join(f"; problem: {problem}" for problem in found.settings))
    return 1


def inspect(config: Config, processor: Processor, world_size: int) -> Findings:
    """All that `show` prints.

    Raises:
        UserError: the preset has no data of its own and none was given, or the system prompt cannot be used.
    """
    found = Findings()
    check_system_prompt(config.data.system_prompt, processor, max_prompt_tokens=config.data.max_prompt_tokens)
    _check_kernels(config, found)
    planned = plan(config, processor, faults=found)
    rows = planned.rows
    found.domains, found.tasks = rows.domains, rows.tasks
    found.sizes = [RowSize(*tokens) for tokens in rows.records["tokens"].tolist()]
    _check_evaluation(config, processor, planned.eval_rows, found)
    if planned.needs is not None:
        _check_rewards(config, planned, found)
    if ruled := by_words(config, set(found.tasks)):
        found.notes.append(f"WARNING: rewarded by word rules: {', '.join(ruled)}: {CAUTION}")
    if not found.sizes:
        found.settings.append("no row is left to train on")
        return found
    found.prompts = introduce(config.data.system_prompt, rows[0], processor, sys.stdout.encoding)
    try:
        found.shares = mixture(config, found.domains)
        sampler = PromptSampler(found.domains, found.shares, config.seed)
    except UserError as error:
        found.settings.append(str(error))
        return found
    patches = processor.merge_size**2
    parameters = count_parameters(processor.config, config.model.freeze_vision)
    calls = _calls(found, config, processor, parameters)
    # not the one with the most tokens: with a few less, and images, another may take more
    for load in set(_micro_batches(found.sizes, sampler, config, patches, world_size)):
        terms = footprint(processor.config, parameters, config, load, calls, world_size)
        if found.load is None or (by_phase(terms)["update"], load) > (by_phase(found.terms)["update"], found.load):
            found.load, found.terms = load, terms
    _check_memory(found)
    return found


def _check_kernels(config: Config, found: Findings) -> None:
    """What the model asks for is installed on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for check in (lambda: check_attention(config.model.attention), lambda: wants_liger(config.model.liger, device)):
        try:
            check()
        except UserError as error:
            found.settings.append(str(error))


def _check_memory(found: Findings) -> None:
    """No phase takes more than this machine's GPU has; without one, than any GPU has."""
    room, whose = LARGEST_GPU, "the largest GPU has"
    if torch.cuda.is_available():
        room, whose = torch.cuda.get_device_properties(0).total_memory, "this GPU has"
    for phase, num_bytes in by_phase(found.terms).items():
        if num_bytes > room:
            found.settings.append(
                f"{'what always lies there' if phase == 'always' else f'the {phase}'} takes an estimated "
                f"{num_bytes / 2**30:,.1f} GiB of a rank's memory, and {whose} {room / 2**30:,.1f}; {MENDS[phase]}")
            if phase == "always":
                return  # the others hold it too


def _check_evaluation(config: Config, processor: Processor, eval_rows: Index | None, found: Findings) -> None:
    """The rows of the report and of --eval.every: their prompts are short enough, and the guard has some to watch."""
    unused: list[str] = []
    most, new = processor.config.text_config.max_position_embeddings, config.rollout.max_new_tokens
    embedded = {config.eval.split, "validation" if config.eval.every else config.eval.split}
    for split in ["validation"] if eval_rows is not None else sorted(embedded):  # the last one is watched
        suite = eval_suite(config, split, eval_rows, unused)
        for group, rows in suite.items():
            for i, row in enumerate(rows):
                try:
                    size = RowSize(*check_prompt(row, processor, max_prompt_tokens=config.data.max_prompt_tokens,
                                                 system_prompt=config.data.system_prompt), new)
                    if size.prompt + new > most:
                        raise UserError(f"a prompt of {size.prompt} tokens and up to {new} of response are beyond the "
                                        f"model's {most} positions; lower --rollout.max-new-tokens, or drop the row")
                except UserError as error:
                    found.reject(rows.where(i) if isinstance(rows, Index) else f"row {row.id}",
                                 str(error).removeprefix(f"row {row.id}: "))
                else:
                    found.asked.setdefault(f"{split} {group}", []).append(size)
    with rules() as right:
        unused += [f"row {row.id}: {problem}" for row in suite.get("general", ()) if (problem := right.problem(row))]
    if unused:
        found.notes.append(f"evaluation: {len(unused):,} rows are not measured, as no rule can use them; the first: "
                           f"{' | '.join(unused[:EXAMPLES])}")
    if config.eval.guard != "off" and not any(
            suite.get(group) for measure in WATCHED.values() for group in measure.groups):
        (found.settings if config.eval.guard == "stop" else found.notes).append(no_rows(config.eval.guard))


def _check_rewards(config: Config, planned: Plan, found: Findings) -> None:
    """The rewards can be set up, and a function of the user's be called."""
    assert planned.needs is not None
    try:
        scorer = build_scorer(replace(config.reward, judge_cache=""), planned.needs)
    except UserError as error:
        found.settings.append(str(error))
        return
    scorer.close()
    if scorer.function:
        _try_function(scorer.function, planned.rows, found)


def _try_function(function: UserFunction, rows: Iterable[Row], found: Findings) -> None:
    """Call the user's function once, with the first row that is one of its own and a well-formed response."""
    row = next(filter(function.scores, rows), None)
    if row is None:
        return
    response = f"<think>This is a dry run.</think> {row.answer or 'An answer.'}"
    told = f"on row {printable(row.id)} with the response {printable(shortened(response, 120))!r}"
    match asyncio.run(function.ask(row, response)) if function.waits else function.now(row, response):
        case Failed(reason):
            found.settings.append(f"--reward.function failed {told}: {reason}")
        case Score(value):
            found.notes.append(f"--reward.function gives {value:g} {told}")
        case NotApplicable():
            found.notes.append(f"--reward.function gives None {told}: it does not apply")


def _micro_batches(sizes: Sequence[RowSize], sampler: PromptSampler, config: Config, patches: int,
                   world_size: int) -> Iterator[Load]:
    """All micro-batches of the first ITERATIONS, every response at its longest."""
    rl = config.stage > 0
    count, group, updates = ((config.rollout.prompts, config.rollout.group_size, config.optim.updates_per_rollout)
                             if rl else (config.optim.sft_batch, 1, 1))
    for _ in range(min(ITERATIONS, -(-config.steps // updates))):
        drawn = [sizes[i] for i in sampler.take(count)]
        for part in np.array_split(np.arange(count), updates):  # as collect.split_updates
            owners = np.repeat(part, group).tolist()
            lengths = [drawn[i].prompt + drawn[i].response for i in owners]
            plan = plan_microbatches(lengths, max_tokens=config.batch.max_tokens, layout=config.batch.layout,
                                     world_size=world_size)
            for members in (members for micros in plan for members in micros if members):
                each = [lengths[i] for i in members]
                yield Load(sum(each) if config.batch.layout == "packed" else max(each) * len(each),
                           sum(drawn[owners[i]].response for i in members),
                           sum(drawn[i].image for i in {owners[i] for i in members}) * patches, len(members))


def _calls(found: Findings, config: Config, processor: Processor, parameters: Parameters) -> dict[str, Calls]:
    """The generate call of a rollout, and of the evaluation, that takes the most memory."""
    rollout, calls, patches = config.rollout, {}, processor.merge_size**2
    if config.stage:
        longest, count = max(size.prompt for size in found.sizes), rollout.prompts * rollout.group_size
        fits = cache_fits(rollout, processor.config, getattr(torch, config.model.dtype))
        requests = len(form_batches([longest] * count, rollout.batch_size, fits)[0])  # many ranks may have smaller ones
        prompts = -(-requests // rollout.group_size)
        calls["rollout"] = Calls(requests, prompts, longest,
                                 prompts * max(size.image for size in found.sizes) * patches)
    # all requests of an evaluation have prompts of their own
    asked = [Calls(len(batch), len(batch), max(prompts[i].prompt for i in batch),
                   sum(prompts[i].image for i in batch) * patches)
             for prompts in found.asked.values()
             for batch in eval_batches([size.prompt for size in prompts], config, processor.config,
                                       call_size(config))]
    if asked:
        takes = lambda call: by_phase(footprint(processor.config, parameters, config, NOTHING, {"evaluation": call}, 1))
        calls["evaluation"] = max(asked, key=lambda call: takes(call).get("evaluation", 0))
    return calls


# -- what is shown ----------------------------------------------------------------------------------------------------


def show(found: Findings, config: Config, path: Path, world_size: int, console: Console) -> None:
    """Print the findings."""
    console.print(f"dry run of stage {config.stage}, preset {config.preset}, {world_size} rank"
                  f"{'s' * (world_size > 1)}, model {path}: no weights are loaded, nothing is written\n")
    if found.sizes:
        console.print(_rows_table(found), "")
        console.print(_lengths_table(found, "utf" in console.encoding.lower(), config.stage == 0))
    if found.prompts:
        console.print("", found.prompts, sep="\n")
    if found.load is not None:
        console.print()
        load, steps = found.load, "steps" if config.stage == 0 else "rollouts"
        console.print(f"fullest micro-batch of the first {ITERATIONS} {steps}, every response at its longest: "
                      f"{load.sequences:,} sequences, {load.tokens:,} of {config.batch.max_tokens:,} tokens "
                      f"({config.batch.layout}), {load.targets:,} of responses, {load.patches:,} image patches\n")
        console.print(_memory_table(found.terms))
    for note in found.notes:
        console.print(printable(f"note: {note}"))
    for problem in found.settings:
        console.print(printable(f"problem: {problem}"), soft_wrap=True)
    _show_rejected(found, console)


def _table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _rows_table(found: Findings) -> Table:
    rows = Counter(found.domains)
    total = sum(found.shares.values()) or 1.0
    shares = ({name: share / total for name, share in found.shares.items()}
              or {name: count / len(found.domains) for name, count in rows.items()})
    tasks: dict[str, Counter[str]] = defaultdict(Counter)
    for domain, task in zip(found.domains, found.tasks, strict=True):
        tasks[domain][task] += 1
    table = _table(f"{len(found.domains):,} rows", "domain", "rows", "share", "tasks", right=("rows", "share"))
    for name, count in sorted(rows.items()):
        table.add_row(printable(name), f"{count:,}", f"{shares.get(name, 0.0):.1%}",
                      ", ".join(f"{task} {n:,}" for task, n in sorted(tasks[name].items())))
    return table


def _lengths_table(found: Findings, unicode: bool, sft: bool) -> Table:
    """Quantiles and histograms of each domain; histograms of one kind of tokens share their axis, from 0."""
    sizes, domains = np.array(found.sizes), np.array(found.domains)
    table = _table("tokens", "domain", "of", "min", "median", "p95", "max", "histogram",
                   right=("min", "median", "p95", "max"))
    for kind, column in {"prompt": 0, "image": 1, **({"chosen": 2} if sft else {})}.items():
        most = int(sizes[:, column].max())
        for name in sorted(set(found.domains)):
            values = sizes[domains == name, column]
            counts, _ = np.histogram(values, bins=_BINS, range=(0, max(most, 1)))
            numbers = [values.min(), np.median(values), np.percentile(values, 95), values.max()]
            table.add_row(printable(name), kind, *(f"{number:,.0f}" for number in numbers),
                          _bars(counts, unicode) + f"| {most:,}")
    return table


def _bars(counts: np.ndarray, unicode: bool) -> str:
    ramp = _BLOCKS if unicode else _ASCII
    levels = np.ceil(counts / max(counts.max(), 1) * (len(ramp) - 1)).astype(int)
    return "".join(ramp[level] for level in levels)


def _memory_table(terms: list[Term]) -> Table:
    table = _table("memory of a rank, ESTIMATED from config.json (cpgd/run/footprint.py)", "phase", "what", "how",
                   "MiB", right=("MiB",))
    for term in terms:
        table.add_row(term.phase, term.name, term.how, _mib(term.num_bytes))
    table.add_row("peak", "", "always, and the largest of the others", _mib(peak(terms)))
    return table


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"


def _show_rejected(found: Findings, console: Console) -> None:
    groups: dict[tuple[str, str], list[RowError]] = defaultdict(list)
    for one in (problem for error in found.rejected for problem in error.problems):  # a row may have several
        groups[re.sub(r"\[\d+\]", "[]", one.field), one.mend].append(one)
    count = len({error.where for error in found.rejected})
    console.print(f"\nrejected: {count:,}" + (f", for {len(groups)} reasons" if groups else ""))
    for members in sorted(groups.values(), key=len, reverse=True):
        first, where = members[0], list(dict.fromkeys(one.where for one in members))
        field_of = f"field `{first.field}`: " if first.field else ""
        console.print(printable(f"{len(where):>8,}  {field_of}{first.problem}"))
        console.print(printable(f"{'':10}mend: {first.mend}"))
        console.print(printable(f"{'':10}at: {', '.join(where[:EXAMPLES])}{', ...' if len(where) > EXAMPLES else ''}"))
