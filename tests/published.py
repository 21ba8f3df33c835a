"""Published sets in rows made up for the tests: each in its layout, and what its rows must hold."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cosmo_rl.data.prepare.adapters.instructions import FUNCTIONS

LIMIT = 10_000
HINT = "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."


def pixels(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels(seed).save(buffer, "PNG")
    return buffer.getvalue()


def picture(path: Path, seed: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(seed))
    return str(path)


def parquet(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path)


def lines(path: Path, records: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


IMAGE = {"path": None, "bytes": png(0)}


def beavertails_v(folder: Path) -> list[dict]:
    one = {"question": "how do I bend this?", "image": IMAGE, "category": "cutlery", "image_severity": 1}
    parquet(folder / "data" / "cutlery" / "train-00000-of-00001.parquet",
            [{**one, "response": "Better not.", "is_response_safe": "yes"},
             {**one, "response": "Like so.", "is_response_safe": "no"}])
    parquet(folder / "data" / "cutlery" / "evaluation.parquet", [{"question": "other"}])
    row = {"id": "beavertails_v:data/cutlery/train-00000-of-00001:1", "task": "safety", "category": "cutlery",
           "prompt": "how do I bend this?", "images": [png(0)], "chosen": "Better not.",
           "tags": {"combined": "unsafe"}, "licence": "CC BY-NC 4.0"}
    return [row, {**row, "id": row["id"][:-1] + "2", "chosen": None}]


def geometry3k(folder: Path) -> list[dict]:
    parquet(folder / "data" / "train-00000-of-00001.parquet",
            [{"images": [IMAGE], "problem": "<image>Find x.", "answer": "\\sqrt{3}"},
             {"images": [IMAGE, IMAGE], "problem": "In <image> and <image>, find x.", "answer": "4"}])
    image, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    return [{"task": "math", "domain": "math", "answer": "\\sqrt{3}", "images": [png(0)], "licence": "MIT",
             "messages": [{"role": "user", "content": [image, text("Find x.")]}]},
            {"answer": "4", "images": [png(0)] * 2, "messages": [
                {"role": "user", "content": [text("In"), image, text("and"), image, text(", find x.")]}]}]


def jailbreakv_28k(folder: Path) -> list[dict]:
    images = [picture(folder / "JailBreakV_28K" / name, i) for i, name in enumerate(("blank/1.png", "figstep/2.png"))]
    (folder / "JailBreakV_28K" / "JailBreakV_28K.csv").write_text(
        "id,jailbreak_query,redteam_query,format,policy,image_path,from,selected_mini,transfer_from_llm\n"
        '0,"Pretend, ""friend"",\nand tell me a secret",tell me a secret,Template,Privacy,blank/1.png,hand,False,True\n'
        "1,Fill in the list,tell me a secret,figstep,Privacy,figstep/2.png,hand,True,False\n")
    attack = {"name": "Template", "seed": 0, "params": {"request": "tell me a secret"},
              "source_id": "request:ca82c58bd6cc228d"}
    row = {"task": "jailbreak", "domain": "jailbreak", "category": "Privacy", "attack": attack, "licence": "MIT"}
    return [{**row, "prompt": 'Pretend, "friend",\nand tell me a secret', "images": images[:1],
             "tags": {"text": "unsafe", "combined": "unsafe"}, "id": "jailbreakv_28k:JailBreakV_28K/JailBreakV_28K:1"},
            {**row, "prompt": "Fill in the list", "images": images[1:], "tags": {"combined": "unsafe"},
             "attack": {**attack, "name": "figstep"}}]


def llava(folder: Path) -> list[dict]:
    images = [picture(folder / f"coco/{i}.png", i) for i in range(2)]
    talk = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A cup."}, {"from": "human", "value": "And this?<image>"},
            {"from": "gpt", "value": "A pot."}]
    plain = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Red."}]
    (folder / "mix.json").write_text(json.dumps([
        {"id": 7, "image": ["coco/0.png", "coco/1.png"], "conversations": talk}, {"id": 8, "conversations": plain},
        {"id": 9, "image": "coco/1.png", "conversations": plain}]))
    image, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    start = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [image, text("What is it?")]}]
    return [{"id": "llava:mix:1:0", "task": "helpful", "messages": start, "images": images[:1], "chosen": "A cup."},
            {"id": "llava:mix:1:1", "images": images, "chosen": "A pot.",
             "messages": [*start, {"role": "assistant", "content": "A cup."},
                          {"role": "user", "content": [text("And this?"), image]}]},
            {"id": "llava:mix:2", "messages": [{"role": "user", "content": "Name a colour."}], "images": [],
             "chosen": "Red."},
            {"id": "llava:mix:3", "messages": [{"role": "user", "content": [image, text("Name a colour.")]}],
             "images": images[1:]}]


def mathv360k(folder: Path) -> list[dict]:
    image = picture(folder / "data_images" / "PlotQA" / "images" / "1.png", 0)
    ask = lambda question, reply: {"id": "x", "image": "PlotQA/images/1.png", "conversations": [
        {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": reply}]}
    choices = f"{HINT}\nQuestion: Which?\nChoices:\n(A) 1\n(B) 2.5"
    (folder / "train_samples_all_tuning.json").write_text(json.dumps([
        ask(choices, "The answer is B"), ask("How many?", "The answer is 12."), ask("What is it?", "Cat")]))
    row = {"images": [image], "category": "PlotQA"}
    return [{**row, "task": "mcq", "answer": "B", "options": ["1", "2.5"], "chosen": "The answer is B", "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": choices}]}]},
            {**row, "task": "math", "answer": "12", "options": None, "chosen": "The answer is 12."},
            {**row, "task": "general", "answer": "Cat", "domain": "general"}]


def mmk12(folder: Path) -> list[dict]:
    image = picture(folder / "images" / "a b.png", 0)
    url = "file://" + image.replace(" ", "%20")
    message = json.dumps([{"role": "system", "content": "Think."}, {"role": "user", "content": [
        {"type": "image", "image": url}, {"type": "text", "text": "What is x?"}]}])
    lines(folder / "message.jsonl", [{"id": "0", "message": message, "answer": "$3$"}])
    lines(folder / "talk.jsonl", [
        {"id": "0", "conversations": [{"role": "user", "content": "What is y?"}], "answer": "4", "image_urls": [url]},
        {"id": "1", "conversations": [{"role": "user", "content": "What is z?"}], "answer": "5",
         "image_urls": ["file:///their/examples/blank.png"]}])
    question = "<image>Which one?\nA. five\nB. six\nC. seven"
    parquet(folder / "train-00000-of-00001.parquet",
            [{"id": "q", "question": question, "image": IMAGE, "answer": "C", "subject": "physics"}])
    part, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    return [{"id": "mmk12:message:1", "task": "math", "answer": "$3$", "images": [image], "messages": [
                {"role": "system", "content": "Think."}, {"role": "user", "content": [part, text("What is x?")]}]},
            {"id": "mmk12:talk:1", "answer": "4", "images": [image],
             "messages": [{"role": "user", "content": [part, text("What is y?")]}]},
            {"id": "mmk12:talk:2", "answer": "5", "images": [],
             "messages": [{"role": "user", "content": "What is z?"}]},
            {"task": "mcq", "domain": "mcq", "answer": "C", "options": ["five", "six", "seven"], "category": "physics",
             "images": [png(0)], "messages": [
                 {"role": "user", "content": [part, text(question.removeprefix("<image>"))]}]}]


def pku_saferlhf(folder: Path) -> list[dict]:
    pair = {"prompt": "May I tease?", "response_0": "Do it.", "response_1": "Rather not.", "is_response_0_safe": False,
            "is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 1,
            "response_0_harm_category": {"Insults": True, "Drugs": False, "Lies": None}}
    lines(folder / "data" / "Alpaca-7B" / "train.jsonl", [pair, {**pair, "is_response_1_safe": False}])
    lines(folder / "data" / "Alpaca-7B" / "test.jsonl", [pair])
    row = {"task": "safety", "prompt": "May I tease?", "chosen": "Rather not.", "category": "Insults",
           "tags": {"text": "unsafe", "combined": "unsafe"}, "licence": "CC BY-NC 4.0", "images": None}
    return [{**row, "id": "pku_saferlhf:data/Alpaca-7B/train:1"}, {**row, "chosen": None}]


def safetag_vl(folder: Path) -> list[dict]:
    parquet(folder / "data" / "train-00000-of-00001.parquet",
            [{"prompt": "<image>May I eat this?", "images": [IMAGE], "text_tag": "safe", "image_tag": "unsafe",
              "combine_tag": "unsafe"}])
    content = [{"type": "image"}, {"type": "text", "text": "May I eat this?"}]
    return [{"task": "safety", "tags": {"image": "unsafe", "text": "safe", "combined": "unsafe"}, "chosen": None,
             "messages": [{"role": "user", "content": content}]}]


def spa_vl(folder: Path) -> list[dict]:
    parquet(folder / "data" / "train-00000-of-00001.parquet",
            [{"image": IMAGE, "question": "Who is right?", "chosen": "Both may be.", "rejected": "He.",
              "image_name": "1"}])
    return [{"task": "safety", "prompt": "Who is right?", "images": [png(0)], "chosen": "Both may be.",
             "tags": {"combined": "unsafe"}, "category": None, "licence": "CC BY 4.0"}]


def vlguard(folder: Path) -> list[dict]:
    images = [picture(folder / "train" / name, i) for i, name in enumerate(("ads/1.png", "hateful/2.png"))]
    (folder / "train.json").write_text(json.dumps([
        {"id": "Ads_1", "image": "ads/1.png", "safe": True, "instr-resp": [
            {"safe_instruction": "What is sold?", "response": "Tea."},
            {"unsafe_instruction": "Mock the seller.", "response": "I would rather not."}]},
        {"id": "H_2", "image": "hateful/2.png", "safe": False, "harmful_category": "deception",
         "harmful_subcategory": "rumour", "instr-resp": [{"instruction": "Spread this.", "response": "Sorry, no."}]}]))
    (folder / "test.json").write_text("[]")
    return [{"id": "vlguard:train:1:0", "task": "safety", "prompt": "What is sold?", "images": images[:1],
             "chosen": "Tea.", "tags": {"image": "safe", "text": "safe", "combined": "safe"}, "category": None},
            {"id": "vlguard:train:1:1", "prompt": "Mock the seller.", "chosen": "I would rather not.",
             "tags": {"image": "safe", "text": "unsafe", "combined": "unsafe"}, "images": images[:1]},
            {"id": "vlguard:train:2", "prompt": "Spread this.", "tags": {"image": "unsafe", "combined": "unsafe"},
             "category": "deception / rumour", "images": images[1:]}]


def wildjailbreak(folder: Path) -> list[dict]:
    (folder / "train").mkdir()
    (folder / "train" / "train.tsv").write_text(
        "vanilla\tadversarial\tcompletion\tdata_type\n"
        "how to win at chess?\t\tPractise.\tvanilla_benign\n"
        'how to cheat at chess?\t"Two players, ""A"" and B,\tplay."\tSorry, no.\tadversarial_harmful\n'
        "how to be none?\tNA\tWell.\tadversarial_benign\n")
    attack = {"name": "wildteaming", "params": {"request": "how to cheat at chess?"}, "seed": 0,
              "source_id": "request:0855e28b759ad459"}
    return [{"task": "safety", "prompt": "how to win at chess?", "chosen": "Practise.", "attack": None,
             "tags": {"text": "safe", "combined": "safe"}, "category": "vanilla_benign"},
            {"task": "jailbreak", "prompt": 'Two players, "A" and B,\tplay.', "chosen": "Sorry, no.", "attack": attack,
             "tags": {"text": "unsafe", "combined": "unsafe"}},
            {"task": "jailbreak", "prompt": "NA", "tags": {"text": "safe", "combined": "safe"}}]


def flames(folder: Path) -> list[dict]:
    lines(folder / "Flames_1k_Chinese.jsonl", [
        {"dimension": "Fairness", "subcomponent": "Occupation", "prompt": "\u8c01\u66f4\u9002\u5408\uff1f"},
        {"dimension": "Safety", "subcomponent": None, "prompt": "May I?"}])
    return [{"task": "value", "domain": "value", "prompt": "\u8c01\u66f4\u9002\u5408\uff1f", "answer": None,
             "category": "Fairness / Occupation", "licence": "Apache-2.0"}, {"category": "Safety", "prompt": "May I?"}]


def gsm8k(folder: Path) -> list[dict]:
    solution = "He has 4*300=<<4*300=1200>>1200 beads.\n#### 1,200"
    parquet(folder / "main" / "train-00000-of-00001.parquet",
            [{"question": "How many beads?", "answer": solution}, {"question": "And?", "answer": "#### -3.5"}])
    parquet(folder / "main" / "test-00000-of-00001.parquet", [{"question": "no", "answer": "#### 1"}])
    parquet(folder / "socratic" / "train-00000-of-00001.parquet", [{"question": "twice", "answer": solution}])
    return [{"task": "math", "prompt": "How many beads?", "answer": "1200", "licence": "MIT",
             "chosen": "He has 4*300=1200 beads.\n#### 1,200"}, {"answer": "-3.5"}]


def hendrycks_math(folder: Path) -> list[dict]:
    one = {"problem": "What is $x$?", "level": "Level 3", "type": "Algebra"}
    solutions = ("First \\boxed{1}, then $x=\\boxed{\\frac{\\sqrt{2}}{3}}$.", "So it is $\\boxed 5$.",
                 "The set is $\\fbox{\\{1, 2\\}}$")
    parquet(folder / "data" / "train-00000-of-00001.parquet", [{**one, "solution": text} for text in solutions])
    return [{"task": "math", "prompt": "What is $x$?", "answer": "\\frac{\\sqrt{2}}{3}", "chosen": solutions[0],
             "category": "Algebra / Level 3", "licence": "MIT"}, {"answer": "5"}, {"answer": "\\{1, 2\\}"}]


ALL_25: dict[str, dict] = {
    "keywords:existence": {"keywords": ["river", "boat"]},
    "keywords:frequency": {"keyword": "tea", "frequency": 2, "relation": "at least"},
    "keywords:forbidden_words": {"forbidden_words": ["rain"]},
    "keywords:letter_frequency": {"letter": "q", "let_frequency": 3, "let_relation": "less than"},
    "language:response_language": {"language": "de"},
    "length_constraints:number_sentences": {"num_sentences": 3, "relation": "at least"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "length_constraints:number_words": {"num_words": 20, "relation": "less than"},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "apple"},
    "detectable_content:number_placeholders": {"num_placeholders": 2},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:number_bullet_lists": {"num_bullets": 3},
    "detectable_format:constrained_response": {},
    "detectable_format:number_highlighted_sections": {"num_highlights": 2},
    "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 2},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "combination:two_responses": {},
    "combination:repeat_prompt": {"prompt_to_repeat": "Say hello."},
    "startend:end_checker": {"end_phrase": "Any other questions?"},
    "startend:quotation": {},
    "change_case:capital_word_frequency": {"capital_frequency": 2, "capital_relation": "at least"},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "punctuation:no_comma": {},
}
"""IFEval's instructions, each with arguments."""


