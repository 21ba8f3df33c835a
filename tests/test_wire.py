"""What a vLLM server is sent, and what in its reply stops the run. tests/test_vllm_rollout.py asks a real one."""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import runs
from PIL import Image

from cosmo_rl.cpgd.config import RolloutConfig
from cosmo_rl.cpgd.rollout.values import Request
from cosmo_rl.cpgd.rollout.vllm.wire import SUPPRESS, ReplyError, Wire, collapsed, mm_limits, pictures
from cosmo_rl.data.collate import encode_prompt
from cosmo_rl.data.schema import Row
from cosmo_rl.model.load import load_processor

ROLLOUT = RolloutConfig(max_new_tokens=4, temperature=0.7)
TAG = "abc-1-step0"
SIZES = {"none": [], "one": [(56, 56)], "wide": [(150, 40)], "tall": [(31, 333)], "two": [(90, 61), (200, 120)],
         "three": [(56, 84), (84, 56), (300, 300)]}
"""(width, height) of the pictures of a prompt."""


@pytest.fixture(scope="module")
def processor():
    return load_processor(runs.MODEL, 28 * 28 * 64)


@pytest.fixture(scope="module")
def wire(processor):
    return Wire(processor, ROLLOUT)


def encoded(processor, sizes):
    noise = np.random.default_rng(7)
    images = tuple(Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes)
    content = [{"type": "text", "text": "see "}, *({"type": "image"} for _ in images), {"type": "text", "text": "it"}]
    row = Row(id="r", task="general", domain="general", messages=({"role": "user", "content": content},),
              images=images, source="test", licence="Apache-2.0")
    return row, encode_prompt(row, processor, max_prompt_tokens=512, max_image_pixels=10**6)


def asked(processor, sizes=((56, 56),)):
    row, prompt = encoded(processor, sizes)
    return Request(row=row, prompt=prompt, k=2, seed=5)


