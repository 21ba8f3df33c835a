"""Published sets on safety and human values. Each docstring: the layout, where it was read, and what becomes of it."""

import hashlib
from collections.abc import Iterator
from typing import Any

from .reading import Record, published


@published(source="PKU-Alignment/BeaverTails-V", licence="CC BY-NC 4.0", tasks="safety", files=["train*.parquet"],
           fields=["question image category response is_response_safe",
                   "question image category response_1 response_2 is_response_1_safe is_response_2_safe "
                   "safer_response_id"])
def beavertails_v(record: Record) -> Iterator[dict[str, Any]]:
    """BeaverTails-V (arXiv 2503.17682): harmful questions about images, with judged responses.

    Layout: parquet, a config per category (data/CATEGORY/train*.parquet), the image embedded. Two sets share it:
    PKU-Alignment/BeaverTails-V has `question, image, category, image_severity, response, is_response_safe`;
    saferlhf-v/BeaverTails-V has two responses, `response_k, is_response_k_safe` (k 1, 2) and `safer_response_id`.
    Licence: CC BY-NC 4.0. The fields and the licence were read on both cards; that the judgements are "yes" and "no",
    and the ids 1 and 2 as texts, in public code that reads the set.

    Mapping: task safety, category `category`. The set judges responses, not questions; as every question was written
    for a category of harm, every row is tagged combined unsafe. Benign rows must come from another set, or a model
    learns to refuse whatever it sees. `chosen` is the response that is judged safe (of two the safer one); without one
    there is none. What image_severity means is not said on the cards, so it becomes no tag.
    """
    chosen, judged = "response", "is_response_safe"
    if chosen not in record.data:
        safer = record.choice("safer_response_id", {"1": 1, "2": 2, 1: 1, 2: 2})
        chosen, judged = f"response_{safer}", f"is_response_{safer}_safe"
    is_safe = record.choice(judged, {"yes": True, "no": False})
    yield {"task": "safety", **record.prompt("question", record.image("image")),
           "category": record.optional("category"), "chosen": record.optional(chosen) if is_safe else None,
           "tags": {"combined": "unsafe"}}


@published(source="AIFlames/Flames", licence="Apache-2.0", tasks="value", files=["Flames_1k_Chinese.jsonl"],
           fields=["dimension prompt"], without="response")
def flames(record: Record) -> Iterator[dict[str, Any]]:
    """FLAMES (arXiv 2311.06899): adversarial Chinese prompts on human values.

    Layout: Flames_1k_Chinese.jsonl, `dimension, subcomponent, prompt`: 1,000 prompts on Safety, Fairness, Morality,
    Data protection and Legality, without answers. Read in the authors' repository (AIFlames/Flames) and in code that
    reads it. Licence: Apache-2.0 there; PKU-Alignment's copy on the hub says CC BY-NC 4.0. It is an evaluation set and
    has no training split: its rows are for --data.eval-path and --data.evaluation-sets.

    Mapping: task value without `answer`, so that a judge (safework_value) scores it; category `dimension /
    subcomponent`.
    """
    yield {"task": "value", "prompt": record.text("prompt"), "category": record.joined("dimension", "subcomponent")}


@published(source="JailbreakV-28K/JailBreakV-28k", licence="MIT", tasks="jailbreak", files=["JailBreakV_28K.csv"],
           fields=["jailbreak_query redteam_query format policy image_path", "question policy from"])
def jailbreakv_28k(record: Record) -> Iterator[dict[str, Any]]:
    """JailBreakV-28K (arXiv 2404.03027): jailbreak texts and pictures for vision-language models.

    Layout: JailBreakV_28K/JailBreakV_28K.csv with `id, jailbreak_query, redteam_query, format, policy, image_path,
    from, selected_mini, transfer_from_llm`, the images in folders beside it; RedTeam_2K.csv with `id, question, policy,
    from`. Licence: MIT. Files and licence were read on the card, the fields in public code that reads them. It is
    published as a benchmark: what is trained on cannot be measured on, and the public archive on the hub holds part of
    the images only.

    Mapping: task jailbreak, prompt `jailbreak_query`, category `policy`, combined unsafe; text unsafe where
    `transfer_from_llm` is true (the text carries the attack; the other formats carry it in the picture, which has no
    label of its own). `attack` has `format` as its name, so that whole classes can be held out, the plain request among
    its params, and a source_id that all attacks on one request share; its seed is 0, as none is published. RedTeam_2K
    rows are plain requests: task safety, text and combined unsafe.
    """
    if "jailbreak_query" not in record.data:
        yield {"task": "safety", "prompt": record.text("question"), "category": record.optional("policy"),
               "tags": {"text": "unsafe", "combined": "unsafe"}}
        return
    in_text = record.data.get("transfer_from_llm") and record.choice(
        "transfer_from_llm", {True: True, False: False, "True": True, "False": False})
    yield {"task": "jailbreak", **record.prompt("jailbreak_query", record.image("image_path")),
           "category": record.optional("policy"),
           "tags": {"combined": "unsafe", **({"text": "unsafe"} if in_text else {})},
           "attack": _attack_on(record.text("format"), record.text("redteam_query"))}