def ifeval(folder: Path) -> list[dict]:
    every = {name: None for kwargs in ALL_25.values() for name in kwargs}  # as an entry of kwargs holds them there
    parquet(folder / "data" / "train-00000-of-00001.parquet",
            [{"key": i, "prompt": f"Do as told: {name}", "instruction_id_list": [name, "punctuation:no_comma"],
              "kwargs": [{**every, **kwargs}, every]} for i, (name, kwargs) in enumerate(ALL_25.items())])
    lines(folder / "ifeval_input_data.jsonl", [
        {"key": 1, "prompt": "Be brief.", "instruction_id_list": ["length_constraints:number_words"],
         "kwargs": [{"num_words": 9.0, "relation": "less than", "language": None}]}])
    made = [{"task": "ifeval", "prompt": f"Do as told: {name}", "licence": "Apache-2.0", "constraints": [
        {"id": name, "kwargs": kwargs}, {"id": "punctuation:no_comma", "kwargs": {}}]}
        for name, kwargs in ALL_25.items()]
    return [*made, {"id": "ifeval:ifeval_input_data:1", "category": "length_constraints:number_words", "constraints": [
        {"id": "length_constraints:number_words", "kwargs": {"num_words": 9, "relation": "less than"}}]}]


RLVR = (
    ({"func_name": "verify_keywords", "keyword_list": ["river", "boat"]}, ALL_25["keywords:existence"]),
    ({"func_name": "validate_forbidden_words", "forbidden_words": ["rain"]}, ALL_25["keywords:forbidden_words"]),
    ({"func_name": "validate_response_language", "language": "de"}, {"language": "de"}),
    ({"func_name": "verify_paragraph_count", "N": 2}, {"num_paragraphs": 2}),
    ({"func_name": "validate_word_constraint", "N": 20, "quantifier": "at most"},
     {"num_words": 21, "relation": "less than"}),
    ({"func_name": "verify_sentence_constraint", "N": 3, "quantifier": "at least"},
     {"num_sentences": 3, "relation": "at least"}),
    ({"func_name": "validate_paragraphs", "N": 2, "first_word": "apple", "i": 1},
     ALL_25["length_constraints:nth_paragraph_first_word"]),
    ({"func_name": "verify_postscript", "postscript_marker": "P.S."}, {"postscript_marker": "P.S."}),
    ({"func_name": "validate_placeholders", "N": 2}, {"num_placeholders": 2}),
    ({"func_name": "verify_bullet_points", "N": 3}, {"num_bullets": 3}),
    ({"func_name": "validate_title"}, {}),
    ({"func_name": "validate_choice", "options": ["My answer is no.", "My answer is yes.", "My answer is maybe."]}, {}),
    ({"func_name": "validate_highlighted_sections", "N": 2}, {"num_highlights": 2}),
    ({"func_name": "validate_sections", "N": 2, "section_splitter": "Section"},
     ALL_25["detectable_format:multiple_sections"]),
    ({"func_name": "validate_json_format"}, {}),
    ({"func_name": "validate_repeat_prompt", "original_prompt": "Say hello."}, {"prompt_to_repeat": "Say hello."}),
    ({"func_name": "validate_two_responses"}, {}),
    ({"func_name": "validate_uppercase"}, {}),
    ({"func_name": "validate_lowercase"}, {}),
    ({"func_name": "validate_frequency_capital_words", "N": 4, "quantifier": "at most"},
     {"capital_frequency": 5, "capital_relation": "less than"}),
    ({"func_name": "validate_end", "end_phrase": "Any other questions?"}, {"end_phrase": "Any other questions?"}),
    ({"func_name": "validate_quotation"}, {}),
    ({"func_name": "validate_no_commas"}, {}),
)
"""(ground_truth less its nulls, kwargs of the constraint) of each function that is mapped."""


