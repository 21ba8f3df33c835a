"""What the adapters of single sets refuse, by place, field and mend."""

import json
import time

import pytest
from published import lines, picture, rlvr

from cosmo_rl.data.prepare.__main__ import main
from cosmo_rl.data.prepare.adapters.instructions import EXACT, FUNCTIONS
from cosmo_rl.data.prepare.adapters.reasoning import last_boxed
from cosmo_rl.data.prepare.adapters.registry import NAMES, adapter
from cosmo_rl.data.prepare.convert import convert
from cosmo_rl.data.prepare.options import Convert
from cosmo_rl.data.schema import RowError

LISTED = "Which?\nChoices:\n(A) 1\n(B) 2"
TALK = lambda question, reply: [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
SOLVED = "<think>t</think>\n<answer>{}</answer>"
GOOD: dict[str, dict] = {
    "flames": {"dimension": "Safety", "subcomponent": "s", "prompt": "May I?"},
    "geometry3k": {"images": ["1.png"], "problem": "Find x.", "answer": "3"},
    "gsm8k": {"question": "q?", "answer": "so\n#### 3"},
    "hendrycks_math": {"problem": "p?", "level": "Level 1", "type": "Algebra", "solution": "\\boxed{3}"},
    "ifeval": {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "llava": {"conversations": TALK("a?", "b")},
    "mathv360k": {"image": "1.png", "conversations": TALK(LISTED, "The answer is B")},
    "mmk12": {"question": LISTED, "image": "1.png", "answer": "B"},
    "mmmu": {"question": "See <image 1>", "options": "['a', 'b']", "answer": "A", "question_type": "multiple-choice",
             "image_1": "1.png", "image_2": None},
    "multimodal_open_r1": {"image": "1.png", "problem": LISTED, "solution": SOLVED.format("B")},
    "pku_saferlhf": {"prompt": "q", "response_0": "a", "response_1": "b", "is_response_0_safe": False,
                     "is_response_1_safe": True, "safer_response_id": 1},
    "rlvr_ifeval": rlvr({"func_name": "verify_bullet_points", "N": 3}),
    "safetag_vl": {"images": ["1.png"], "prompt": "Hello", "image_tag": "safe", "text_tag": "safe",
                   "combine_tag": "safe"},
    "safework": {"prompt": "p", "label": "value", "reference": None, "images": None},
    "scienceqa": {"question": "q?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": None},
    "vlguard": {"id": "1", "image": "1.png", "safe": True, "instr-resp": [{"safe_instruction": "a", "response": "b"}]},
}
"""A good record of a set, as JSON lines."""
USER = {"role": "user", "content": "a?"}
BAD = [
    ("flames", {"prompt": None}, "`prompt`: is missing or blank; mend or remove"),
    ("flames", {"prompt": ["May I?"]}, "`prompt`: is list, not a text"),
    ("flames", {"dimension": 3}, "`dimension`: is int, not a text"),
    ("flames", {"prompt": "See <image>"}, "`prompt`: holds <image>, which the model would read as words; remove it"),
    ("geometry3k", {"images": None}, "`images`: holds 0 images, not 1 or more"),
    ("geometry3k", {"images": []}, "`images`: holds 0 images, not 1 or more"),
    ("gsm8k", {"answer": "so it is 3"}, "`answer`: states no number after ####: 'so it is 3'"),
    ("gsm8k", {"answer": "#### "}, "`answer`: states no number"),
    ("gsm8k", {"answer": "#### none"}, "`answer`: states no number"),
    ("gsm8k", {"answer": "#### 3" + " and so on" * 10}, "`answer`: states no number"),
    ("gsm8k", {"answer": None}, "`answer`: is missing or blank"),
    ("gsm8k", {"answer": 3}, "`answer`: is int, not a text"),
    ("gsm8k", {"question": " "}, "`question`: is missing or blank"),
    ("gsm8k", {"choices": ["a"]}, "`choices`: is there, but layout gsm8k has no such field"),
    ("hendrycks_math", {"solution": "It is 3."}, "`solution`: boxes no answer: 'It is 3.'"),
    ("hendrycks_math", {"solution": "\\boxed{3"}, "`solution`: boxes no answer"),
    ("hendrycks_math", {"solution": "\\boxed{ }"}, "`solution`: boxes no answer"),
    ("hendrycks_math", {"solution": None}, "`solution`: is missing or blank"),
    ("hendrycks_math", {"level": 3}, "`level`: is int, not a text"),
    ("hendrycks_math", {"type": None}, "`type`: is missing or blank"),
    ("ifeval", {"instruction_id_list": []}, "`instruction_id_list`: is empty: there is nothing to check"),
    ("ifeval", {"instruction_id_list": None}, "`instruction_id_list`: is missing"),
    ("ifeval", {"instruction_id_list": "punctuation:no_comma"}, "`instruction_id_list`: is str, not a list of texts"),
    ("ifeval", {"instruction_id_list": [3]}, "`instruction_id_list[0]`: is int, not a text"),
    ("ifeval", {"instruction_id_list": ["a", None], "kwargs": [{}, {}]}, "`instruction_id_list[1]`: is missing"),
    ("ifeval", {"kwargs": []}, "`kwargs`: is '[]', not a list of 1, one for each instruction"),
    ("ifeval", {"kwargs": None}, "`kwargs`: is 'None', not a list of 1"),
    ("ifeval", {"kwargs": {"a": 1}}, "`kwargs`: is \"{'a': 1}\", not a list of 1"),
    ("ifeval", {"kwargs": ["x"]}, "`kwargs[0]`: is 'x', not an object of arguments"),
    ("ifeval", {"prompt": None}, "`prompt`: is missing or blank"),
    ("llava", {"video": "a.mp4"}, "`video`: is there: a row holds images only; leave the record out"),
    ("llava", {"videos": ["a.mp4"], "image": "1.png"}, "`videos`: is there: a row holds images only"),
    ("llava", {"audio": "a.wav"}, "`audio`: is there: a row holds images only"),
    ("llava", {"video_path": "a.mp4"}, "`video_path`: is there: a row holds images only"),
    ("llava", {"conversations": [{"from": "bot", "value": "a"}]}, "`conversations[0].from`: is 'bot'; give one of"),
    ("llava", {"conversations": [{"from": "human", "value": 3}]}, "`conversations[0].value`: is int, not a text"),
    ("llava", {"conversations": TALK("<video>\nWhat happens?", "b")},
     "`messages[0].content`: holds <video>, which the model would read as words; remove the row: videos are not read"),
    ("llava", {"conversations": TALK("a?", "see <video>")}, "`chosen`: holds <video>"),
    ("llava", {"conversations": TALK("a?", "b <image>")}, "`chosen`: holds <image>"),
    ("llava", {"conversations": TALK("<image 1> a?", "b"), "image": None}, "`messages[0].content`: holds <image 1>"),
    ("llava", {"conversations": TALK("<image>a?", "b")}, "holds 1 <image> placeholders for 0 images"),
    ("llava", {"conversations": []}, "`conversations`: is not a list of turns"),
    ("llava", {"conversations": [USER]}, "`conversations[0]`: is not an object of from, value"),
    ("llava", {"conversations": TALK("a", "b")[1:]}, "`conversations[0]`: is a reply that no human turn comes before"),
    ("llava", {"conversations": TALK("a", "b")[:1]}, "`conversations`: ends without a reply"),
    ("llava", {"conversations": TALK("<image><image>", "b"), "image": "1.png"}, "2 <image> placeholders for 1"),
    ("llava", {"conversations": TALK("<image>a?", "b"), "image": ["1.png", "1.png"]},
     "`conversations`: has 1 <image> placeholders for 2 images"),
    ("llava", {"conversations": TALK("a", "<|vision_start|>")}, "`chosen`: holds the reserved token"),
    ("mathv360k", {"conversations": TALK("a?", "word " * 30)}, "`conversations[1]`: states no short answer: 'word"),
    ("mathv360k", {"conversations": TALK("a?", "1") * 2}, "has turns by user, assistant, user, assistant"),
    *(("mathv360k", {"conversations": TALK("a?", reply)}, "`conversations[1]`: states no short answer: ")
      for reply in ("The answer is", "The answer is .", "The answer is:", "Answer:", ".")),
    ("mathv360k", {"conversations": TALK(LISTED, "The answer is C")},
     "`conversations[1]`: answers 'C', and the question lists 2 choices, A to B; list each choice on a line of its "
     "own, as (A) ..., or remove the record"),
    ("mathv360k", {"conversations": TALK(LISTED, "b")}, "`conversations[1]`: answers 'b', and the question lists 2"),
    ("mathv360k", {"conversations": TALK("Choices: (A) 1 (B) 2", "Answer: (B).")},
     "`conversations[1]`: answers 'B', and the question lists no choices"),
    ("mathv360k", {"conversations": TALK("Choices:\n(A) 1\n(C) 2", "The answer is C")}, "answers 'C', and the"),
    ("mathv360k", {"video": "a.mp4"}, "`video`: is there: a row holds images only"),
    ("mmk12", {"answer": "C"}, "`answer`: answers 'C', and the question lists 2 choices, A to B"),
    ("mmk12", {"image": "none.png"}, "`image`: the image file "),
    ("mmk12", {"message": "[{"}, "`message`: is not a text that holds JSON"),
    ("mmk12", {"message": '"a"'}, "`message`: is not a list of chat messages"),
    ("mmk12", {"conversations": [USER], "image_urls": ["file:///theirs/1.png"]}, "leads out of the image folder"),
    ("mmk12", {"conversations": [{**USER, "role": "system"}], "image_urls": ["1.png"]},
     "`conversations`: has no place for 1 of 1 images"),
    ("mmk12", {"conversations": [USER, {"role": "tool", "content": "b"}], "image_urls": []}, "'tool'"),
    ("mmmu", {"answer": "C"}, "`answer`: names choice 2 of 2 (counted from 0)"),
    ("mmmu", {"answer": "a"}, "`answer`: is 'a', not the capital letter of a choice"),
    ("mmmu", {"answer": "AB"}, "`answer`: is 'AB', not the capital letter"),
    ("mmmu", {"answer": "?"}, "`answer`: is '?', not the capital letter"),
    ("mmmu", {"answer": None}, "`answer`: is missing or blank"),
    ("mmmu", {"options": "['a', 'b'"}, "`options`: is no list written as Python does: \"['a', 'b'\"; write it as"),
    ("mmmu", {"options": "__import__('os').getcwd()"}, "`options`: is no list written as Python does"),
    ("mmmu", {"options": "[" * 5000}, "`options`: is no list written as Python does"),
    ("mmmu", {"options": "{{}}"}, "`options`: is no list written as Python does"),
    ("mmmu", {"options": "{[1]: 2}"}, "`options`: is no list written as Python does"),
    ("mmmu", {"options": f"[0x{'f' * 5000}, 2]"}, "`options`: is no list written as Python does: '[0xfff"),
    ("mmmu", {"options": str(list(range(27)))}, "`answer`: is one of 27 choices, more than there are letters"),
    ("mmmu", {"question": f"See <image {'9' * 5000}>"}, "holds <image 9999"),
    ("mmmu", {"options": "'a'"}, "`options`: is str, not a list of texts"),
    ("mmmu", {"options": "['a', '']"}, "`options[1]`: is missing or blank"),
    ("mmmu", {"options": "['a', None]"}, "`options[1]`: is missing or blank"),
    ("mmmu", {"options": "['a', 'a']"}, "`options`: 2 options, 1 of them different"),
    ("mmmu", {"options": "['a']"}, "`options`: 1 options, 1 of them different; give at least 2"),
    ("mmmu", {"question": "See <image 2>"}, "`image_2`: is missing, and the text names <image 2>"),
    ("mmmu", {"image_2": "1.png"}, "`question`: names <image 1>, but not image_2, which is there"),
    ("mmmu", {"options": "['a', '<image 7>']"}, "`image_7`: is missing, and the text names <image 7>"),
    ("mmmu", {"image_1": "none.png"}, "`image_1`: the image file "),
    ("mmmu", {"question_type": "open", "answer": "['1', '2']"}, "`answer`: is a list of answers"),
    ("mmmu", {"question_type": "open", "answer": "D"}, "`answer`: answers 'D', and the question lists no choices"),
    ("multimodal_open_r1", {"image": None}, "`image`: holds 0 images, not 1"),
    ("multimodal_open_r1", {"solution": "B"}, "`solution`: holds 0 <answer>...</answer>, not one"),
    ("multimodal_open_r1", {"solution": SOLVED.format("A") * 2}, "`solution`: holds 2 <answer>"),
    ("multimodal_open_r1", {"solution": SOLVED.format(" ")}, "`solution`: states no short answer: ''"),
    ("multimodal_open_r1", {"solution": SOLVED.format("word " * 30)}, "`solution`: states no short answer: 'word"),
    ("multimodal_open_r1", {"solution": SOLVED.format("D")}, "`solution`: answers 'D', and the question lists 2"),
    ("multimodal_open_r1", {"problem": "Which?", "solution": SOLVED.format("The answer is C.")}, "lists no choices"),
    ("multimodal_open_r1", {"problem": "<image><image>?"}, "`problem`: holds 2 <image> placeholders for 1 images"),
    ("pku_saferlhf", {"response_0_harm_category": {"Insults": "False"}},
     "`response_0_harm_category`: holds 'False', not a truth value"),
    ("pku_saferlhf", {"response_1_harm_category": ["Insults"]}, "`response_1_harm_category`: is list, not an object"),
    ("rlvr_ifeval", {"ground_truth": "{"}, "`ground_truth`: is not a text that holds JSON"),
    ("rlvr_ifeval", {"ground_truth": "[" * 100_000}, "`ground_truth`: is not a text that holds JSON"),
    ("rlvr_ifeval", {"ground_truth": '{"N": 1, "N": 2}'}, "holds JSON (field 'N' is given twice)"),
    ("rlvr_ifeval", {"ground_truth": "[]"}, "`ground_truth`: holds [], not an object of func_name and arguments"),
    ("rlvr_ifeval", {"ground_truth": {"func_name": "validate_title"}}, "`ground_truth`: is dict, not a text"),
    ("rlvr_ifeval", {"ground_truth": None}, "`ground_truth`: is missing or blank"),
    ("rlvr_ifeval", rlvr({}), "`ground_truth.func_name`: is missing or blank"),
    ("rlvr_ifeval", rlvr({"func_name": "verify_haiku"}),
     "`ground_truth.func_name`: verify_haiku: no such function is known; leave the record out"),
    ("rlvr_ifeval", rlvr({"func_name": "verify_keyword_frequency", "word": "tea", "N": 3}),
     "`ground_truth.func_name`: verify_keyword_frequency: it asks for an exact count"),
    ("rlvr_ifeval", rlvr({"func_name": "verify_letter_frequency", "letter": "q", "N": 3}),
     "`ground_truth.func_name`: verify_letter_frequency: it asks for an exact count"),
    ("rlvr_ifeval", rlvr({"func_name": "validate_word_constraint", "N": 50, "quantifier": "around"}),
     "validate_word_constraint: 'around' a number is nothing that IFEval's checker asks for"),
    ("rlvr_ifeval", rlvr({"func_name": "validate_choice", "options": ["yes", "no"]}), "its choices are not IFEval's"),
    ("rlvr_ifeval", rlvr({"func_name": "validate_choice"}), "`ground_truth.options`: is missing"),
    ("rlvr_ifeval", rlvr({"func_name": "verify_paragraph_count", "N": 2}, messages=[
        {"role": "user", "content": "Paragraphs are separated with the markdown divider: * * *"}]),
     "verify_paragraph_count: its paragraphs are divided by * * *"),
    ("rlvr_ifeval", rlvr({"func_name": "verify_bullet_points"}), "`ground_truth.N`: is missing"),
    ("rlvr_ifeval", rlvr({"func_name": "verify_bullet_points", "N": "3"}), "`ground_truth.N`: is '3', not a whole"),
    ("rlvr_ifeval", rlvr({"func_name": "verify_bullet_points", "N": 2.5}), "`ground_truth.N`: is '2.5', not a whole"),
    ("rlvr_ifeval", rlvr({"func_name": "verify_bullet_points", "N": float("nan")}), "`ground_truth.N`: is 'nan', not"),
    ("rlvr_ifeval", rlvr({"func_name": "verify_bullet_points", "N": True}), "`ground_truth.N`: is 'True', not a whole"),
    ("rlvr_ifeval", rlvr({"func_name": "verify_keywords", "keyword_list": "a, b"}),
     "`ground_truth.keyword_list`: is str, not a list of texts"),
    ("rlvr_ifeval", rlvr({"func_name": "validate_title"}, messages=None), "`messages`: is missing"),
    ("rlvr_ifeval", rlvr({"func_name": "validate_title"}, messages=[
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), "the last message is by assistant"),
    ("safetag_vl", {"images": None}, "`images`: holds 0 images, not 1 or more"),
    ("safetag_vl", {"text_tag": "fine"}, "`text_tag`: is 'fine'; give one of 'safe', 'unsafe'"),
    ("safework", {"label": "safety"}, "`label`: is safety, and nothing says whether the prompt is harmful; give "
                                      "--unlabelled unsafe or safe"),
    ("safework", {"label": "muldimif"}, "`label`: is 'muldimif'; give one of 'value', "),
    ("safework", {"label": None}, "`label`: is None; give one of"),
    ("safework", {"label": "knowledge"}, "`reference`: is missing, and label knowledge is scored against it"),
    ("safework", {"label": "gsm8k", "reference": 4}, "`reference`: is int, not a text"),
    ("safework", {"prompt": []}, "`prompt`: is no list of messages {role, content} that ends with the user's"),
    ("safework", {"prompt": [{"role": "assistant", "content": "a"}]}, "`prompt`: is no list of messages"),
    ("safework", {"prompt": [{"role": "user", "content": None}]}, "`prompt`: is missing or blank"),
    ("safework", {"prompt": "See <image>."}, "`prompt`: holds 1 <image> placeholders for 0 images"),
    ("safework", {"images": ["1.png", "none.png"]}, "`images[1]`: the image file "),
    ("scienceqa", {"answer": 2}, "`answer`: names choice 2 of 2 (counted from 0)"),
    ("scienceqa", {"answer": -1}, "`answer`: names choice -1 of 2"),
    ("scienceqa", {"answer": None}, "`answer`: is missing"),
    ("scienceqa", {"answer": "B"}, "`answer`: is 'B', not a whole number"),
    ("scienceqa", {"answer": True}, "`answer`: is 'True', not a whole number"),
    ("scienceqa", {"answer": 0.5}, "`answer`: is '0.5', not a whole number"),
    ("scienceqa", {"choices": None}, "`choices`: is missing"),
    ("scienceqa", {"choices": "a, b"}, "`choices`: is str, not a list of texts"),
    ("scienceqa", {"choices": ["a", 2]}, "`choices[1]`: is int, not a text"),
    ("scienceqa", {"choices": ["a", "a"]}, "`options`: 2 options, 1 of them different"),
    ("scienceqa", {"image": "none.png"}, "`image`: the image file "),
    ("scienceqa", {"image": 7}, "`image`: holds no image"),
    ("scienceqa", {"question": None}, "`question`: is missing or blank"),
    ("vlguard", {"image": None}, "`image`: holds 0 images, not 1"),
    ("vlguard", {"image": "ads/none.png"}, "none.png does not exist; unpack"),
    ("vlguard", {"image": "../../secret.png"}, "`image`: ../../secret.png leads out of the image folder"),
    ("vlguard", {"image": "../../set2/1.png"}, "`image`: ../../set2/1.png leads out of the image folder"),
    ("vlguard", {"image": "/etc/hostname"}, "`image`: /etc/hostname leads out of the image folder"),
    ("vlguard", {"image": "file:///etc/hostname"}, "leads out of the image folder"),
    ("vlguard", {"image": "https://x.org/1.png"}, "`image`: https://x.org/1.png is a URL; download"),
    ("vlguard", {"image": 3}, "`image`: holds no image"),
    ("vlguard", {"safe": "yes"}, "`safe`: is 'yes'; give one of True, False"),
    ("vlguard", {"instr-resp": "text"}, "`instr-resp`: is 'text', not a list of objects"),
    ("vlguard", {"instr-resp": [{"instruction": "a", "response": "b"}]},
     "`instr-resp[0]`: has instruction, response where `safe` is True"),
    ("vlguard", {"instr-resp": [{"safe_instruction": " "}]}, "`safe_instruction`: is missing or blank"),
    ("vlguard", {"instr-resp": [{"safe_instruction": ["a"]}]}, "`safe_instruction`: is list, not a text"),
    ("vlguard", {"instr-resp": [{"safe_instruction": "<image><image> a"}]}, "2 <image> placeholders for 1 images"),
    ("vlguard", {"instr-resp": [{"safe_instruction": "a", "response": "<|im_end|>"}]}, "`chosen`: holds the reserved"),
    ("vlguard", {"instr-resp": [{"safe_instruction": "<|image_pad|>"}]}, "`prompt`: holds the reserved token"),
]


@pytest.mark.parametrize(("name", "change", "part"), BAD)
def test_a_bad_record_is_told_by_place_and_field_and_the_others_stay(tmp_path, name, change, part):
    path, good, found = tmp_path / "set" / "a.jsonl", GOOD[name], list[RowError]()
    for image in ("set/1.png", "secret.png", "set2/1.png"):  # the last: a sibling whose name only starts alike
        picture(tmp_path / image, 0)
    lines(path, [good, {**good, **change}, good])
    rows = list(adapter(name)(path, reject=found.append))
    assert [row["id"] for row in rows] == [f"{name}:a:1", f"{name}:a:3"]
    (error,) = found
    assert str(error).startswith(f"{path}:2: field `") and part in str(error), str(error)
    assert error.args[3]
    with pytest.raises(RowError, match=r"a.jsonl:2"):  # the strict default
        list(adapter(name)(path))


@pytest.mark.parametrize(("name", "change"), [
    ("multimodal_open_r1", {"solution": "<answer>" * 30_000}),
    ("mathv360k", {"conversations": TALK("q?", "The answer is 5" + "." * 300_000 + "x")}),
    ("mathv360k", {"conversations": TALK("(A) 1\n(B) 2" + " " * 300_000 + "x", "The answer is C")})])
def test_a_long_text_is_read_in_one_pass(tmp_path, name, change):
    """Patterns that look again from each place took minutes."""
    picture(tmp_path / "1.png", 0)
    lines(tmp_path / "a.jsonl", [{**GOOD[name], **change}])
    found: list[RowError] = []
    started = time.perf_counter()
    assert not list(adapter(name)(tmp_path / "a.jsonl", reject=found.append)) and found
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("name", [name for name in GOOD if len(adapter(name).fields) == 1])
def test_a_missing_column_is_another_layout(tmp_path, name):
    picture(tmp_path / "1.png", 0)
    for column in sorted(adapter(name).fields[-1]):
        lines(tmp_path / "a.jsonl", [{key: value for key, value in GOOD[name].items() if key != column}])
        with pytest.raises(RowError) as caught:
            list(adapter(name)(tmp_path / "a.jsonl"))
        told = f"{tmp_path / 'a.jsonl'}:1: field `{column}`: is not there, but layout {name} has {column}; "
        assert str(caught.value).startswith(told)


def test_a_harmful_safework_row_needs_its_label(tmp_path):
    lines(tmp_path / "a.jsonl", [{"prompt": "How?", "label": "safety"}])
    (row,) = adapter("safework")(tmp_path / "a.jsonl", unlabelled="unsafe")
    assert row["task"] == "safety" and row["tags"] == {"combined": "unsafe"}
    out = tmp_path / "rows.jsonl"
    summary = convert(Convert(name="safework", in_=(str(tmp_path / "a.jsonl"),), out=str(out), unlabelled="safe"))
    assert summary.rows == {("safety", "safety", "safe"): 1}


def test_all_functions_of_rlvr_are_mapped_or_refused_by_name():
    """Their 25, and no two to one of IFEval's ids."""
    assert len(FUNCTIONS) + len(EXACT) == 25 and not {*EXACT} & {*FUNCTIONS}
    assert len({known for known, _ in FUNCTIONS.values()}) == 23


@pytest.mark.parametrize(("text", "answer"), [
    ("\\boxed{3}", "3"), ("\\boxed {3}", "3"), ("\\boxed{\\frac{1}{2}} or \\boxed{\\frac{3}{4}}", "\\frac{3}{4}"),
    ("$\\fbox{x}$", "x"), ("\\boxed 5$", "5"), ("\\boxed{\\{1\\}}", "\\{1\\}"),
    ("\\boxed{\\left\\{x\\right.} so", "\\left\\{x\\right."), ("\\boxed{1\\\\} and {2}", "1\\\\"),
    ("\\boxed{a}{b}", "a"), ("none", ""),
    ("\\boxed{", ""), ("\\boxed{}", ""), ("\\boxed", ""), ("\\unboxed{3}", ""),
])
def test_the_last_box(text, answer):
    assert last_boxed(text) == answer


def test_a_conversion_tells_each_problem_and_counts_the_record_once(tmp_path, capsys):
    talk = TALK("a? <video>", "see <image>")
    lines(tmp_path / "a.jsonl", [{"conversations": talk}, {"conversations": TALK("a?", "b")}])
    main(["convert", "--name", "llava", "--in", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "rows.jsonl")])
    table = capsys.readouterr().out
    assert f"rejected{1:>39}\n" in table
    for told in ("`messages[0].content`: holds <video>", "`chosen`: holds <image>"):
        assert f"{1:>9}  as {tmp_path / 'a.jsonl'}:1: field {told}" in table


def test_the_list_names_every_adapter_with_task_layout_and_licence(capsys):
    main(["convert", "--list"])
    told = capsys.readouterr().out
    for name in NAMES:
        one = adapter(name)
        block = told[told.index(f"{name:<20}"):].split("\n")[:4]
        assert block[0] == f"{name:<20}{', '.join(one.tasks)}" and f"licence: {one.licence}" in block[1]
        assert all(field in block[3] for fields in one.fields for field in fields)


@pytest.mark.parametrize("missing", ["name", "in", "out"])
def test_a_conversion_without_one_of_its_three_options(tmp_path, capsys, missing):
    given = {"name": "llava", "in": str(tmp_path), "out": str(tmp_path / "rows.jsonl")}
    words = [word for name, value in given.items() if name != missing for word in (f"--{name}", value)]
    assert main(["convert", *words]) == 1
    told = f"convert: --{missing} is missing; give --name, --in and --out (--list"
    assert capsys.readouterr().err.startswith(told)


def test_a_letter_that_is_a_value_stays_one(tmp_path):
    """In MMK12 a letter without listed choices is compared as a value, as it was."""
    picture(tmp_path / "1.png", 0)
    lines(tmp_path / "a.jsonl", [{"question": "Which point?", "image": "1.png", "answer": "B"}])
    (row,) = adapter("mmk12")(tmp_path / "a.jsonl")
    assert (row["task"], row["answer"]) == ("math", "B")
    lines(tmp_path / "b.jsonl", [{"image": "1.png", "conversations": TALK("What is unknown?", "The answer is x")}])
    (row,) = adapter("mathv360k")(tmp_path / "b.jsonl")
    assert (row["task"], row["answer"]) == ("general", "x") and json.dumps(row)
