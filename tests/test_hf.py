"""The hf engine against plain full forwards of transformers: positions, log-probs, noise, endings, fresh weights."""

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cosmo_rl.cpgd.config import RolloutConfig
from cosmo_rl.cpgd.rollout import hf
from cosmo_rl.cpgd.rollout.engine import form_batches, generate
from cosmo_rl.cpgd.rollout.hf import HFEngine, _Sampler, _uniforms
from cosmo_rl.cpgd.rollout.values import Request, request_seed
from cosmo_rl.data.collate import encode_prompt
from cosmo_rl.data.schema import Row
from cosmo_rl.model.cache import RoomyLayer, cache_bytes
from cosmo_rl.model.load import Processor
from cosmo_rl.model.tiny import INIT_RANGE, build_config, build_tokenizer

ROLLOUT = RolloutConfig(temperature=0.7, max_new_tokens=12, batch_size=16)


@pytest.fixture(scope="module")
def processor():
    tokenizer = build_tokenizer(["what colour is the thing in this picture? how many are there? tell me"] * 3)
    images = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, min_pixels=56 * 56, max_pixels=168 * 112)
    eos_id = tokenizer.get_vocab()["<|im_end|>"]
    return Processor(tokenizer, images, build_config(tokenizer), (eos_id,))


@pytest.fixture
def model(processor):
    torch.manual_seed(2)
    model = Qwen2_5_VLForConditionalGeneration(processor.config)
    for name, parameter in model.named_parameters():  # at their initial size neither images nor positions tell
        scale = 4 if "embed_tokens" in name or "visual" in name else 3
        parameter.data.mul_(scale if parameter.ndim == 1 else scale * 0.02 / INIT_RANGE)
    model.generation_config.repetition_penalty = 5.0  # as a model folder may bring it
    return model.eval()


def prompt(processor, name, text, sizes=()):
    noise = np.random.default_rng(len(text))
    images = tuple(Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes)
    content = [{"type": "text", "text": "see "}, *({"type": "image"} for _ in images), {"type": "text", "text": text}]
    row = Row(id=name, task="general", domain="general", messages=({"role": "user", "content": content},),
              images=images, source="test", licence="Apache-2.0")
    return encode_prompt(row, processor, max_prompt_tokens=512, max_image_pixels=10**6)


@pytest.fixture(scope="module")
def prompts(processor):
    return [
        prompt(processor, "text", "how many?"),
        prompt(processor, "wide", "what colour is this?", [(56, 168)]),
        prompt(processor, "long", "tell me what colour the thing in this picture is, and how many there are"),
        prompt(processor, "two", "is it there?", [(112, 56), (84, 84)]),
    ]


@pytest.fixture(scope="module")
def requests(prompts):
    return [ask(p, k, request_seed(0, 2, 0, p.id, k)) for p in prompts for k in range(4)]


def ask(prompt, k, seed):
    return Request(row=SimpleNamespace(id=prompt.id), prompt=prompt, k=k, seed=seed)


def tokens(responses):
    return [r.ids.tolist() for r in responses]


@torch.no_grad()
def full_logprobs(model, processor, prompt, ids, temperature, one_axis=False):
    """(L, V) log-probs by one plain forward, with transformers' own M-RoPE positions."""
    whole = torch.from_numpy(np.concatenate([prompt.input_ids, ids]))[None]
    types = torch.from_numpy(np.concatenate([prompt.mm_token_type_ids, 0 * ids]))[None]
    images = {}
    if prompt.pixel_values is not None:
        images = {"pixel_values": torch.from_numpy(prompt.pixel_values),
                  "image_grid_thw": torch.from_numpy(prompt.image_grid_thw)}
    model.model.rope_deltas = None
    extra = {} if one_axis else {"mm_token_type_ids": types}
    logits = model(input_ids=whole, use_cache=False, **images, **extra).logits[0, len(prompt.input_ids) - 1:-1]
    logits = logits / temperature
    logits[:, torch.from_numpy(processor.suppressed_ids)] = -torch.inf
    return logits.log_softmax(-1)


