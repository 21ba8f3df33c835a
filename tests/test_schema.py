"""The strict row parser and the opening of images: what is accepted as what, and how each fault is named."""

import io
import pickle
import random
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from cosmo_rl.data.foreign import meant
from cosmo_rl.data.schema import FIELDS, IMAGE_FORMATS, TASKS, RowError, encoded, open_image, parse_row

ROW = {"id": "a", "task": "general", "domain": "general", "prompt": "what is it?", "source": "mine", "licence": "CC0"}


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has almost no data: a decompression bomb's header."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_a_full_row_keeps_every_field():
    messages = [{"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "before"}, {"type": "image"},
                                             {"type": "text", "text": "after"}]},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": [{"type": "image"}]}]
    extra = {"task": "mcq", "images": ["x/y.png", b"bytes"], "answer": "B", "options": ["A", "B"], "category": "c",
             "tags": {"image": "safe", "text": "safe", "combined": "unsafe"}, "chosen": "<think> t </think> B",
             "constraints": [{"id": "length", "kwargs": {"words": 3}}], "key_elements": ["cup", "tea pot"],
             "attack": {"name": "wrap", "params": {"depth": 2}, "seed": 7, "source_id": "b"}}
    raw = {**ROW, **extra, "messages": messages}
    del raw["prompt"]
    row = parse_row(raw, "f:1")
    expected = {**raw, "messages": tuple(messages), "images": ("x/y.png", b"bytes"), "options": ("A", "B"),
                "constraints": tuple(extra["constraints"]), "key_elements": ("cup", "tea pot")}
    assert {name: getattr(row, name) for name in expected} == expected
    assert pickle.loads(pickle.dumps(row)) == row


def test_prompt_is_one_user_message_with_the_images_first():
    assert parse_row(ROW, "f:1").messages == ({"role": "user", "content": "what is it?"},)
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what is it?"}]
    assert parse_row({**ROW, "images": ["a", "b"]}, "f:1").messages == ({"role": "user", "content": parts},)


def test_nulls_are_absent_fields_at_any_depth():
    raw = {**ROW, "prompt": None, "answer": None, "tags": None, "images": [{"bytes": None, "path": "p.png"}],
           "messages": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "hi"}]}],
           "attack": {"name": "n", "seed": 1, "source_id": "s", "params": None},
           "constraints": [{"id": "a", "kwargs": {"num_words": 3, "language": None}}]}
    row = parse_row(raw, "f:1")
    assert row.constraints == ({"id": "a", "kwargs": {"num_words": 3}},)
    assert (row.answer, row.tags, row.images) == (None, None, ("p.png",))
    assert row.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "hi"}]
    assert row.attack == {"name": "n", "seed": 1, "source_id": "s", "params": {}}
    assert parse_row({**ROW, "images": [{"bytes": b"data", "path": "name.png"}]}, "f:1").images == (b"data",)


def test_every_task_is_known():
    for task in TASKS:
        row = parse_row({**ROW, "task": task, "tags": {"combined": "safe"}, "options": ["x", "y"]}, "f:1")
        assert row.task == task


USER = {"role": "user", "content": "hi"}
ATTACK = {"name": "n", "params": {}, "seed": 1, "source_id": "s"}


