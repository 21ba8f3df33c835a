"""Published sets of questions with answers that can be checked. Each docstring: the layout, where it was read, and what
becomes of it."""

import ast
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from .instructions import turns_of
from .reading import LETTERS, PLACEHOLDER, SHORT, Record, lettered, published


@published(source="hiyouga/geometry3k", licence="MIT", tasks="math", files=["train-*.parquet"],
           fields=["images problem answer"])
def geometry3k(record: Record) -> Iterator[dict[str, Any]]:
    """Geometry3K (arXiv 2105.04165) as hiyouga/geometry3k publishes it for reinforcement learning.

    Layout: parquet, `images` (a list, embedded), `problem` (with `<image>` where the picture stands), `answer`; and
    `id, choices, ground_truth`, which other mirrors lack. Splits train, validation, test. Licence: MIT. All read on
    the card.

    Mapping: task math, `answer` is `answer` (a value or a LaTeX formula, not a letter). `choices` are not shown to
    the model and do not become options. A folder gives data/train-*.parquet.
    """
    yield {"task": "math", **record.prompt("problem", record.images("images", least=1)),
           "answer": record.text("answer")}


@published(source="openai/gsm8k", licence="MIT", tasks="math", files=["main/train-*.parquet", "train.jsonl"],
           fields=["question answer"], without="image images choices options image_1 image_urls conversations")
def gsm8k(record: Record) -> Iterator[dict[str, Any]]:
    """GSM8K (arXiv 2110.14168): grade-school word problems with worked solutions.

    Layout: parquet (main/train-*.parquet; socratic/ holds the same problems) or the authors' train.jsonl,
    `question, answer`: the solution, with calculator notes as <<48/2=24>>, and after `####` on its last line the
    number. Read in the authors' README (openai/grade-school-math) and in public code that reads it. Licence: MIT,
    by the hub's listing and by its copies' cards. test is an evaluation set.

    Mapping: task math; `answer` is what follows the last `####`, without commas between thousands; `chosen` the
    solution without the calculator's notes, `####` included.
    """
    solution = record.text("answer")
    _, mark, answer = (part.strip() for part in solution.rpartition("####"))
    if not mark or len(answer) > SHORT or not re.search(r"\d", answer):
        raise record.bad("answer", f"states no number after ####: {solution[-SHORT:]!r}")
    yield {"task": "math", "prompt": record.text("question"),
           "answer": re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer),
           "chosen": re.sub(r"<<[^<>\n]*>>", "", solution)}


@published(source="hendrycks/competition_math", licence="MIT", tasks="math", files=["train*.parquet", "train*.jsonl"],
           fields=["problem level type solution"])
def hendrycks_math(record: Record) -> Iterator[dict[str, Any]]:
    r"""MATH (arXiv 2103.03874): competition problems with worked solutions.

    Layout: parquet or JSON lines, `problem, level, type, solution`: the solution ends in \boxed{ANSWER}; level is
    "Level 1" to "Level 5" (two are "Level ?"), type one of seven subjects. Read on the cards of its copies on the
    hub (hendrycks/competition_math, whose own file is withdrawn, and others). Licence: MIT, by the card. test is an
    evaluation set.

    Mapping: task math; `answer` is the content of the solution's last \boxed or \fbox; `chosen` the solution;
    category `type / level`.
    """
    solution = record.text("solution")
    answer = last_boxed(solution)
    if not answer:
        raise record.bad("solution", f"boxes no answer: {solution[-60:]!r}")
    yield {"task": "math", "prompt": record.text("problem"), "answer": answer, "chosen": solution,
           "category": f"{record.text('type')} / {record.text('level')}"}


def last_boxed(text: str) -> str:
    r"""Content of the last \boxed{...} or \fbox{...}, braces balanced, or the word after \boxed; "" without one."""
    start = max((found.end() for found in re.finditer(r"\\(?:boxed|fbox)\s*", text)), default=None)
    if start is None:
        return ""
    if not text.startswith("{", start):  # "\boxed 2" boxes one token; their solutions mean the number
        return re.split(r"[\s$]", text[start:], maxsplit=1)[0]
    depth = 0
    for found in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if not depth and found[0] == "}":
            return text[start + 1:found.start()].strip()
    return ""