def test_logprobs_equal_a_full_forward(model, processor, requests):
    responses = generate(HFEngine(model, processor, ROLLOUT), requests)
    seen = 0.0
    for request, response in zip(requests, responses, strict=True):
        rows = np.arange(len(response.ids))
        exact = full_logprobs(model, processor, request.prompt, response.ids, 0.7)[rows, response.ids].numpy()
        np.testing.assert_allclose(response.logprobs, exact, atol=1e-4)
        flat = full_logprobs(model, processor, request.prompt, response.ids, 0.7, one_axis=True)
        seen = max(seen, np.abs(flat[rows, response.ids].numpy() - exact).max())
    assert seen > 0.1, "this model does not tell M-RoPE from 1-D positions, so the test above shows nothing"


def test_a_window_that_slides(model, processor, requests):
    """Prompts and responses are longer than it."""
    config = deepcopy(processor.config)
    text = config.text_config
    text.sliding_window, text.layer_types = 8, ["sliding_attention"] * text.num_hidden_layers
    sliding = Qwen2_5_VLForConditionalGeneration(config).eval()
    sliding.load_state_dict(model.state_dict())
    seen = 0.0
    for response in generate(HFEngine(sliding, processor, ROLLOUT), requests):
        rows, prompt = np.arange(len(response.ids)), response.request.prompt
        exact, whole = (full_logprobs(one, processor, prompt, response.ids, 0.7)[rows, response.ids].numpy()
                        for one in (sliding, model))
        np.testing.assert_allclose(response.logprobs, exact, atol=1e-4)
        seen = max(seen, np.abs(whole - exact).max())
    assert seen > 0.1, "nothing is past the window"


def test_images_reach_their_own_prompt(model, processor, prompts):
    engine = HFEngine(model, processor, ROLLOUT)
    wide = prompts[1]
    other = replace(wide, id="other", pixel_values=wide.pixel_values[::-1].copy())
    pair = generate(engine, [ask(wide, 0, 1), ask(other, 0, 1)])
    alone = generate(engine, [ask(other, 0, 1)])
    assert tokens(pair[1:]) == tokens(alone)
    assert tokens(pair[:1]) != tokens(alone)


def test_greedy_takes_the_likeliest_token(model, processor, requests):
    for request, response in zip(
        requests[::4], generate(HFEngine(model, processor, ROLLOUT), requests[::4], greedy=True), strict=True
    ):
        exact = full_logprobs(model, processor, request.prompt, response.ids, 0.7)
        assert response.ids.tolist() == exact.argmax(-1).tolist()
        np.testing.assert_allclose(response.logprobs, exact.max(-1).values, atol=1e-4)


def test_a_request_gives_the_same_response_in_any_company(model, processor, requests):
    engine = HFEngine(model, processor, ROLLOUT)
    together = tokens(generate(engine, requests))
    assert len({tuple(ids) for ids in together}) == len(requests), "samples of one prompt differ"
    assert [tokens(generate(engine, [r]))[0] for r in requests] == together
    assert tokens(generate(engine, requests[::-1]))[::-1] == together
    assert tokens(generate(engine, requests, batch_size=3)) == together


def test_ranks_with_whole_batches_give_the_same_bits(model, processor, requests):
    engine = HFEngine(model, processor, ROLLOUT)
    single = generate(engine, requests, batch_size=5)
    batches = form_batches([len(r.prompt.input_ids) for r in requests], 5)
    for rank in range(2):
        mine = [i for batch in batches[rank::2] for i in batch]
        for i, response in zip(mine, generate(engine, [requests[i] for i in mine], batch_size=5), strict=True):
            assert response.ids.tolist() == single[i].ids.tolist()
            assert response.logprobs.tobytes() == single[i].logprobs.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_that_never_grows_gives_the_bits_of_one_that_does(model, processor, requests, dtype, monkeypatch):
    """transformers' own DynamicCache: prompts of unequal length, padded, with and without images; one token too."""
    model.to(dtype)
    for new, size in ((12, 16), (40, 5), (1, 16)):
        engine = HFEngine(model, processor, replace(ROLLOUT, max_new_tokens=new, batch_size=size))
        found = generate(engine, requests)
        with monkeypatch.context() as patch:
            patch.setattr(hf, "roomy", lambda cache, rows, more: cache.batch_select_indices(rows) or cache)
            grown = generate(engine, requests)
        assert tokens(found) == tokens(grown)
        assert [r.logprobs.tobytes() for r in found] == [r.logprobs.tobytes() for r in grown]


