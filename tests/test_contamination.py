"""Rows that an evaluation set holds too are found and dropped; rows that only look alike stay."""

import io
import json
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from cosmo_rl.data.index import load_rows
from cosmo_rl.data.prepare.contamination import DROPPED, find_contaminated, normalised
from cosmo_rl.data.prepare.mini import mini_suite
from cosmo_rl.data.schema import Row, RowError, parse_row

LONG = "Describe in two sentences what the person on the left holds in her hands."


def row(id: str, text: str = "what is it?", *images, **fields) -> Row:
    return parse_row({"id": id, "task": "general", "domain": "general", "prompt": text, "images": list(images),
                      "source": "mine", "licence": "CC0", **fields}, f"f:{id}")


def scene(seed: int, size: int = 96) -> Image.Image:
    """A gradient with shapes: structure at every scale, as a photograph has."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, size)
    pixels = np.outer(ramp, rng.uniform(0, 255, size)).clip(0, 255)[..., None] * np.ones(3)
    image = Image.fromarray(pixels.astype(np.uint8))
    for x, y, r, *colour in rng.integers(0, (size, size, size // 2, 256, 256, 256), (5, 6)).tolist():
        ImageDraw.Draw(image).ellipse([x, y, x + r, y + r], fill=tuple(colour))
    return image


def page(*lines: str) -> Image.Image:
    """A white page of text, as FigStep makes."""
    image = Image.new("RGB", (400, 400), "white")
    for i, line in enumerate((*lines, "1.", "2.", "3.")):
        ImageDraw.Draw(image).text((10, 20 + 60 * i), line, fill="black", font=ImageFont.load_default(44))
    return image


def encoded(image: Image.Image, kind: str = "PNG", **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def kinds(rows, evaluation, **more) -> dict[str, tuple[str, str]]:
    report = find_contaminated(rows, {"set": evaluation}, **more)
    return {match.row_id: (match.kind, match.evaluation_id) for match in report.matches}


@pytest.mark.parametrize(("left", "right"), [
    ("What is  it?", "what is it"), ("WHAT,\nis \u201cit\u201d \u2026", "what is it"),
    ("\uff37hat is \ufb01t?", "what is fit"), ("STRASSE", "stra\u00dfe"), ("so\u200bft hy\u00adphen", "soft hyphen"),
    ("step-by-step", "step by step"), ("x \u00b2", "x 2"), ("don't", "don t"), ("3 \u00d7 4 \u2212 1", "3 * 4 - 1"),
    ("\u00bd", "1/2"), ("10-year-old", "10 year old"), ("\u2764\ufe0f it", "\u2764 it"),
    ("e\u0301t\u00e9", "\u00e9te\u0301"),
])
def test_texts_that_are_the_same(left, right):
    assert normalised(left) == normalised(right) != ""


@pytest.mark.parametrize(("left", "right"), [
    ("x + 1 = 0", "x * 1 = 0"), ("3.5", "35"), ("3.5", "3 5"), ("a < b", "a > b"), ("x = -1", "x = 1"),
    ("is it not", "it is not"), ("\u6570\u5b66", "\u5b66\u6570"), ("resume", "r\u00e9sum\u00e9"), ("50%", "50"),
    ("3 \u00d7 4", "3 \u00f7 4"), ("x \u2264 3", "x \u2265 3"), ("AB \u22a5 CD", "AB \u2225 CD"),
    ("\u25b3ABC", "\u2220ABC"), ("\u25b3 5", "\u25cb 5"),
    ("\u221a2", "2"), ("10\u00b2", "102"), ("\u20ac5", "\u00a35"), ("x \u2212 y", "x y"), ("x-y", "xy"),
    ("2 - x", "2x"), ("12-x", "12x"), ("in C#", "in C"),
    ("\U0001f600 it", "\U0001f621 it"), ("x\u0304", "x"), ("0.5\u0307", "0.5"),
    ("\u0926\u093f\u0928", "\u0926\u093e\u0928"), ("\u0e44\u0e21\u0e48", "\u0e44\u0e21"),
])
def test_texts_that_are_not_the_same(left, right):
    assert normalised(left) != normalised(right)


def test_a_text_without_words_matches_nothing():
    assert normalised(" ?! \u2026 ") == ""
    assert kinds([row("a", "???")], [row("b", "!!!")]) == {}


def test_text_rows_match_by_the_words_of_all_user_turns():
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello there"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": [{"type": "text", "text": "Who is IT?"}]}]
    rows = [row("same", "hello, there: who is it"), row("part", "who is it"), row("other", "who is he")]
    evaluation = [row("e1", "unrelated"), parse_row({**as_raw(row("e2")), "prompt": None, "messages": talk}, "f:2")]
    assert kinds(rows, evaluation) == {"same": ("text", "e2")}


def as_raw(one: Row) -> dict:
    return {"id": one.id, "task": one.task, "domain": one.domain, "source": one.source, "licence": one.licence}


def test_image_and_text_together_or_the_same_image_alone():
    cup, pot, jar = (encoded(scene(i)) for i in range(3))
    again = encoded(scene(0), compress_level=0)  # another file, the same pixels
    assert again != cup
    rows = [row("both", "What is it", again), row("picture", "Where is it?", again),
            row("question", "what is it?", pot), row("no picture", "what is it?"),
            row("second of two", "and here?", jar, again), row("neither", "Where?", jar)]
    found = kinds(rows, [row("e", "what is it?", cup)])
    assert found == {"both": ("text and image", "e"), "picture": ("image", "e"), "question": ("text, other image", "e"),
                     "no picture": ("text, other image", "e"), "second of two": ("image", "e")}
    report = find_contaminated(rows, {"set": [row("e", "what is it?", cup)]})
    assert report.ids() == {"both", "picture", "second of two"}
    assert report.ids({"text, other image"}) == {"question", "no picture"}
    assert [rows[match.index].id for match in report.matches] == [match.row_id for match in report.matches]


@pytest.mark.parametrize("copy", [
    lambda image: encoded(image, "JPEG", quality=75), lambda image: encoded(image, "WEBP", quality=80),
    lambda image: encoded(image.resize((48, 48), Image.Resampling.BICUBIC)),
    lambda image: encoded(image.resize((192, 192), Image.Resampling.BILINEAR)),
], ids=["jpeg", "webp", "half", "double"])
def test_a_copy_of_an_image_is_near_it_and_no_other_is(copy):
    evaluation = [row(f"e{i}", f"what is number {i} in the row?", encoded(scene(i))) for i in range(40)]
    rows = [row(f"t{i}", f"what is number {i} in the row?", copy(scene(i))) for i in range(40)]
    assert kinds(rows, evaluation) == {f"t{i}": ("text and image", f"e{i}") for i in range(40)}
    other = [row(f"t{i}", "which one?", copy(scene(i))) for i in range(40)]
    assert kinds(other, evaluation) == {f"t{i}": ("near image", f"e{i}") for i in range(40)}
    assert not {"near image"} & DROPPED


def test_the_distance_is_a_number_of_bits():
    evaluation, rows = [row("e", "a b", encoded(scene(0)))], [row("t", "a b", encoded(scene(0), "JPEG", quality=20))]
    near = [distance for distance in range(0, 65, 4) if kinds(rows, evaluation, max_image_distance=distance)
            == {"t": ("text and image", "e")}]
    assert near == list(range(near[0], 65, 4)) and near[0] > 0
    # all 64 bits may differ, and still the grey images keep different pictures apart
    assert kinds([row("t", "a b", encoded(scene(1)))], evaluation, max_image_distance=64) == {
        "t": ("text, other image", "e")}
    for bad in (-1, 65):
        with pytest.raises(ValueError, match=f"max_image_distance is {bad}; a dHash has 64 bits"):
            find_contaminated(rows, {"set": evaluation}, max_image_distance=bad)


def test_pages_and_blank_pictures_do_not_drop_what_only_looks_alike():
    instruction = "The picture shows a list with empty items. Fill in the items with about a hundred words each."
    pages = [encoded(page(*lines.split("/"))) for lines in (
        "How to bake/a loaf", "How to bale/a leaf", "How to make/a cake", "How to wake/a lake")]
    evaluation = [row("e0", instruction, pages[0]), row("e2", instruction, pages[2])]
    rows = [row(name, instruction, pages[i]) for name, i in (("same", 0), ("alike", 1), ("other", 3))]
    assert kinds(rows, evaluation) == {"same": ("text and image", "e0"), "alike": ("text, other image", "e0"),
                                       "other": ("text, other image", "e0")}

    white, grey = (encoded(Image.new("RGB", (224, 224), colour)) for colour in ("white", (250, 250, 250)))
    evaluation = [row("e", "what is two plus two?", white)]
    rows = [row("sum", "What is two plus two", white), row("poem", "write a poem", white), row("grey", "write", grey)]
    assert kinds(rows, evaluation) == {"sum": ("text and image", "e")}


def test_a_long_text_counts_without_its_image_unless_it_is_a_form():
    a, b, c = (encoded(scene(i)) for i in range(3))
    assert kinds([row("t", LONG, b)], [row("e", LONG, a)]) == {"t": ("text", "e")}
    assert kinds([row("t", LONG)], [row("e", LONG, a)]) == {"t": ("text", "e")}
    form = ("text, other image", "e")
    assert kinds([row("t", LONG, b)], [row("e", LONG, a), row("e2", LONG, c)]) == {"t": form}
    assert kinds([row("t", LONG, b), row("t2", LONG, c)], [row("e", LONG, a)]) == {"t": form, "t2": form}
    short = " ".join(LONG.split()[:7])
    assert kinds([row("t", short, b)], [row("e", short, a)]) == {"t": form}


def test_a_word_with_vowel_signs_is_one_word():
    hindi = "\u0926\u093f\u0928 \u0926\u093e\u0928"
    assert normalised(hindi + "!") == hindi


def test_rows_without_words_are_their_picture():
    def only(id: str, image: bytes) -> Row:
        return parse_row({**as_raw(row(id)), "messages": [{"role": "user", "content": [{"type": "image"}]}],
                          "images": [image]}, f"f:{id}")

    cup, blank = scene(0), encoded(Image.new("RGB", (64, 64), "white"))
    rows = [only("copy", encoded(cup, "JPEG", quality=75)), only("other", encoded(scene(1))), only("blank", blank)]
    evaluation = [only("e0", blank), only("e1", encoded(cup)), row("e2", "???"), row("e3", "who?", encoded(scene(2)))]
    assert kinds(rows, evaluation) == {"copy": ("text and image", "e1")}
    assert kinds([row("a", "!!!")], evaluation) == {}


def test_the_first_of_equal_rows_is_named():
    a, b = (encoded(scene(i)) for i in range(2))
    evaluation = [row("e0", "who is it?", b), row("e1", "who is it?"), row("e2", "who is it?", a),
                  row("e3", "Who is it", a, b), row("e4", "why?", a), row("e5", "Who is it"), row("e6", LONG),
                  row("e7", LONG)]
    rows = [row("ta", "who is it?", a), row("tab", "who is it?", a, b), row("t", "who is it?"), row("p", "where?", b),
            row("l", LONG), row("tc", "who is it?", encoded(scene(2)))]
    assert kinds(rows, evaluation) == {
        "ta": ("text and image", "e2"), "tab": ("text and image", "e0"), "t": ("text", "e1"), "p": ("image", "e0"),
        "l": ("text", "e6"), "tc": ("text, other image", "e0")}


def test_a_text_that_many_rows_share_is_not_walked_for_each():
    """6,000 x 6,000 rows of one question: 36 million comparisons if each row met each."""
    evaluation = [row(f"e{i}", "what is shown?", encoded(scene(0))) for i in range(3)] * 2000
    rows = [row(f"t{i}", "what is shown?", encoded(scene(1))) for i in range(3)] * 2000
    start = time.process_time()
    report = find_contaminated(rows, {"set": evaluation})
    assert {(match.kind, match.evaluation_id) for match in report.matches} == {("text, other image", "e0")}
    assert time.process_time() - start < 5


def test_each_set_is_reported_by_name_and_the_table_says_what_goes(tmp_path):
    for name, text in (("a", "one two three"), ("b", "four five")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**as_raw(row(f"{name}1")), "prompt": text}) + "\n")
    sets = {name: load_rows([tmp_path / f"{name}.jsonl"], max_image_pixels=100) for name in "ab"}
    rows = [row("t1", "One, two, three!"), row("t2", "four: five"), row("t3", "six"), row("t4", "Four Five")]
    report = find_contaminated(rows, sets)
    assert [(m.evaluation_set, m.row_id, m.evaluation_id) for m in report.matches] == [
        ("a", "t1", "a1"), ("b", "t2", "b1"), ("b", "t4", "b1")]
    assert report.ids() == {"t1", "t2", "t4"}
    assert report.table(examples=1).splitlines() == [
        "3 of 4 rows are in an evaluation set",
        f"{'a':<20}{'text':<20}dropped        1  t1 = a1", f"{'b':<20}{'text':<20}dropped        2  t2 = b1, ..."]
    assert find_contaminated(rows, {}).matches == () and find_contaminated([], sets).matches == ()


def test_each_distinct_image_is_opened_once_and_a_bad_one_is_named(tmp_path, monkeypatch):
    from cosmo_rl.data import index

    for i in range(3):
        scene(i).save(tmp_path / f"{i}.png")
    opened = []
    monkeypatch.setattr(index, "opened",
                        lambda image, *rest, was=index.opened: opened.append(image) or was(image, *rest))
    shared = scene(7)
    rows = [row(f"t{i}", f"q {i}", str(tmp_path / f"{i % 3}.png"), shared) for i in range(9)]
    found = kinds(rows, [row("e", "other", str(tmp_path / "1.png"))])
    assert len(opened) == 5 and set(found) == {f"t{i}" for i in (1, 4, 7)}
    (tmp_path / "2.png").write_bytes(b"gone")
    with pytest.raises(RowError, match=r"row t2: field `images\[0\]`: .*2.png is not a readable"):
        find_contaminated(rows, {})


def test_the_embedded_splits_of_one_make_share_nothing():
    rows, heldout = ([row for name in ("unsafe", "benign", "general") for row in suite[name][:400]]
                     for suite in map(mini_suite, ("validation", "heldout")))
    report = find_contaminated(rows, {"heldout": heldout})
    assert report.num_rows > 800 and report.ids() == set(), report.table()