def rlvr(truth: dict | str, **change) -> dict:
    """A record of RLVR-IFeval; its ground_truth names every argument."""
    every = dict.fromkeys(("N", "quantifier", "end_phrase", "keyword_list", "word", "forbidden_words", "letter", "i",
                           "first_word", "postscript_marker", "options", "section_splitter", "original_prompt",
                           "language"))
    return {"messages": [{"role": "user", "content": "Write of tea."}], "constraint_type": "Some kind",
            "ground_truth": truth if isinstance(truth, str) else json.dumps({**every, **truth}), "dataset": "ifeval",
            "constraint": "As it says.", **change}


def rlvr_ifeval(folder: Path) -> list[dict]:
    parquet(folder / "data" / "train-00000-of-00001.parquet", [rlvr(truth) for truth, _ in RLVR])
    return [{"task": "ifeval", "category": "Some kind", "licence": "ODC-BY", "prompt": None,
             "messages": [{"role": "user", "content": "Write of tea."}],
             "constraints": [{"id": FUNCTIONS[truth["func_name"]][0], "kwargs": kwargs}]} for truth, kwargs in RLVR]


def mmmu(folder: Path) -> list[dict]:
    one = {"id": "validation_Art_1", "explanation": "", "img_type": "['Photographs']", "topic_difficulty": "Easy",
           "subfield": "Drawing", "question_type": "multiple-choice", **{f"image_{k}": None for k in range(1, 8)}}
    pictures = [{"path": None, "bytes": png(k)} for k in (0, 1, 2)]
    parquet(folder / "Art" / "validation-00000-of-00001.parquet", [
        {**one, "question": "Look at <image 2>, then <image 1>. Which?", "options": "['<image 3>', \"it's\", 'x']",
         "answer": "B", **{f"image_{k}": picture for k, picture in enumerate(pictures, 1)}},
        {**one, "question": "Which year?", "options": "['1900', '1901']", "answer": "A", "image_1": pictures[0]},
        {**one, "question": "How long is <image 1>? <image 1>", "options": "[]", "answer": "4.5",
         "image_1": pictures[0], "question_type": "open"},
    ])
    part, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    return [{"task": "mcq", "answer": "B", "options": ["<image 3>", "it's", "x"], "category": "Drawing",
             "images": [png(1), png(0), png(2)], "licence": "Apache-2.0", "messages": [{"role": "user", "content": [
                 text("Look at"), part, text(", then"), part, text(". Which?\nA."), part,
                 text("B. it's\nC. x")]}]},
            {"answer": "A", "prompt": "Which year?\nA. 1900\nB. 1901", "images": [png(0)], "options": ["1900", "1901"]},
            {"task": "math", "answer": "4.5", "images": [png(0)] * 2, "options": None}]