_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
r"""A brace, or what is none: \{ is printed, and \\ breaks the line."""
_STATED = re.compile(r"(?:the )?(?:answer|solution)(?: is:?|:)\s*(.*)", re.IGNORECASE | re.DOTALL)


@published(source="Zhiqiang007/MathV360K", licence="mixed (that of each source set)", tasks="general math mcq",
           files=["train_samples_all_tuning.json"], roots=("data_images", ""), fields=["image conversations"])
def mathv360k(record: Record) -> Iterator[dict[str, Any]]:
    """MathV360K (arXiv 2406.17294): questions on charts, figures, tables and diagrams, with short answers.

    Layout: train_samples_all_tuning.json, a list of `{id?, image, conversations}` with one human turn
    ("<image>\\nHint: ... Question: ... Choices: (A) ...") and one gpt turn ("The answer is B"); images in
    data_images/SET/images/. The files were read in the authors' README (HZQ950419/Math-LLaVA), the form of question
    and answer in public code that reads them. Licence: each of its source sets has its own, some of them for
    research only; its page lists none.

    Mapping: `answer` is what follows "The answer is" or "Answer:", or the whole reply if it is short; a longer one
    is rejected. Task mcq where the answer is the letter of a listed choice, else math where it has a digit or
    LaTeX, else general; a letter without such a choice is rejected. `chosen` is the reply; category the source set,
    the first folder of the image path.
    """
    turns = turns_of(record)
    if [role for role, _ in turns] != ["user", "assistant"]:
        raise record.bad("conversations", f"has turns by {', '.join(role for role, _ in turns)}, not one question and "
                         "one reply")
    (_, question), (_, reply) = turns
    stated = _STATED.fullmatch(reply)
    answer = (stated[1] if stated else reply).rstrip(". \t\r\n")
    if len(answer) > SHORT or not answer:
        raise record.bad("conversations[1]", f"states no short answer: {reply[:60]!r}")
    name = record.data["image"]
    yield {**record.prompt("conversations[0]", record.image("image"), question),
           **record.graded("conversations[1]", question, answer), "chosen": reply,
           "category": PurePosixPath(name).parts[0] if isinstance(name, str) else None}


@published(source="FanqingM/MMK12", licence="Apache-2.0 (unconfirmed)", tasks="math mcq", without="choices options",
           files=["train*.parquet", "*.jsonl"],
           fields=["message answer", "conversations image_urls answer", "question image answer"])
def mmk12(record: Record) -> Iterator[dict[str, Any]]:
    """MMK12 and MM-Eureka (arXiv 2503.07365, 2505.12504): K-12 questions with pictures and answers that can be checked.

    Three layouts, all read in the authors' READMEs (ModalMinds/MM-EUREKA, FanqingM/MM-EUREKA) or in public code that
    reads the hub's FanqingM/MMK12:
    - JSON lines `{id, message, answer}`, where message is a text that holds JSON: chat messages whose content is a text
      or a list of `{type: image, image: "file:///..."}` and `{type: text, text}`;
    - JSON lines `{id, conversations, answer, image_urls}`, conversations of `{role, content}`, image_urls of `file:///...`;
      a blank.png there stands for "no image";
    - parquet `{id, question, image, answer, subject?}` with `<image>` in the question and the image embedded.
    The absolute image paths are the authors' own: give the folder that yours lie in (--images), in which they must end.
    Licence: Apache-2.0 by others' listings; the card was not read.

    Mapping: `answer` is `answer`. Task mcq where it is the letter of a choice that the question lists line by line,
    else math (graded by math_verify); a letter of none of the listed choices is rejected. Category `subject`.
    """
    if "message" in record.data:
        prompt = _chat(record, "message", record.json("message"), [])
    elif "conversations" in record.data:
        urls = record.data["image_urls"]
        if isinstance(urls, list):  # their stand-in where InternVL wants a picture
            urls = [url for url in urls if not (isinstance(url, str) and PurePosixPath(url).name == "blank.png")]
        prompt = _chat(record, "conversations", record.data["conversations"],
                       record.part({"image_urls": urls}).images("image_urls"))
    else:
        prompt = record.prompt("question", record.images("image"))
    last: Any = prompt.get("prompt") or (prompt["messages"][-1]["content"] if prompt["messages"] else "")
    if isinstance(last, list):
        last = "\n".join(str(part.get("text") or "") for part in last if isinstance(part, dict))
    yield {**prompt, **record.graded("answer", str(last), record.text("answer"), "math"),
           "category": record.optional("subject")}