def _attack_on(name: str, request: str) -> dict[str, Any]:
    """The field `attack` of a published attack on a plain request; its seed is not known."""
    digest = hashlib.blake2b(request.encode(), digest_size=8).hexdigest()
    return {"name": name, "params": {"request": request}, "seed": 0, "source_id": f"request:{digest}"}


@published(source="PKU-Alignment/PKU-SafeRLHF", licence="CC BY-NC 4.0", tasks="safety", files=["train.jsonl"],
           fields=["prompt response_0 response_1 is_response_0_safe is_response_1_safe safer_response_id"],
           unlabelled="reject")
def pku_saferlhf(record: Record) -> Iterator[dict[str, Any]]:
    """PKU-SafeRLHF (arXiv 2406.15513): two judged responses to a prompt, text only.

    Layout: data/MODEL/train.jsonl with `prompt, response_0, response_1, is_response_0_safe, is_response_1_safe,
    better_response_id, safer_response_id`, and per response `response_k_severity_level` and `response_k_harm_category`
    (name -> truth value). Licence: CC BY-NC 4.0. Files and licence were read on the card, the fields in public code
    that reads them.

    Mapping: the set judges responses, not prompts. Where a model's response was judged unsafe, the prompt can lead to
    harm: task safety, text and combined unsafe, `chosen` the safer response if it is judged safe, category the harms
    named. That rule is ours, and a harmless prompt with one bad response falls under it. Where both responses are safe,
    nothing says whether the prompt is harmless or both refused; such a record is rejected, since rewarding an answer to
    it could teach compliance. `unlabelled` takes them in as safe or unsafe instead.
    """
    safe = [record.choice(f"is_response_{k}_safe", (True, False)) for k in (0, 1)]
    tag = record.unlabelled if all(safe) else "unsafe"
    if tag == "reject":
        raise record.bad("is_response_1_safe", "both responses are safe, and nothing says whether the prompt is",
                         "give --unlabelled safe or unsafe to take such records in")
    safer = record.choice("safer_response_id", (0, 1))
    harms: set[str] = set()
    for field in ("response_0_harm_category", "response_1_harm_category"):
        named = record.data.get(field) or {}
        if not isinstance(named, dict):
            raise record.bad(field, f"is {type(named).__name__}, not an object")
        if odd := [holds for holds in named.values() if holds not in (True, False, None)]:
            raise record.bad(field, f"holds {odd[0]!r}, not a truth value")
        harms |= {name for name, holds in named.items() if holds}
    yield {"task": "safety", "prompt": record.text("prompt"), "category": " / ".join(sorted(harms)) or None,
           "chosen": record.optional(f"response_{safer}") if safe[safer] else None,
           "tags": {"text": tag, "combined": tag}}


@published(source="XuankunRong/SafeTag-VL-3K", licence="not stated", tasks="safety", files=["train*.parquet"],
           fields=["prompt images image_tag text_tag combine_tag"])
def safetag_vl(record: Record) -> Iterator[dict[str, Any]]:
    """SafeTag-VL-3K, the data of SafeGRPO (arXiv 2511.12982): prompts with a safety tag for image, text and both.

    Layout: a Hugging Face dataset (parquet) with splits train and test, `prompt, images, image_tag, text_tag,
    combine_tag`, each tag "safe" or "unsafe". The fields were read in the authors' code (XuankunRong/SafeGRPO,
    utils/data_preprocess.py), the values of the tags in its output format. Licence: not stated there, and the card
    could not be read.

    Mapping: task safety; the three tags are the row's tags image, text and combined. The prompt is taken as it is,
    without the authors' instruction to think in five steps.
    """
    tags = {name: record.choice(f"{field}_tag", ("safe", "unsafe"))
            for name, field in (("image", "image"), ("text", "text"), ("combined", "combine"))}
    yield {"task": "safety", **record.prompt("prompt", record.images("images", least=1)), "tags": tags}


