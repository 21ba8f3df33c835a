"""The memory estimate: exact where it can be, and near what autograd really keeps where it is a formula."""

from dataclasses import replace

import pytest
import runs
import torch
from memory import Allocations

from cosmo_rl.cpgd.config import Config
from cosmo_rl.cpgd.run.footprint import (
    Calls,
    Load,
    Parameters,
    Term,
    by_phase,
    count_parameters,
    footprint,
    kept_by_layer,
    peak,
)
from cosmo_rl.data.collate import TokenSequence, collate, encode_prompt
from cosmo_rl.data.prepare.mini import safety_rows
from cosmo_rl.model.load import load_model
from cosmo_rl.model.policy import Policy

CALLS = Calls(requests=12, prompts=3, prompt_tokens=40)
LOAD = Load(tokens=1000, targets=300, patches=128, sequences=8)


def settings(**model) -> Config:
    base = runs.config()
    model = {"freeze_vision": False, "gradient_checkpointing": False, **model}
    return replace(base, model=replace(base.model, **model))


def terms_of(config: Config, world_size: int = 1, load: Load = LOAD, calls: Calls = CALLS) -> dict[str, int]:
    model_config = runs.policy_processor().config
    parameters = count_parameters(model_config, config.model.freeze_vision)
    terms = footprint(model_config, parameters, config, load, {"rollout": calls} if calls.requests else {}, world_size)
    return {term.name: term.num_bytes for term in terms}


@pytest.mark.parametrize("freeze_vision", [False, True])
def test_parameters_are_those_of_the_real_model(freeze_vision):
    model = load_model(runs.MODEL, freeze_vision=freeze_vision)
    sizes = {name: (p.numel(), p.requires_grad) for name, p in model.named_parameters()}
    alone = ("model.language_model.layers.",) if freeze_vision else ("model.language_model.layers.",
                                                                      "model.visual.blocks.")
    found = count_parameters(runs.policy_processor().config, freeze_vision)
    assert found == Parameters(
        trainable=sum(size for size, trained in sizes.values() if trained),
        frozen=sum(size for size, trained in sizes.values() if not trained),
        root=sum(size for name, (size, trained) in sizes.items() if trained and not name.startswith(alone)),
        layer=sum(p.numel() for p in model.model.language_model.layers[0].parameters()))  # larger than a block here
    assert (found.frozen > 0) == freeze_vision


def test_what_always_lies_there():
    whole = sum(p.numel() for p in load_model(runs.MODEL).parameters())
    terms = terms_of(settings())
    assert terms["masters, gradients, Adam"] == 16 * whole and terms["engine copy"] == 4 * whole
    assert "frozen tower" not in terms and "old head" not in terms
    assert terms_of(settings(), world_size=4)["masters, gradients, Adam"] == 4 * whole
    assert terms_of(settings(), world_size=4)["engine copy"] == 4 * whole
    frozen = terms_of(settings(freeze_vision=True, dtype="bfloat16"))
    assert frozen["engine copy"] == 2 * whole
    assert frozen["masters, gradients, Adam"] // 16 + frozen["frozen tower"] // 2 == whole
    exact = settings()
    exact = replace(exact, objective=replace(exact.objective, drift="exact"))
    assert terms_of(exact)["old head"] == 4 * 640 * 128 and "old head" not in terms_of(replace(exact, stage=0))


@pytest.fixture(scope="module")
def batch():
    processor = runs.policy_processor()
    prompts = [encode_prompt(row, processor, max_prompt_tokens=512, max_image_pixels=10**6)
               for row in safety_rows("validation")[:8]]
    sequences = [TokenSequence(prompt, torch.full((24,), 100).numpy()) for prompt in prompts]
    return collate(sequences, layout="padded", pad_id=processor.pad_id, dummy_image=processor.dummy_image())