def _chat(record: Record, field: str, turns: Any, images: list[str | bytes]) -> dict[str, Any]:
    """`messages` and `images` of chat messages; `images` are those that placeholders stand for, or go first."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise record.bad(field, "is not a list of chat messages")
    messages, waiting, used = [], list(images), []
    for i, turn in enumerate(turns):
        at, content = f"{field}[{i}].content", turn.get("content")
        if isinstance(content, str):
            count = content.count(PLACEHOLDER)
            if count == 0 and waiting and turn.get("role") == "user":
                count, content = len(waiting), PLACEHOLDER * len(waiting) + content
            taken, waiting = waiting[:count], waiting[count:]
            used += taken
            if count:
                content = record.content(at, content, len(taken))
        elif isinstance(content, list):
            pictured = [isinstance(part, dict) and part.get("type") == "image" for part in content]
            for part, is_image in zip(content, pictured, strict=True):
                used += record.part({at: part.get("image")}).image(at) if is_image else []
            content = [{"type": "image"} if is_image else part
                       for part, is_image in zip(content, pictured, strict=True)]
        messages.append({"role": turn.get("role"), "content": content})
    if waiting:
        raise record.bad(field, f"has no place for {len(waiting)} of {len(images)} images")
    return {"messages": messages, "images": used}


@published(source="MMMU/MMMU", licence="Apache-2.0", tasks="mcq math general",
           fields=["question options answer image_1"])
def mmmu(record: Record) -> Iterator[dict[str, Any]]:
    """MMMU (arXiv 2311.16502) and sets in its layout: college questions with up to seven pictures in text and choices.

    Layout: parquet with embedded images, `id, question, options, explanation, image_1 ... image_7, img_type,
    answer, topic_difficulty, question_type, subfield`; options is a Python list written as a text ("['2', '<image
    2>']"), answer a letter or, where question_type is "open", a text; `<image 1>` stands for image_1, in question
    and options. Read on the cards (MMMU/MMMU and copies). Licence: Apache-2.0, by the hub's listing. MMMU's dev,
    validation and test are for evaluation, so a folder gives nothing: name the files.

    Mapping: task mcq with the choices shown as A. B. C.; an open question is math where its answer has a digit or
    LaTeX, else general, and rejected if it has several answers. A picture stands where the text names it, each
    time; without any name they stand first, and where only some are named the record is rejected. category
    `subfield`.
    """
    text, answer = record.text("question"), record.text("answer")
    if record.optional("question_type") == "open":
        if answer.startswith("["):
            raise record.bad("answer", f"is a list of answers: {answer[:60]!r}", "give one answer")
        graded = record.graded("answer", text, answer)
    else:
        choices = _python_list(record, "options")
        if answer not in list(LETTERS):
            raise record.bad("answer", f"is {answer[:60]!r}, not the capital letter of a choice")
        letter = record.letter("answer", LETTERS.index(answer), choices)
        graded, text = {"task": "mcq", "answer": letter, "options": choices}, f"{text}\n{lettered(choices)}"
    there = {k: found[0] for k in range(1, 8) if (found := record.images(f"image_{k}"))}
    named = [int(number) for number in _PLACE.findall(text)]
    if lost := sorted(set(named) - there.keys()):
        raise record.bad(f"image_{lost[0]}", f"is missing, and the text names <image {lost[0]}>")
    if named and (unnamed := sorted(there.keys() - set(named))):
        raise record.bad("question", f"names <image {named[0]}>, but not image_{unnamed[0]}, which is there")
    images = [there[k] for k in named] if named else list(there.values())  # each as often as it is named
    yield {**record.prompt("question", images, _PLACE.sub(PLACEHOLDER, text)), **graded,
           "category": record.optional("subfield")}


_PLACE = re.compile(r"<image[ _]?(\d{1,3})>", re.IGNORECASE)


def _python_list(record: Record, field: str) -> list[str]:
    """The texts of a list that is written as Python does."""
    value = written = record.data[field]
    try:
        if isinstance(written, str):
            value = ast.literal_eval(written.strip())  # literals alone: nothing is run
        if isinstance(value, list):
            value = [str(item) if isinstance(item, int | float) else item for item in value]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:  # TypeError: of {{}}
        raise record.bad(field, f"is no list written as Python does: {written[:60]!r}", "write it as ['x', 'y']"
                         ) from error
    return record.part({field: value}).texts(field)


_LEAD = re.compile(r"(?:the )?(?:final )?answer(?: is:?|:)\s*", re.IGNORECASE)


@published(source="lmms-lab/multimodal-open-r1-8k-verified", licence="not stated", tasks="general math mcq",
           files=["train-*.parquet"], fields=["image problem solution"])
def multimodal_open_r1(record: Record) -> Iterator[dict[str, Any]]:
    """multimodal-open-r1-8k-verified: MathV360K's and Geo170K's questions with checked solutions, used by TRL.

    Layout: parquet with embedded image (data/train-*.parquet), `image, problem, solution, original_question,
    original_answer`; solution is "<think>...</think>" and "<answer>...</answer>". Read in public code that reads it
    (TRL's grpo_vlm.py, oumi) and on its page (lmms-lab/multimodal-open-r1-8k-verified). Licence: none is stated
    there; its source sets have their own.

    Mapping: `answer` is the content of <answer>, where it is short, less "The answer is"; a longer one is rejected.
    Task mcq where it is the letter of a choice that the problem lists, else math where it has a digit or LaTeX,
    else general; a letter of no listed choice is rejected. `chosen` is the solution.
    """
    problem, solution = record.text("problem"), record.text("solution")
    stated, closed, _ = solution.partition("<answer>")[2].partition("</answer>")
    if solution.count("<answer>") != 1 or not closed:
        raise record.bad("solution", f"holds {solution.count('<answer>')} <answer>...</answer>, not one")
    answer = _LEAD.sub("", stated.strip(), count=1).strip().rstrip(".")
    if not answer or len(answer) > SHORT:
        raise record.bad("solution", f"states no short answer: {stated.strip()[:SHORT]!r}")
    yield {**record.prompt("problem", record.image("image"), problem), **record.graded("solution", problem, answer),
           "chosen": solution}


@published(source="derek-thomas/ScienceQA", licence="CC BY-SA 4.0", tasks="mcq", files=["train-*.parquet"],
           fields=["question choices answer hint"])
def scienceqa(record: Record) -> Iterator[dict[str, Any]]:
    """ScienceQA (arXiv 2209.09513): multiple-choice questions of school science, half of them with a picture.

    Layout: parquet with embedded image (data/train-*.parquet; ScienceQA-IMG/ of lmms-lab's copy), `image, question,
    choices, answer, hint, task, grade, subject, topic, category, skill, lecture, solution`; image may be null,
    answer is the choice's place from 0, hint a passage or "". Read on the cards (derek-thomas/ScienceQA,
    lmms-lab/ScienceQA). Licence: CC BY-SA 4.0 by the first; the authors' page was not read. validation and test are
    evaluation sets.

    Mapping: task mcq. The prompt is the hint, the question and the choices as A. B. C.; `answer` the letter;
    category `subject / topic`. lecture and solution are not used.
    """
    choices = record.texts("choices")
    text = "\n".join(filter(None, (record.optional("hint"), record.text("question"), lettered(choices))))
    yield {"task": "mcq", **record.prompt("question", record.images("image"), text), "options": choices,
           "answer": record.letter("answer", record.whole("answer"), choices),
           "category": record.joined("subject", "topic")}