_SAFEWORK_TASKS = {
    "value": "value", "knowledge": "knowledge", "general": "general", "normal": "helpful", "safety": "safety",
    **dict.fromkeys(("knowledge_rule", "general_rule", "geo3k", "gsm8k"), "math")}


@published(source="SafeWork-R1's layout", licence="not stated", tasks="value knowledge general math helpful safety",
           fields=["prompt label"], unlabelled="reject")
def safework(record: Record) -> Iterator[dict[str, Any]]:
    """Prompts in the layout of SafeWork-R1's training code (arXiv 2507.18576): its recipe's value rows, and others.

    Layout: parquet or JSON lines, `prompt, label, images?, reference?`; prompt is a text or chat messages `{role,
    content}`, label the recipe that scores it (value, safety, knowledge, knowledge_rule, normal, general, general_rule,
    geo3k, gsm8k, muldimif), reference the answer. Read in the authors' code (opendilab/LightRFT, prompts_dataset_vl.py
    and examples/safework_t1_runnable). Licence: none with the files: give --licence and --source. They have no fixed
    names.

    Mapping: task by label: value, knowledge and general as they are, the rules (knowledge_rule, general_rule, geo3k,
    gsm8k) math, normal helpful; `answer` is the reference, which all but value, helpful and safety must have. Nothing
    says whether a safety row is harmful: `unlabelled` decides for all of them, and "reject" is its default. muldimif is
    rejected: its constraints have checkers of their own.
    """
    task = record.choice("label", _SAFEWORK_TASKS)
    if task == "safety" and record.unlabelled == "reject":
        raise record.bad("label", "is safety, and nothing says whether the prompt is harmful",
                         "give --unlabelled unsafe or safe")
    answer = record.optional("reference")
    if not answer and task not in ("value", "helpful", "safety"):
        raise record.bad("reference", f"is missing, and label {record.data['label']} is scored against it")
    images, turns = record.images("images"), record.data["prompt"]
    if not isinstance(turns, list):
        question = record.prompt("prompt", images)
    else:
        if not turns or not all(isinstance(turn, dict) for turn in turns) or turns[-1].get("role") != "user":
            raise record.bad("prompt", "is no list of messages {role, content} that ends with the user's")
        last = record.part({"prompt": turns[-1].get("content")}).prompt("prompt", images)
        own = last.get("messages") or [{"role": "user", "content": [
            *({"type": "image"} for _ in images), {"type": "text", "text": last["prompt"]}]}]
        question = {"messages": [*turns[:-1], *own], "images": images}
    yield {"task": task, **question, "answer": answer,
           "tags": {"combined": record.unlabelled} if task == "safety" else None}


@published(source="sqrti/SPA-VL", licence="CC BY 4.0", tasks="safety", files=["train-*.parquet"], unlabelled="unsafe",
           fields=["image question chosen rejected", "image question class1 class2 class3"])
def spa_vl(record: Record) -> Iterator[dict[str, Any]]:
    """SPA-VL (arXiv 2406.12030): preference pairs over images of harmful classes.

    Layout: parquet with embedded image, `image, question, chosen, rejected` (train, data/train-*.parquet; validation
    has `class1, class2, class3` too, test only those and no pair). Licence: CC BY 4.0. Both were read on the card
    sqrti/SPA-VL.

    Mapping: task safety; `chosen` is `chosen` (SFT imitates it; `rejected` has no field in a row); category the
    classes, where there are any. The set says of no question whether it is harmful: `unlabelled` decides for all of
    them, and "unsafe" is its default. Some are harmless, so under the rule rewards, which pay for refusing an unsafe
    row, mix benign rows in, or use a judge.
    """
    if record.unlabelled == "reject":
        raise record.bad("question", "nothing says whether it is harmful", "give --unlabelled unsafe or safe")
    yield {"task": "safety", **record.prompt("question", record.image("image")),
           "category": record.joined("class1", "class2", "class3"), "chosen": record.optional("chosen"),
           "tags": {"combined": record.unlabelled}}