# -- what is sent -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("limit", [28 * 28 * 64, 56 * 56], ids=["large", "one size"])
def test_pictures_are_those_that_the_trainer_sees(limit, sizes):
    """Processed by the server they give the same pixel values, bit for bit. By the trainer's own settings a picture
    might be resized a second time, where only one size is allowed, and that is not its shape."""
    processor = load_processor(runs.MODEL, limit)
    row, prompt = encoded(processor, sizes)
    found = pictures(prompt, processor)
    assert len(found) == len(sizes)
    if not sizes:
        return
    grid = [(h * 14, w * 14) for _, h, w in prompt.image_grid_thw.tolist()]
    assert [(p.height, p.width) for p in found] == grid
    again = processor.image_processor(images=found, return_tensors="np",
                                      do_resize=json.loads(mm_limits(processor))["do_resize"])
    np.testing.assert_array_equal(again["image_grid_thw"], prompt.image_grid_thw)
    np.testing.assert_array_equal(again["pixel_values"], prompt.pixel_values)
    for picture, image, (height, width) in zip(found, row.images, grid, strict=True):
        if image.size == (width, height):
            assert picture.tobytes() == image.tobytes()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_ids_have_one_placeholder_a_picture(processor, sizes):
    prompt = encoded(processor, sizes)[1]
    ids, image = collapsed(prompt, processor.merge_size), processor.image_token_id
    assert ids.count(image) == len(sizes)
    counts = [] if not sizes else (prompt.image_grid_thw.prod(axis=1) // 4).tolist()
    left, back = iter(counts), []
    for token in ids:
        back += [token] * (next(left) if token == image else 1)
    assert back == prompt.input_ids.tolist()
    assert prompt.mm_token_type_ids.sum() == sum(counts)  # the prompt itself is left as it was


def test_a_prompt_goes_with_its_pictures_and_the_weights_it_is_for(processor, wire):
    prompt = encoded(processor, [(56, 56), (56, 84), (56, 56)])[1]
    body = wire.prompt(prompt, TAG)
    assert body["token_ids"] == collapsed(prompt, 2) and body["return_token_ids"] and body["cache_salt"] == TAG
    for part, picture in zip(body["content_parts"], pictures(prompt, processor), strict=True):
        head, _, data = part["url"].partition(",")
        sent = Image.open(io.BytesIO(base64.b64decode(data)))
        assert (part["type"], head, sent.mode) == ("image_url", "data:image/png;base64", "RGB")
        assert sent.tobytes() == picture.tobytes() and sent.size == picture.size
    assert "content_parts" not in wire.prompt(encoded(processor, [])[1], TAG)


def test_no_cache_holds_for_other_weights_or_other_pictures(processor, wire):
    """vLLM keeps prefixes by salt, features and processed pictures by uuid."""
    row, prompt = encoded(processor, [(56, 56), (56, 56)])
    uuids = lambda prompt, tag: [part["uuid"] for part in wire.prompt(prompt, tag)["content_parts"]]
    now, later = uuids(prompt, TAG), uuids(prompt, "abc-2-step1")
    assert len({*now, *later}) == 4 and now == uuids(prompt, TAG)
    assert wire.prompt(prompt, "abc-2-step1")["cache_salt"] != wire.prompt(prompt, TAG)["cache_salt"]
    grey = lambda size: encode_prompt(replace(row, images=(Image.new("RGB", size, "grey"),) * 2), processor,
                                      max_prompt_tokens=512, max_image_pixels=10**6)
    tall, wide = uuids(grey((56, 112)), TAG), uuids(grey((112, 56)), TAG)
    assert len({*tall, *wide}) == 4  # the same bytes, in another shape or at another place


def test_every_setting_is_given(processor, wire):
    request = asked(processor)
    sampled, greedy = wire.sampling(request, False), wire.sampling(request, True)
    assert sampled == {
        "temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "min_tokens": 0, "n": 1, "max_tokens": 4, "stop_token_ids": [612],
        "ignore_eos": False, "logprobs": 0, "seed": 5, "detokenize": False,
        "logit_bias": {str(token): SUPPRESS for token in processor.suppressed_ids.tolist()}}
    assert greedy == sampled | {"temperature": 0.0}
    assert wire.sampling(replace(request, seed=6), False)["seed"] == 6


# -- what comes back --------------------------------------------------------------------------------------------------

def reply_to(request, ids=(5, 6, 612), reason="stop", **changes):
    """An honest reply, as vLLM words it, but for `changes` of its choice."""
    logprobs = {"content": [{"token_id": token, "logprob": -0.5 * i} for i, token in enumerate(ids)]}
    choice = {"token_ids": list(ids), "logprobs": logprobs, "finish_reason": reason, "stop_reason": None,
              "weight_versions": [{"version": TAG, "start": 0}]}
    return {"choices": [choice | changes], "prompt_token_ids": request.prompt.input_ids.tolist()}


def content(*pairs):
    return {"content": [{"token_id": token, "logprob": logprob} for token, logprob in pairs]}


@pytest.mark.parametrize(("ids", "reason", "text"), [((5, 6, 612), "stop", 2), ((612,), "stop", 0),
                                                     ((5, 6, 7, 8), "length", 4), ((5, 6, 7, 612), "stop", 3)])
def test_an_honest_reply_is_a_response(processor, wire, ids, reason, text):
    request = asked(processor)
    found = wire.read(request, reply_to(request, ids, reason), TAG, 3)
    assert found.request is request and (found.finish_reason, found.version) == (reason, 3)
    assert found.ids.tolist() == list(ids) and found.ids.dtype == np.int64
    assert found.logprobs.tolist() == [-0.5 * i for i in range(len(ids))] and found.logprobs.dtype == np.float32
    assert found.text == processor.tokenizer.decode(list(ids[:text]))


REFUSED = {
    "no log-probs": (dict(logprobs=None), r"has 3 tokens and 0 log-probs"),
    "no log-probs in it": (dict(logprobs={"content": None}), r"has 3 tokens and 0 log-probs"),
    "fewer tokens than log-probs": (dict(token_ids=[5, 612]), r"has 2 tokens and 3 log-probs"),
    "no tokens": (dict(token_ids=[], logprobs=content()), r"has 0 tokens and 0 log-probs"),
    "tokens left out": (dict(token_ids=None), r"has 0 tokens and 3 log-probs"),
    "log-probs of others": (dict(token_ids=[5, 7, 612]), r"log-probs of other tokens than its own"),
    "another version": (dict(weight_versions=[{"version": "old"}]),
                        r"sampled by weights 'old', and 'abc-1-step0' \(step 3\) was asked for: another program has "
                        r"written to the server, or it was restarted; give each run servers of its own"),
    "two versions": (dict(weight_versions=[{"version": TAG}, {"version": "new"}]), r"'abc-1-step0', 'new', and"),
    "no version": (dict(weight_versions=None), r"sampled by weights of no version"),
    "weights as loaded": (dict(weight_versions=[{"version": None}]), r"sampled by weights None"),
    "NaN": (dict(logprobs=content((5, -1), (6, float("nan")), (612, -1))), r"has the log-prob nan: its weights give"),
    "what vLLM sends for -inf": (dict(logprobs=content((5, -1), (6, -9999.0), (612, -1))), r"has the log-prob -9999"),
    "infinite": (dict(logprobs=content((5, float("-inf")), (6, -1), (612, -1))), r"has the log-prob -inf"),
    "above 0": (dict(logprobs=content((5, -1), (6, 1.0), (612, 0))), r"has the log-prob 1"),
    "an end that is none": (dict(token_ids=[5, 6], logprobs=content((5, -1), (6, -1)), stop_reason=6),
                            r"ends by 'stop' \(6\) with token 6, and \(612,\) end one"),
    "an end not told": (dict(finish_reason="length"), r"ends by 'length' \(None\) with token 612"),
    "a token after the end": (dict(token_ids=[5, 612, 612], logprobs=content((5, -1), (612, -1), (612, -1))),
                              r"ends by 'stop'"),
    "aborted": (dict(finish_reason="abort"), r"ends by 'abort'"),
    "cut early": (dict(token_ids=[5, 6], logprobs=content((5, -1), (6, -1)), finish_reason="length"),
                  r"was cut after 2 tokens, and --rollout.max-new-tokens is 4; start the server with a larger "
                  r"--max-model-len"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_on_is_refused(processor, wire, changes, message):
    request = asked(processor)
    with pytest.raises(ReplyError, match=rf"request r#2: the vLLM server's reply .*{message}"):
        wire.read(request, reply_to(request, **changes), TAG, 3)


def test_every_suppressed_token_is_refused(processor, wire):
    request = asked(processor)
    assert processor.image_token_id in processor.suppressed_ids
    with pytest.raises(ReplyError, match=r"holds <\|image_pad\|>, which may never be sampled"):
        wire.read(request, reply_to(request, (5, processor.image_token_id, 612)), TAG, 0)
    for token in processor.suppressed_ids.tolist():
        with pytest.raises(ReplyError, match="may never be sampled"):
            wire.read(request, reply_to(request, (5, token, 612)), TAG, 0)


@pytest.mark.parametrize("bad", [[], {}, {"choices": []}, {"choices": [None]}, {"choices": [{"token_ids": [1]}]}, None,
                                 {"choices": [{"token_ids": [1], "logprobs": 3}]}, "x"], ids=repr)
def test_what_is_no_reply_at_all(processor, wire, bad):
    with pytest.raises(ReplyError, match=r"reply has no .*; the server must be vLLM 0\.32 or newer"):
        wire.read(asked(processor), bad, TAG, 0)


@pytest.mark.parametrize("entry", [{"token_id": 5}, {"logprob": -1.0}, {"token_id": 5, "logprob": None}, 3, None],
                         ids=repr)
def test_what_is_no_log_prob(processor, wire, entry):
    """As of an older vLLM, whose entries name tokens by their text."""
    request = asked(processor)
    broken = reply_to(request, (612,), logprobs={"content": [entry]})
    with pytest.raises(ReplyError):
        wire.read(request, broken, TAG, 0)


def test_a_reply_without_the_prompts_ids(processor, wire):
    request = asked(processor)
    for bad in (reply_to(request) | {"prompt_token_ids": None}, {"choices": reply_to(request)["choices"]}):
        with pytest.raises(ReplyError, match=r"0\.32 or newer|image tokens|another prompt"):
            wire.read(request, bad, TAG, 0)


def test_pictures_resized_by_other_limits(processor, wire):
    """Named: whose they are, the sizes that were sent, and the option that mends it."""
    request = asked(processor, [(56, 84), (112, 56)])
    reply, image = reply_to(request), processor.image_token_id
    ids = reply["prompt_token_ids"]
    ids.insert(ids.index(image), image)
    with pytest.raises(ReplyError) as caught:
        wire.read(request, reply, TAG, 0)
    assert "request r#2" in str(caught.value) and mm_limits(processor) in str(caught.value)
    assert "has 15 image tokens where the trainer has 14 (pictures of 56x84, 112x56 pixels)" in str(caught.value)


def test_another_prompt(processor, wire):
    request = asked(processor)
    for at, change in ((0, 1), (-1, 1)):
        reply = reply_to(request)
        reply["prompt_token_ids"][at] += change
        with pytest.raises(ReplyError, match=r"to another prompt \((\d+) tokens, \1 were sent\): the server serves "
                                             r"another model or tokenizer"):
            wire.read(request, reply, TAG, 0)
    reply = reply_to(request)
    reply["prompt_token_ids"].append(5)
    with pytest.raises(ReplyError, match="to another prompt"):
        wire.read(request, reply, TAG, 0)