def test_the_cache_is_allocated_once(model, processor, requests, monkeypatch):
    """Its bytes are those of the budget, and after the prompt nothing of it moves or is left over."""
    made, places = [], set()
    init, update = RoomyLayer.__init__, RoomyLayer.update

    def record(self, *args):
        init(self, *args)
        made.append(self)

    def follow(self, *args, **options):
        keys, values = update(self, *args, **options)
        assert keys.shape == values.shape == self.keys.shape and self.get_seq_length() == keys.shape[2]
        places.update({keys.untyped_storage().data_ptr(), values.untyped_storage().data_ptr()})
        return keys, values

    monkeypatch.setattr(RoomyLayer, "__init__", record)
    monkeypatch.setattr(RoomyLayer, "update", follow)
    responses = generate(HFEngine(model, processor, ROLLOUT), requests)
    assert max(len(r.ids) for r in responses) == ROLLOUT.max_new_tokens
    layers = model.config.text_config.num_hidden_layers
    assert len(made) == layers and len(places) == 2 * layers
    longest = max(len(r.prompt.input_ids) for r in requests)
    assert {layer.filled for layer in made} == {layer.room[0].shape[2] for layer in made} == {longest + 11}
    held = sum(room.untyped_storage().nbytes() for layer in made for room in layer.room)
    assert held == len(requests) * (longest + 11) * cache_bytes(model.config, torch.float32)


def test_calls_stay_within_the_budget_of_the_cache(model, processor, requests, monkeypatch):
    rollout = replace(ROLLOUT, cache_gib=4 * 100 * cache_bytes(model.config, torch.float32) / 2**30)
    calls, real = [], HFEngine._generate_batch
    monkeypatch.setattr(HFEngine, "_generate_batch", lambda self, batch, greedy: calls.append(
        [len(r.prompt.input_ids) for r in batch]) or real(self, batch, greedy))
    assert len(generate(HFEngine(model, processor, rollout), requests)) == len(requests)
    assert sum(map(len, calls)) == len(requests) and len(calls) > 1
    assert all(len(batch) * (max(batch) + 12) <= 400 for batch in calls)
    for batch, after in pairwise(calls):
        assert (len(batch) + 1) * (after[0] + 12) > 400, "as large as they may be"


def test_stale_rope_deltas_are_neither_read_nor_written(model, processor, requests):
    engine = HFEngine(model, processor, ROLLOUT)
    before = tokens(generate(engine, requests))
    stale = torch.full((len(requests), 1), 17)
    model.model.rope_deltas = stale
    assert tokens(generate(engine, requests)) == before
    assert model.model.rope_deltas is stale and (stale == 17).all()


def test_the_tower_runs_once_per_distinct_image(model, processor, requests):
    patches = []
    model.model.visual.patch_embed.register_forward_hook(lambda module, args, out: patches.append(len(args[0])))
    generate(HFEngine(model, processor, ROLLOUT), requests)
    assert sum(patches) == sum(len(r.prompt.pixel_values) for r in requests[::4] if r.prompt.pixel_values is not None)


def test_samples_follow_the_softmax(model, processor, prompts):
    """Chi-square of 8,000 first tokens over the bins that expect at least 5; suppressed tokens never come."""
    count = 8000
    engine = HFEngine(model, processor, replace(ROLLOUT, max_new_tokens=1, batch_size=count))
    responses = generate(engine, [ask(prompts[1], k, request_seed(0, 2, 0, "x", k)) for k in range(count)])
    drawn = np.bincount([r.ids[0] for r in responses], minlength=processor.vocab_size)
    expected = count * full_logprobs(model, processor, prompts[1], responses[0].ids, 0.7)[0].exp().double().numpy()
    assert drawn[processor.suppressed_ids].sum() == 0
    big = expected >= 5
    assert big.sum() > 20, "too flat or too sharp to test"
    drawn, expected = (np.append(a[big], a[~big].sum()) for a in (drawn, expected))
    chi2, freedom = ((drawn - expected) ** 2 / expected).sum(), big.sum()
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