_VLGUARD_TEXT_TAGS = {"instruction": None, "safe_instruction": "safe", "unsafe_instruction": "unsafe"}


@published(source="ys-zong/VLGuard", licence="research use only (gated)", tasks="safety", files=["train.json"],
           fields=["image safe instr-resp"], roots=("", "train", "test"))
def vlguard(record: Record) -> Iterator[dict[str, Any]]:
    """VLGuard (arXiv 2402.02207): safe and harmful images, each with questions and the answer to give.

    Layout: train.json, a list of `{id, image, safe, harmful_category?, harmful_subcategory?, "instr-resp"}`, and the
    images of train.zip. A harmful image has one `{instruction, response}`; a safe one a `{safe_instruction, response}`
    and an `{unsafe_instruction, response}`. Licence: gated, research use only. The layout was read in the authors'
    repository (ys-zong/VLGuard, convert_to_llava_format.py), the licence on the card. test.json is an evaluation set: a
    folder gives train.json only.

    Mapping: one row per question, task safety, `chosen` the response, category `harmful_category /
    harmful_subcategory`. Tags: image as `safe`; text safe or unsafe as the question's name says, none for a harmful
    image's `instruction`, which is not labelled; combined unsafe for these and for an unsafe_instruction. So each safe
    image makes a benign row and an unsafe one: the pair that tells careful from cautious.
    """
    image_tag = record.choice("safe", {True: "safe", False: "unsafe"})
    images, category = record.image("image"), record.joined("harmful_category", "harmful_subcategory")
    pairs = record.data["instr-resp"]
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, dict) for pair in pairs):
        raise record.bad("instr-resp", f"is {str(pairs)[:60]!r}, not a list of objects")
    for i, pair in enumerate(pairs):
        field = f"instr-resp[{i}]"
        named = [name for name in _VLGUARD_TEXT_TAGS if name in pair]
        if len(named) != 1 or (image_tag == "safe") != (named[0] != "instruction"):
            raise record.bad(field, f"has {', '.join(pair) or 'no fields'} where `safe` is {record.data['safe']}",
                             "a safe image has a safe_instruction or an unsafe_instruction, another an instruction")
        turn, text_tag = record.part(pair), _VLGUARD_TEXT_TAGS[named[0]]
        tags = {"image": image_tag, "combined": "safe" if text_tag == "safe" else "unsafe"}
        yield {"task": "safety", **record.prompt(field, images, turn.text(named[0])), "category": category,
               "chosen": turn.optional("response"), "tags": tags | ({"text": text_tag} if text_tag else {})}


@published(source="allenai/wildjailbreak", licence="ODC-BY (gated)", tasks="safety jailbreak", files=["train.tsv"],
           fields=["vanilla adversarial completion data_type", "adversarial label data_type"])
def wildjailbreak(record: Record) -> Iterator[dict[str, Any]]:
    """WildJailbreak (arXiv 2406.18510): plain and adversarial requests, harmful and benign, text only.

    Layout: train/train.tsv with `vanilla, adversarial, completion, data_type`, where data_type is vanilla_harmful,
    vanilla_benign, adversarial_harmful or adversarial_benign; eval/eval.tsv with `adversarial, label, data_type`.
    Licence: ODC-BY, gated. The licence was read on the set's page, columns and types in public code that reads them.

    Mapping: vanilla rows are task safety with the prompt `vanilla`, adversarial ones task jailbreak with the prompt
    `adversarial`; text and combined are unsafe for harmful and safe for benign ones; `chosen` is `completion` (a
    refusal, or an answer); category `data_type`. `attack` of an adversarial row holds the plain request, where it is
    given; its seed is 0, as none is published. A folder gives train.tsv: eval.tsv is an evaluation set.
    """
    kind, tag = record.choice("data_type", {
        f"{kind}_{label}": (kind, tag) for kind in ("vanilla", "adversarial")
        for label, tag in (("harmful", "unsafe"), ("benign", "safe"))})
    request = record.optional("vanilla")
    yield {"task": "safety" if kind == "vanilla" else "jailbreak", "prompt": record.text(kind),
           "category": record.text("data_type"), "chosen": record.optional("completion"),
           "tags": {"text": tag, "combined": tag},
           "attack": _attack_on("wildteaming", request) if kind == "adversarial" and request else None}