@pytest.mark.parametrize("freeze_vision", [False, True], ids=["tower trained", "tower frozen"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "recomputed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(batch, dtype, checkpointing, freeze_vision):
    """Recomputed layers are not kept: the formula's one layer, alive in the backward only, is left out there."""
    kind = getattr(torch, dtype)
    model = load_model(runs.MODEL, freeze_vision=freeze_vision)
    policy = Policy(model, suppressed_ids=runs.policy_processor().suppressed_ids,
                    gradient_checkpointing=checkpointing).to(kind)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that its address stays its own
        return tensor

    in_bytes = lambda: sum(storage.nbytes() for storage in kept.values())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        body = policy.model.model
        image_tokens = body.visual(batch.pixel_values.to(kind), grid_thw=batch.image_grid_thw).pooler_output
        tower = in_bytes()
        embeds = body.language_model.embed_tokens(batch.input_ids).flatten(0, 1)
        embeds = embeds.index_copy(0, batch.image_slots, image_tokens.index_select(0, batch.image_rows))
        body.language_model(inputs_embeds=embeds.view(*batch.input_ids.shape, -1), position_ids=batch.position_ids,
                            use_cache=False)
        text = in_bytes() - tower

    load = Load(batch.input_ids.numel(), 1, len(batch.pixel_values), 8)
    config = settings(dtype=dtype, gradient_checkpointing=checkpointing, freeze_vision=freeze_vision)
    terms, b = terms_of(config, load=load), kind.itemsize
    transient = kept_by_layer(b, 128, 128, 64, 384) * checkpointing
    assert terms["text activations"] - load.tokens * transient == pytest.approx(text, rel=0.1)
    transient = kept_by_layer(b, 128, 128, 128, 256) * (checkpointing or freeze_vision)
    estimate = terms["tower activations"] - load.patches * transient
    if freeze_vision:  # the merger alone: small, and not kept alike in both modes
        assert 0.9 * tower < estimate < 1.6 * tower
    else:
        assert estimate == pytest.approx(tower, rel=0.1)


def test_what_sdpa_makes_of_a_mask(monkeypatch):
    """A packed row, and a decoded token of two requests of unequal length: the largest mask, keys and values given."""
    given = []
    real = torch.nn.functional.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None, **options):
        assert attn_mask is not None and attn_mask.dtype == torch.bool
        given.append((attn_mask.nbytes, key.nbytes + value.nbytes))
        return real(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    text, embeds = load_model(runs.MODEL).model.language_model, torch.zeros(1, 12, 128)
    text(inputs_embeds=embeds, position_ids=torch.arange(12).remainder(7).expand(4, 1, 12), use_cache=False)
    packed, _ = map(max, zip(*given, strict=True))
    given.clear()
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, :3] = 0
    text(inputs_embeds=torch.zeros(2, 10, 128), attention_mask=mask, use_cache=True)
    _, expanded = map(max, zip(*given, strict=True))

    config = settings()
    config = replace(config, rollout=replace(config.rollout, max_new_tokens=4),
                     batch=replace(config.batch, layout="packed"))
    terms = terms_of(config, load=Load(12, 1, 4, 2), calls=Calls(2, 1, 6))
    assert terms["attention mask"] == (1 + 4) * packed and terms["expanded KV"] == expanded
    flash = replace(config, model=replace(config.model, attention="flash_attention_2"))
    assert not {"attention mask", "expanded KV"} & terms_of(flash, calls=CALLS).keys()


def test_the_cache_is_what_the_engine_holds():
    model = load_model(runs.MODEL)
    cache = model.model.language_model(input_ids=torch.full((2, 10), 7), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    config = settings()
    terms = terms_of(replace(config, rollout=replace(config.rollout, max_new_tokens=4)), calls=Calls(2, 1, 6))
    assert terms["KV cache"] == held
    assert terms["sampler"] == 2 * 640 * 24 and terms["prefill"] == 6 * 4 * (2 * 128 + 3 * 384)


def test_the_head_takes_its_gradient_and_one_chunk(monkeypatch):
    """Beyond what one chunk holds, only the hidden states' gradient grows."""
    from cosmo_rl.kernels import gemm

    monkeypatch.setattr(gemm, "SCRATCH_BYTES", 1_000_000)
    monkeypatch.setattr(gemm, "INNER_ROWS", 10)
    sizes = [terms_of(settings(), load=replace_targets(n))["head"] for n in (5_000, 10_000, 20_000)]
    assert sizes[1] - sizes[0] == 4 * 128 * 5_000 and sizes[2] - sizes[1] == 4 * 128 * 10_000
    outer, inner = gemm.plan_chunks(5_000, 640, 4)
    assert 0 < outer < 5_000
    assert sizes[0] == 4 * 640 * 128 + 4 * 128 * 5_000 + 4 * inner * 640 + 4 * outer * 640 + 4 * outer * 128


def replace_targets(count: int) -> Load:
    return LOAD._replace(targets=count)


def test_the_peak_does_not_add_phases_that_take_turns():
    terms = [Term("always", "a", "", 100), Term("update", "b", "", 30), Term("update", "c", "", 5),
             Term("rollout", "d", "", 34)]
    assert peak(terms) == 135 and peak([*terms, Term("rollout", "e", "", 3)]) == 137
    assert "KV cache" not in terms_of(settings(), calls=Calls(0, 0, 40))


def test_each_phase_has_its_own_call_and_holds_what_always_lies_there():
    config, model_config = settings(), runs.policy_processor().config
    parameters = count_parameters(model_config, False)
    terms = footprint(model_config, parameters, config, LOAD, {"rollout": CALLS, "evaluation": CALLS._replace(
        requests=24, prompts=24, patches=100)}, 1)
    sizes = by_phase(terms)
    assert list(sizes) == ["always", "update", "rollout", "evaluation"] and sizes["evaluation"] > sizes["rollout"]
    assert peak(terms) == max(sizes.values()) and sizes["update"] > sizes["always"] > 0
    assert "pixels" in [term.name for term in terms if term.phase == "evaluation"]
    assert "pixels" not in [term.name for term in terms if term.phase == "rollout"]


def test_pixels_of_a_call_are_near_what_the_tower_takes():
    processor, model = runs.policy_processor(), load_model(runs.MODEL)
    prompts = [encode_prompt(row, processor, max_prompt_tokens=512, max_image_pixels=10**6)
               for row in safety_rows("validation")[:150]]
    pixels = torch.cat([torch.from_numpy(prompt.pixel_values) for prompt in prompts])
    grids = torch.cat([torch.from_numpy(prompt.image_grid_thw) for prompt in prompts])
    with torch.no_grad(), Allocations(pixels) as taken:
        model.model.visual(pixels, grid_thw=grids)
    estimate = terms_of(settings(), calls=Calls(1, 1, 1, len(pixels)))["pixels"]
    assert estimate == pytest.approx(pixels.nbytes + taken.peak, rel=0.25)


def test_servers_sample_elsewhere():
    config, model_config = settings(), runs.policy_processor().config
    elsewhere = replace(config, rollout=replace(config.rollout, engine="server", serve=("python",)))
    sizes = [by_phase(footprint(model_config, count_parameters(model_config, False), c, LOAD, {"rollout": CALLS}, 1))
             for c in (config, elsewhere)]
    assert set(sizes[0]) - set(sizes[1]) == {"rollout"}
    parameters = count_parameters(model_config, False)
    assert sizes[0]["always"] - sizes[1]["always"] == 4 * (parameters.trainable + parameters.frozen)