def test_inverse_cdf_at_its_ends():
    """Token 0 and the last one are suppressed: no uniform, however near 0 or 1, may pick them."""
    uniforms = torch.tensor([[0.0], [0.2499999], [0.2500001], [1 - 2.0**-52]], dtype=torch.float64)
    sampler = _Sampler(uniforms, 2.0, torch.tensor([0, 3]))
    scores = torch.tensor([[9.0, 0.0, 2 * np.log(3), 9.0]]).repeat(4, 1)  # p = 1/4 and 3/4 at temperature 2
    picked = sampler(torch.zeros(4, 1), scores)
    assert picked.argmax(-1).tolist() == [1, 1, 2, 2]
    np.testing.assert_allclose(sampler.logprobs[0], np.log([.25, .25, .75, .75]), atol=1e-6)


def test_a_rare_token_has_its_share():
    """Probability 1e-9 behind one of nearly 1: a float32 running sum would never reach it."""
    uniforms = torch.tensor([[1 - 0.5e-9], [1 - 2e-9]], dtype=torch.float64)
    scores = torch.tensor([[0.0, np.log(1e-9)]], dtype=torch.float32).repeat(2, 1)
    assert _Sampler(uniforms, 1.0, torch.tensor([], dtype=torch.int64))(scores, scores).argmax(-1).tolist() == [1, 0]


def test_noise_depends_on_the_seed_alone(prompts):
    make = lambda seed: ask(prompts[0], 0, seed)
    both = _uniforms([make(3), make(2**63 - 1)], 5)
    assert torch.equal(both[1:], _uniforms([make(2**63 - 1)], 7)[:, :5])
    assert not torch.equal(both[0], both[1]) and both.dtype == torch.float64


def test_a_response_ends_with_its_first_eos(model, processor, requests):
    """Half of the vocabulary is eos, so that lengths differ within a batch; so is the padding, as in Qwen2.5-VL."""
    eos = (*processor.eos_ids, processor.pad_id, *range(0, 200, 2))
    plain, processor = processor, replace(processor, eos_ids=eos)
    responses = generate(HFEngine(model, processor, ROLLOUT), requests)
    assert len({len(r.ids) for r in responses}) > 2
    for request, response in zip(requests, responses, strict=True):
        assert response.finish_reason == ("stop" if response.ids[-1] in eos else "length")
        assert not set(response.ids[:-1].tolist()) & set(eos)
        assert len(response.logprobs) == len(response.ids)
        exact = full_logprobs(model, processor, request.prompt, response.ids, 0.7)
        np.testing.assert_allclose(response.logprobs, exact[np.arange(len(response.ids)), response.ids], atol=1e-4)
    unended = [r for r in generate(HFEngine(model, plain, ROLLOUT), requests) if r.ids[-1] != plain.eos_ids[0]]
    assert {(r.finish_reason, len(r.ids)) for r in unended} == {("length", 12)}


def test_sync_replaces_every_weight(model, processor, requests):
    engine = HFEngine(model, processor, ROLLOUT)
    before = generate(engine, requests)
    torch.manual_seed(1)
    policy = Qwen2_5_VLForConditionalGeneration(processor.config).eval()
    engine.sync(lambda: ((name, p.detach()) for name, p in policy.named_parameters()), version=7)
    after = generate(engine, requests)
    assert {r.version for r in before} == {0} and {r.version for r in after} == {7}
    assert tokens(after) == tokens(generate(HFEngine(policy, processor, ROLLOUT), requests)) != tokens(before)


@pytest.mark.parametrize("greedy", [False, True])
def test_weights_that_give_nan_name_the_prompt(model, processor, requests, greedy):
    model.model.language_model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"prompt text: weights of version 0 give NaN"):
        generate(HFEngine(model, processor, ROLLOUT), requests, greedy=greedy)
