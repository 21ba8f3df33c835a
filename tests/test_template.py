"""Which chat template is taken, and which ones are refused."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny_case
from published_folder import IMAGE_TEMPLATE, TEXT_TEMPLATE

from cosmo_rl.data.collate import encode_prompt
from cosmo_rl.data.errors import UserError
from cosmo_rl.model.load import load_processor


@pytest.fixture
def bare(tmp_path):
    """A folder without any template."""
    folder = shutil.copytree(tiny_case.folder(), tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    return folder


def put(folder, **templates):
    """Write templates: jinja and own as text, json as the value of chat_template."""
    if "jinja" in templates:
        (folder / "chat_template.jinja").write_text(templates["jinja"])
    if "json" in templates:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": templates["json"]}))
    if "own" in templates:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": templates["own"]}))


def marked(mark):
    return IMAGE_TEMPLATE.replace("You are a helpful assistant.", mark)


@pytest.mark.parametrize("templates, taken", [
    ({"jinja": marked("J"), "json": marked("S"), "own": marked("O")}, "J"),
    ({"jinja": marked("J"), "own": TEXT_TEMPLATE}, "J"), ({"json": marked("S"), "own": TEXT_TEMPLATE}, "S"),
    ({"json": marked("S")}, "S"), ({"own": marked("O")}, "O"), ({"jinja": marked("J"), "json": 5}, "J"),
    ({"json": {"default": marked("S"), "tools": "x"}}, "S"),
    ({"json": [{"name": "tools", "template": "x"}, {"name": "default", "template": marked("S")}]}, "S"),
    ({"own": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": marked("O")}]}, "O"),
], ids=lambda value: "+".join(value) if isinstance(value, dict) else value)
def test_order(bare, templates, taken):
    put(bare, **templates)
    processor = load_processor(bare)
    prompt = encode_prompt(tiny_case.row(0, [(56, 56)]), processor, max_prompt_tokens=200, max_image_pixels=10**6)
    text = str(processor.tokenizer.decode(prompt.input_ids))
    assert f"system\n{taken}<|im_end|>" in text and text.endswith("assistant\n") and prompt.pixel_values is not None
    assert processor.template == {"J": "chat_template.jinja", "S": "chat_template.json",
                                  "O": "tokenizer_config.json"}[taken]


IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
BROKEN = {
    "the text one": (TEXT_TEMPLATE, r"a row with a picture \(.*fails: can only concatenate str"),
    "no picture": (IMAGE_TEMPLATE.replace(IMAGE, ""), r"drops, moves or changes '<\|vision_start\|>"),
    "a bare placeholder": (IMAGE_TEMPLATE.replace(IMAGE, "<|image_pad|>"), "drops, moves or changes"),
    "a word for it": (IMAGE_TEMPLATE.replace(IMAGE, "<image>"), "drops, moves or changes"),
    "twice": (IMAGE_TEMPLATE.replace(IMAGE, IMAGE * 2), "writes 2 placeholders, .*for 1 pictures"),
    "one for text": (IMAGE_TEMPLATE.replace("<|im_end|>", "<|image_pad|><|im_end|>"), "without a picture .*writes"),
    "first picture only": (IMAGE_TEMPLATE.replace("'image' or", "'image' and count.value == 0 or")
                           .replace("'image' in part or 'image_url' in part", "false"), "two pictures .*drops"),
    "pictures first": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{% if p.type == 'image' %}" + IMAGE + "{% endif %}{% endfor %}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{% endif %}{% endfor %}", "two pictures .*drops, moves or changes"),
    "no text": (IMAGE_TEMPLATE.replace("{{ part['text'] }}", ""), r"drops, moves or changes 'And"),
    "no plain text": (IMAGE_TEMPLATE.replace("{{ message['content'] }}", ""), "without a picture .*drops"),
    "escaped text": (IMAGE_TEMPLATE.replace("message['content'] }}", "message['content'] | e }}"), "1 < 2 &"),
    "no system": (IMAGE_TEMPLATE.replace("{% for message in messages %}", "{% for message in messages "
                                         "if message['role'] != 'system' %}"), "drops, .* 'Keep to the rules"),
    "raises": ("{{ raise_exception('only\n text') }}", "fails: only text"),
    "raises on system": ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
                         + IMAGE_TEMPLATE, r"system message and two pictures \(.*fails: no system"),
    "syntax": ("{% for message in %}", "fails: Expected an expression|fails: "),
    "unclosed": ("{% if messages %}", "fails: Unexpected end of template"),
    "undefined": ("{{ nothing.at.all }}", "fails: 'nothing' is undefined"),
    "unknown filter": ("{{ messages | nope }}", "No filter named 'nope'"),
    "sandbox": ("{{ messages.__class__.__mro__ }}", "fails: access to attribute '__class__'"),
    "mutation": ("{{ messages.append(1) }}", "fails: "),
    "range": ("{{ range(10 ** 9) | list }}", "fails: Range too big"),
    "division": ("{{ 1 / 0 }}", "fails: division by zero"), "type": ("{{ 1 + 'a' }}", "fails: unsupported operand"),
    "key": ("{{ messages[99]['x'] }}", "fails: "), "call": ("{{ 5() }}", "fails: 'int' object is not callable"),
    "flood": ("{{ 'a' * 10 ** 8 }}" + IMAGE_TEMPLATE, r"writes 100,000,\d+ characters for a few words"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: maximum recursion"),
    "include": ("{% include 'config.json' %}", "fails: "), "empty": ("", "drops, moves or changes"),
}


@pytest.mark.parametrize("name, source", [
    *((name, "jinja") for name in BROKEN),
    *((name, source) for name in ("the text one", "no picture", "syntax", "empty") for source in ("json", "own")),
])
def test_a_template_that_is_refused(bare, name, source):
    template, told = BROKEN[name]
    put(bare, **{source: template})
    file = {"jinja": r"chat_template\.jinja", "json": r"chat_template\.json", "own": r"tokenizer_config\.json"}[source]
    with pytest.raises(UserError, match=rf"the chat template in {file} cannot be used for .*{told}") as caught:
        load_processor(bare)
    assert "\n" not in str(caught.value) and "add the model's template with pictures" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"chat_template": null}', '{"chat_template": 5}',
                                  '{"chat_template": []}', '{"chat_template": [5, {"name": [1], "template": "x"}]}',
                                  '{"chat_template": {"tools": "x"}}', "\udcff"])
def test_a_template_file_without_a_template(bare, text):
    (bare / "chat_template.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"chat_template\.json (cannot be read|holds a|has no text)"):
        load_processor(bare)


def test_a_jinja_file_that_is_no_text(bare):
    (bare / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"chat_template\.jinja cannot be read .*; copy it again, or save it as UTF-8"):
        load_processor(bare)


def test_a_byte_order_mark_is_no_part_of_the_template(bare):
    (bare / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf" + IMAGE_TEMPLATE.encode())
    assert load_processor(bare).chat_text([{"role": "user", "content": "a"}]).startswith("<|im_start|>system")


def test_no_template_at_all(bare):
    with pytest.raises(UserError, match=r"the tokenizer has no chat template; add chat_template\.jinja"):
        load_processor(bare)


def test_a_row_that_the_template_refuses_is_named(bare):
    """As templates that want user and assistant to alternate."""
    put(bare, jinja="{% if messages | length > 2 %}{{ raise_exception('too\nlong') }}{% endif %}" + IMAGE_TEMPLATE)
    turn = {"role": "user", "content": "a"}
    row = replace(tiny_case.row(0), messages=(turn, {"role": "assistant", "content": "b"}, turn))
    with pytest.raises(UserError, match=r"^row row-0: chat_template\.jinja fails: too long; change its `messages`"):
        encode_prompt(row, load_processor(bare), max_prompt_tokens=200, max_image_pixels=10**6)