@pytest.mark.parametrize(("change", "field", "problem", "mend"), [
    ({"task": "saftey"}, "task", "unknown task 'saftey'", "did you mean safety?"),
    ({"task": "poetry"}, "task", "unknown task 'poetry'", "safety, jailbreak"),
    ({"anwser": "x"}, "anwser", "no such field", "did you mean `answer`?"),
    ({"zzz": "x"}, "zzz", "no such field", "the fields are id, task"),
    ({"solution": "4"}, "solution", "no such field", "did you mean `answer`?"),
    ({"z" * 100_000: "x"}, "z" * 40 + "..." + "z" * 20, "no such field", "remove it"),
    ({"a\nb\x1b[2J": "x"}, "a\\nb\\x1b[2J", "no such field", "remove it"),
    ({"task": "y" * 100_000}, "task", "unknown task '" + "y" * 39 + "..." + "y" * 19 + "'", "give one of"),
    ({"id": None}, "id", "is missing", "add it"),
    ({"id": 7}, "id", "is a number, not a string", "quotes"),
    ({"id": "  "}, "id", "is empty", "fill it in"),
    ({"source": None}, "source", "is missing", "add it"),
    ({"licence": None}, "licence", "is missing", "add it"),
    ({"domain": ["a"]}, "domain", "is a list, not a string", "quotes"),
    ({"answer": 4}, "answer", "is a number, not a string", "quotes"),
    ({"answer": True}, "answer", "is a truth value, not a string", "quotes"),
    ({"chosen": ""}, "chosen", "is empty", "leave an optional field out"),
    ({"answer": "ab\ud800"}, "answer", "half of a character at position 2", "whole Unicode"),
    ({"prompt": None}, "messages", "is missing", "either `prompt` or `messages`"),
    ({"messages": [USER]}, "messages", "stands beside `prompt`", "either `prompt` or `messages`"),
    ({"prompt": "see <|image_pad|>"}, "prompt", "reserved token <|image_pad|>", "remove it"),
    ({"chosen": "no <|im_end|>"}, "chosen", "reserved token <|im_end|>", "remove it"),
    ({"prompt": "a<|im_end|>"}, "prompt", "reserved token <|im_end|>", "a turn a message"),
    ({"prompt": "<|im_start|>user"}, "prompt", "reserved token <|im_start|>", "remove it"),
    ({"prompt": "a <|endoftext|>"}, "prompt", "reserved token <|endoftext|>", "remove it"),
    ({"prompt": ["hi"]}, "prompt", "is a list, not a string", "quotes"),
    ({"prompt": None, "messages": []}, "messages", "is an empty list", "at least one"),
    ({"prompt": None, "messages": "hi"}, "messages", "is a string, not a list", "[ ]"),
    ({"prompt": None, "messages": ["hi"]}, "messages[0]", "is a string, not an object", "role, content"),
    ({"prompt": None, "messages": [{**USER, "name": "x"}]}, "messages[0].name", "no such field", "role, content"),
    ({"prompt": None, "messages": [{"role": "user"}]}, "messages[0].content", "is missing", "add it"),
    ({"prompt": None, "messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].role", "'tool'", "assistant"),
    ({"prompt": None, "messages": [USER, {"role": "system", "content": "x"}]}, "messages[1].role", "'system'",
     "first only"),
    ({"prompt": None, "messages": [USER, {"role": "assistant", "content": "x"}]}, "messages[1].role",
     "last message is by assistant", "`chosen`"),
    ({"prompt": None, "messages": [{"role": "user", "content": []}]}, "messages[0].content", "empty list",
     "at least one"),
    ({"prompt": None, "messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type",
     "'video'", '"text" or "image"'),
    ({"prompt": None, "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
     "messages[0].content[0].image", "no such field", "type, text"),
    ({"prompt": None, "messages": [{"role": "user", "content": [{"type": "image", "text": "a"}]}], "images": ["a"]},
     "messages[0].content[0].text", "image part has a text", "part of its own"),
    ({"prompt": None, "messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text",
     "is missing", "add it"),
    ({"prompt": None, "messages": [USER], "images": ["a.png"]}, "images", "1 images, but `messages` has 0 image parts",
     "for each image"),
    ({"images": "a.png"}, "images", "is a string, not a list", "[ ]"),
    ({"images": [3]}, "images[0]", "is a number, not an image", "a path"),
    ({"images": ["a.png", None]}, "images[1]", "is missing", "add it"),
    ({"images": [b""]}, "images[0]", "0 bytes", "replace it"),
    ({"images": [{"url": "x"}]}, "images[0].url", "no such field", "bytes, path"),
    ({"images": ["https://x.org/a.png"]}, "images[0]", "is a URL", "download"),
    ({"images": ["data:image/png;base64,AAAA"]}, "images[0]", "is a URL", "download"),
    ({"task": "mcq"}, "options", "has no options", "list of choices"),
    ({"options": ["x"]}, "options", "1 options", "at least 2"),
    ({"options": ["x", "y", "x"]}, "options", "3 options, 2 of them different", "all different"),
    ({"options": ["x", 2]}, "options[1]", "is a number, not a string", "quotes"),
    ({"task": "safety"}, "tags.combined", "does not say whether", '"safe" or "unsafe"'),
    ({"task": "jailbreak", "tags": {"text": "unsafe"}}, "tags.combined", "does not say whether", '"safe" or "unsafe"'),
    ({"tags": {"combined": "harmful"}}, "tags.combined", "is 'harmful'", '"safe" or "unsafe"'),
    ({"tags": {"both": "safe"}}, "tags.both", "no such field", "image, text, combined"),
    ({"tags": "unsafe"}, "tags", "is a string, not an object", "image, text, combined"),
    ({"key_elements": ["cup", ""]}, "key_elements[1]", "is empty", "fill it in"),
    ({"constraints": {"a": 1}}, "constraints", "is an object, not a list", "[ ]"),
    ({"constraints": ["x"]}, "constraints[0]", "is a string, not an object", "JSON object"),
    ({"constraints": [{"x": float("nan")}]}, "constraints[0]", "not plain JSON", "finite"),
    ({"attack": {**ATTACK, "seed": "1"}}, "attack.seed", "is a string, not a whole number", "seed"),
    ({"attack": {**ATTACK, "seed": True}}, "attack.seed", "is a truth value, not a whole number", "seed"),
    ({"attack": {**ATTACK, "params": [1]}}, "attack.params", "is a list, not an object", "JSON object"),
    ({"attack": {**ATTACK, "source_id": None}}, "attack.source_id", "is missing", "add it"),
    ({"attack": {**ATTACK, "kind": "x"}}, "attack.kind", "no such field", "name, params, seed, source_id"),
])
def test_a_bad_field_is_named_with_place_and_mend(change, field, problem, mend):
    with pytest.raises(RowError) as caught:
        parse_row({**ROW, **change}, "rows.jsonl:12")
    message = str(caught.value)
    head, _, rest = message.partition("; ")
    assert message.startswith(f"rows.jsonl:12: field `{field}`: ") and problem in head and mend in rest, message


@pytest.mark.parametrize(("name", "field"), [
    ("question", "prompt"), ("Instruction", "prompt"), ("query", "prompt"), ("problem", "prompt"),
    ("response", "answer"), ("target", "answer"), ("label", "answer"), ("gold", "answer"), ("ground_truth", "answer"),
    ("Ground Truth", "answer"), ("reference", "answer"), ("image", "images"), ("picture", "images"),
    ("image_path", "images"), ("choices", "options"), ("type", "task"), ("conversations", "messages"),
    ("license", "licence"), ("data-source", "source"), ("anser", "answer"), ("optoins", "options"),
    ("key_element", "key_elements"), ("quiz", ""),
])
def test_what_another_set_calls_a_field(name, field):
    assert meant(name, FIELDS) == field


@pytest.mark.parametrize(("name", "given"), [("solution", ["answer"]), ("question", ["messages"]),
                                             ("conversations", ["prompt"]), ("promt", ["messages"])])
def test_no_field_is_meant_that_is_there_already(name, given):
    """By the letters `options` would be offered for `solution`, and `messages` beside `prompt` is another error."""
    assert meant(name, FIELDS, given) == ""


def test_a_row_tells_all_its_problems_at_once():
    raw = {"id": "", "task": "mcq", "domain": 3, "source": "mine", "question": "what?", "options": ["x", 2, None],
           "tags": {"image": "bad", "wrong": "safe"}, "images": ["a.png", 3, "https://x.org/b"], "key_elements": "cup",
           "messages": [{"role": "tool", "content": "<image>"}, {"role": "user", "content": [{"type": "video"},
                                                                                          {"type": "text"}]}],
           "attack": {"seed": "1"}}
    with pytest.raises(RowError) as caught:
        parse_row(raw, "rows.jsonl:7")
    fields = [problem.args[1] for problem in caught.value.problems]
    assert sorted(fields) == sorted([
        "id", "domain", "licence", "question", "options[1]", "tags.wrong", "tags.image", "options[2]",
        "images[1]", "images[2]", "key_elements", "messages[0].role", "messages[0].content",
        "messages[1].content[0].type", "messages[1].content[1].text", "attack.name", "attack.seed", "attack.source_id"])
    assert all(type(problem) is RowError and problem.problems == (problem,) for problem in caught.value.problems)
    message = str(caught.value)
    assert message.startswith("rows.jsonl:7: 18 problems: (1) field `question`: there is no such field; remove it")
    assert "(2) field `id`: is empty; fill it in" in message and message.endswith("... and 6 more")
    assert "(12) " in message and "(13) " not in message
    assert message.count("rows.jsonl:7") == 1 and "\n" not in message
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == message and [one.args for one in again.problems] == [
        one.args for one in caught.value.problems]


def test_what_follows_from_a_problem_is_none_of_its_own():
    """A bad image is no missing one, bad options are not absent, bad tags do not lack `combined`."""
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    for change, fields in (({"images": [3], "messages": messages, "prompt": None}, ["images[0]"]),
                           ({"task": "mcq", "options": [1, "b"]}, ["options[0]"]),
                           ({"task": "safety", "tags": {"combined": 1}}, ["tags.combined"]),
                           ({"task": ["mcq"]}, ["task"])):
        with pytest.raises(RowError) as caught:
            parse_row({**ROW, **change}, "f:1")
        assert [problem.args[1] for problem in caught.value.problems] == fields


def test_the_list_of_fields_is_told_once():
    with pytest.raises(RowError) as caught:
        parse_row({**ROW, "zz": 1, "yy": 2, "xx": 3}, "f:1")
    assert str(caught.value).count("the fields are") == 1 and len(caught.value.problems) == 3
    started = time.perf_counter()
    with pytest.raises(RowError) as caught:  # what each name may mean took 0.5 ms a name
        parse_row({**ROW, **{f"field{i}": 1 for i in range(30_000)}}, "f:1")
    assert len(caught.value.problems) == 30_000 and time.perf_counter() - started < 5


PLACEHOLDERS = ("<image>", "<Image>", "<image 1>", "<image_2>", "<image3>", "<image-4>", "<video>", "<video_1>",
                "<audio>", "<|image|>", "<|image_1|>", "<|video|>", "<ImageHere>", "<img>demo/cat.jpeg</img>")


@pytest.mark.parametrize("held", PLACEHOLDERS)
def test_a_placeholder_in_a_text_is_refused_with_the_mend(held):
    text = f"Picture 1: {held}\nWhat is it?"
    part = {"role": "user", "content": [{"type": "text", "text": text}]}
    kind = next((kind for kind in ("video", "audio") if kind in held), "image")
    for change, field in (({"prompt": text}, "prompt"), ({"prompt": text, "images": ["a.png"]}, "prompt"),
                          ({"prompt": None, "messages": [{"role": "user", "content": text}]}, "messages[0].content"),
                          ({"prompt": None, "messages": [part]}, "messages[0].content[0].text"),
                          ({"chosen": text}, "chosen")):
        with pytest.raises(RowError) as caught:
            parse_row({**ROW, **change}, "f:1")
        message = str(caught.value)
        assert message.startswith(f"f:1: field `{field}`: holds {held}, which the model would read as words; "), message
        mend = {"video": "videos are not read", "audio": "sounds are not read",
                "image": "first by themselves" if field == "prompt" else 'write a {"type": "image"} part in its place'}
        assert mend[kind] in message and "in backticks" in message


@pytest.mark.parametrize("text", [
    "What does `<image>` mean in a LLaVA file?", "Is `<video> or <audio>` HTML?",
    "Close <image> with </image>, please.", '<svg><image href="a.png"/></svg>', '<video src="a.mp4"></video>',
    "<rss><image><url>u</url></image></rss>",
    "Which attribute must an <img> have?", '<img src="a.png">', "<images>", "<imagery>", "a < image > b", "image",
    "<image.png>", "<video player>", "[IMG]", "x <y> z", "<VIDEO>a</VIDEO>",
])
def test_markup_and_words_are_no_placeholders(text):
    assert parse_row({**ROW, "prompt": text, "chosen": text}, "f:1").messages[0]["content"] == text


def test_a_row_nested_without_end_is_refused():
    for deep, mend in ((60, ""), (70, "flatten"), (990, "flatten")):
        value: list = []
        for _ in range(deep):
            value = [value]
        with pytest.raises(RowError, match=mend or r"constraints\[0\].*not an object"):
            parse_row({**ROW, "constraints": value}, "f:1")


def test_a_record_that_is_no_object():
    for raw in (["a"], "a", 3, None):
        with pytest.raises(RowError, match=r"^f:3: a row is an object of fields, not .*; write "):
            parse_row(raw, "f:3")


def test_row_error_is_a_value_error_that_crosses_processes():
    error = RowError("f:1", "id", "is missing", "add it")
    assert isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == "f:1: field `id`: is missing; add it"


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_each_format_decodes_alike_from_path_bytes_and_pil(kind, tmp_path):
    data = encode(noise(31, 17), kind)
    (tmp_path / "x").write_bytes(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for source in (str(tmp_path / "x"), data, Image.open(io.BytesIO(data))):
        image = open_image(source, 31 * 17, "f:1")
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), expected)
    if kind in ("PNG", "BMP"):
        assert np.array_equal(expected, np.asarray(noise(31, 17)))


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be shown rotated by 90 degrees clockwise
    image = open_image(encode(noise(20, 10), "PNG", exif=exif), 1000, "f:1")
    assert np.array_equal(np.asarray(image), np.rot90(np.asarray(noise(20, 10)), -1))


def test_transparent_pixels_are_white():
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[0] = (200, 10, 30, 255)
    image = np.asarray(open_image(encode(Image.fromarray(pixels), "PNG"), 16, "f:1"))
    assert (image[0] == (200, 10, 30)).all() and (image[1:] == 255).all()


def png16(pixels: np.ndarray) -> bytes:
    """A colour PNG of 16 bits a channel, which Pillow reads and does not write."""
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")


def test_what_is_one_thing_in_8_bits_is_converted():
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    assert np.array_equal(np.asarray(open_image(png16(deep), 100, "f:1")), deep >> 8)
    image = noise(31, 17)
    for mode in ("L", "P", "1"):
        data = encode(image.convert(mode), "PNG")
        assert np.array_equal(np.asarray(open_image(data, 1000, "f:1")), np.asarray(image.convert(mode).convert("RGB")))
    data = encode(image.convert("CMYK"), "JPEG", quality=100)
    (got, again), wanted = (np.asarray(open_image(data, 1000, "f:1")).astype(int) for _ in range(2)), np.asarray(image)
    assert np.array_equal(got, again) and np.abs(got - wanted).mean() < 20 < np.abs(got[::-1] - wanted).mean()


def test_grey_of_more_than_8_bits_is_refused():
    deep = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)  # a scan of 12 bits
    message = (r"f:1: field `images\[1\]`: the embedded image has pixels of mode I;16: grey of more than 8 bits, of no "
               r"known range; convert it to 8 bits, with the range")
    with pytest.raises(RowError, match=message):
        open_image(encode(Image.fromarray(deep), "PNG"), 256, "f:1", "images[1]")
    for mode in ("F", "I"):
        with pytest.raises(RowError, match=f"the PIL image has pixels of mode {mode}: grey of more than 8 bits"):
            open_image(Image.new(mode, (3, 3)), 1000, "f:1")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_refused_and_one_frame_is_not(kind, tmp_path):
    first, second = noise(20, 10), noise(20, 10).rotate(180)
    (tmp_path / "x").write_bytes(encode(first, kind, save_all=True, append_images=[second]))
    for source in (str(tmp_path / "x"), (tmp_path / "x").read_bytes(), Image.open(tmp_path / "x")):
        with pytest.raises(RowError, match=r"f:1: field `images`: .* is an animation; give one frame of it, as PNG"):
            open_image(source, 1000, "f:1")
    open_image(encode(first, kind, save_all=True), 1000, "f:1")


def test_the_photograph_of_a_phone_is_taken_without_its_previews():
    """Such a JPEG holds further pictures, and Pillow calls it animated."""
    buffer = io.BytesIO()
    noise(20, 10).save(buffer, "MPO", save_all=True, append_images=[noise(5, 5)])
    with Image.open(io.BytesIO(buffer.getvalue()), formats=IMAGE_FORMATS) as stored:
        assert getattr(stored, "n_frames", 1) == 2
        expected = np.asarray(stored.convert("RGB"))
    assert np.array_equal(np.asarray(open_image(buffer.getvalue(), 1000, "f:1")), expected)


def test_pixel_limit_is_tested_before_decoding():
    assert open_image(encode(noise(10, 10), "PNG"), 100, "f:1").size == (10, 10)
    message = r"f:1: field `images\[2\]`: .* 10 x 10 = 100 pixels, more than 99; .*max-image-pixels"
    with pytest.raises(RowError, match=message):
        open_image(encode(noise(10, 10), "PNG"), 99, "f:1", "images[2]")
    with pytest.raises(RowError, match="12000 x 12000 = 144000000 pixels, more than 16777216"), \
            pytest.warns(Image.DecompressionBombWarning):
        open_image(png_header(12000, 12000), 16_777_216, "f:1")
    with pytest.raises(RowError, match=r"beyond 16777216 pixels .*max-image-pixels"):
        open_image(png_header(60000, 60000), 16_777_216, "f:1")
    with pytest.raises(RowError, match="corrupt or cut off"):
        open_image(png_header(100, 100), 16_777_216, "f:1")


def test_a_sliver_is_refused_as_the_image_processor_would():
    assert open_image(encode(noise(400, 2), "PNG"), 10_000, "f:1").size == (400, 2)
    with pytest.raises(RowError, match="2 x 402, one side more than 200 times the other; crop it"):
        open_image(encode(noise(2, 402), "PNG"), 10_000, "f:1")


def test_a_missing_or_unsuitable_file_is_named(tmp_path):
    with pytest.raises(RowError, match=r"f:1: field `images`: the image file .*none.png does not exist; put it there"):
        open_image(str(tmp_path / "none.png"), 1000, "f:1")
    with pytest.raises(RowError, match="is not a regular file"):
        open_image(str(tmp_path), 1000, "f:1")
    (tmp_path / "a.png").write_text("<html>not found</html>")
    with pytest.raises(RowError, match=r"a.png is not a readable JPEG, PNG, WEBP, GIF, BMP image; replace"):
        open_image(str(tmp_path / "a.png"), 1000, "f:1")
    with pytest.raises(RowError, match="not a readable"):  # Pillow would start Ghostscript for this one
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", 1000, "f:1")


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_cut_or_corrupt_bytes_give_a_row_error_and_nothing_else(kind):
    data = encode(noise(40, 30), kind)
    for length in range(1, len(data) - 40, 7):
        with pytest.raises(RowError):
            open_image(data[:length], 10_000, "f:1")
    rng = random.Random(0)
    for _ in range(300):
        bad = bytearray(data)
        for _ in range(rng.choice([1, 3, 10])):
            bad[rng.randrange(min(len(bad), rng.choice([40, 200, len(bad)])))] = rng.randrange(256)
        try:
            image = open_image(bytes(bad), 10_000, "f:1")  # a flipped pixel cannot be noticed
        except RowError as error:
            assert str(error).startswith("f:1: field `images`: the embedded image ")
        else:
            assert image.mode == "RGB"


def test_the_content_of_an_image_as_it_lies_in_its_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(content := encode(noise(8, 8), "PNG"))
    assert encoded(path) == encoded(str(path)) == encoded(content) == content