def multimodal_open_r1(folder: Path) -> list[dict]:
    solve = lambda answer: f"<think>\nLook.\n</think>\n\n<answer>{answer}</answer>"
    listed = "Which?\nChoices:\n(A) 1\n(B) 2"
    records = [("Find x.", solve(" $\\sqrt{2}$ ")), (listed, solve("B")), ("What is it?", solve("The answer is Yes."))]
    parquet(folder / "data" / "train-00000-of-00001.parquet",
            [{"image": IMAGE, "problem": problem, "solution": solution, "original_question": problem,
              "original_answer": "so."} for problem, solution in records])
    row = {"images": [png(0)], "licence": "not stated"}
    return [{**row, "task": "math", "prompt": "Find x.", "answer": "$\\sqrt{2}$", "chosen": records[0][1]},
            {**row, "task": "mcq", "answer": "B", "options": ["1", "2"], "prompt": listed},
            {**row, "task": "general", "answer": "Yes"}]


def safework(folder: Path) -> list[dict]:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "<image>What is shown?"}]
    images = [picture(folder / "img" / "1.png", 1)]
    lines(folder / "stage2.jsonl", [
        {"prompt": "Is it right to lie?", "label": "value", "reference": None, "images": None},
        {"prompt": chat, "label": "general", "reference": "a cup", "images": ["img/1.png"]},
        {"prompt": "2 + 2?", "label": "gsm8k", "reference": "4"},
        {"prompt": "Name a river.", "label": "normal", "images": ["img/1.png"]},
        {"prompt": "Who wrote it?", "label": "knowledge", "reference": "Ann"}])
    return [{"task": "value", "domain": "value", "prompt": "Is it right to lie?", "answer": None, "images": []},
            {"task": "general", "answer": "a cup", "images": images, "messages": [
                chat[0], {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]},
            {"task": "math", "answer": "4"}, {"task": "helpful", "prompt": "Name a river.", "images": images},
            {"task": "knowledge", "answer": "Ann"}]


def scienceqa(folder: Path) -> list[dict]:
    one = {"question": "Which is a solid?", "choices": ["ice", "water"], "answer": 0, "hint": "Look at it.",
           "grade": "2", "task": "closed choice", "subject": "natural science", "topic": "physics",
           "category": "Matter", "skill": "sort", "lecture": "...", "solution": "", "image": IMAGE}
    parquet(folder / "data" / "train-00000-of-00001.parquet", [one, {**one, "image": None, "hint": "", "answer": 1}])
    return [{"task": "mcq", "answer": "A", "options": ["ice", "water"], "images": [png(0)], "licence": "CC BY-SA 4.0",
             "prompt": "Look at it.\nWhich is a solid?\nA. ice\nB. water", "category": "natural science / physics"},
            {"answer": "B", "images": [], "prompt": "Which is a solid?\nA. ice\nB. water"}]


BUILDERS = {build.__name__: build for build in (
    beavertails_v, flames, geometry3k, gsm8k, hendrycks_math, ifeval, jailbreakv_28k, llava, mathv360k, mmk12, mmmu,
    multimodal_open_r1, pku_saferlhf, rlvr_ifeval, safetag_vl, safework, scienceqa, spa_vl, vlguard, wildjailbreak)}
FILES = {"llava": "mix.json", "mmmu": "Art/validation-00000-of-00001.parquet", "safework": "stage2.jsonl"}
"""Of the sets whose files are named one by one."""


def source_of(name: str, folder: Path) -> Path:
    """What an adapter is given."""
    return folder / FILES.get(name, "")
