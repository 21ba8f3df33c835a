"""One forward, however it is laid out: equal to plain transformers, to itself packed, padded, split and recomputed."""

import functools
from typing import Any

import numpy as np
import pytest
import tiny_case
import torch

from cosmo_rl.data.collate import TokenSequence, plan_microbatches
from cosmo_rl.kernels import launch
from cosmo_rl.kernels.reference import dense_cpgd, dense_linear_kl, dense_linear_logprob
from cosmo_rl.model.load import load_model
from cosmo_rl.model.policy import LMHead, Update

LAYOUTS = ("packed", "padded")
ATOL = 1e-5


@functools.cache
def plain_logprobs() -> torch.Tensor:
    """Each sequence alone through transformers' own forward, which computes its own M-RoPE."""
    model, processor = load_model(tiny_case.folder()), tiny_case.processor()
    parts = []
    for sequence in tiny_case.sequences():
        prompt, response = sequence.prompt, torch.from_numpy(sequence.response_ids)
        types = np.concatenate([prompt.mm_token_type_ids, 0 * sequence.response_ids])
        images = {}
        if prompt.pixel_values is not None:
            images = {"pixel_values": torch.from_numpy(prompt.pixel_values),
                      "image_grid_thw": torch.from_numpy(prompt.image_grid_thw),
                      "mm_token_type_ids": torch.from_numpy(types[None])}
        with torch.no_grad():
            tokens = torch.cat([torch.from_numpy(prompt.input_ids), response])
            logits = model(input_ids=tokens[None], **images).logits[0]
        logits[:, processor.suppressed_ids] = -torch.inf
        ends = len(prompt.input_ids) - 1
        parts.append(logits[ends:-1].log_softmax(-1).gather(1, response[:, None])[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_equal_transformers(layout, train, checkpointing):
    policy = tiny_case.policy(gradient_checkpointing=checkpointing).train(train)
    batch = tiny_case.batch(tiny_case.sequences(), layout)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            stats = policy(batch)
        torch.testing.assert_close(stats.logprobs, plain_logprobs(), atol=ATOL, rtol=0)
        assert stats.logprobs.requires_grad == grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_do_not_see_each_other(layout):
    policy = tiny_case.policy().eval()
    sequences = tiny_case.sequences()
    batch = tiny_case.batch(sequences, layout)
    with torch.no_grad():
        before = policy(batch).logprobs
        sequences[0] = TokenSequence(sequences[0].prompt, sequences[0].response_ids[::-1] + 1)
        after = policy(tiny_case.batch(sequences, layout)).logprobs
        others = batch.sequence_ids > 0
        torch.testing.assert_close(after[others], before[others], atol=1e-6, rtol=0)
        assert (after[~others] - before[~others]).abs().max() > 0.01

    # The guards bite: neither flat positions nor one long document pass for the right ones.
    with torch.no_grad():
        right = batch.position_ids.clone()
        batch.position_ids[1:] = right[0]
        assert (policy(batch).logprobs - before).abs().max() > 100 * ATOL, "M-RoPE makes no difference here"
        batch.position_ids[1:] = right[1:]
        batch.position_ids[0] = torch.arange(right.shape[2])
        leak = (policy(batch).logprobs - before).abs().max()
        assert leak > 100 * ATOL if layout == "packed" else leak == 0


def update_gradients(layout: str, max_tokens: int, world_size: int = 1, **options) -> tuple[float, dict]:
    """Loss and gradients of one CPGD update in micro-batches, summed over ranks by hand."""
    policy = tiny_case.policy(**options).train()
    sequences = tiny_case.sequences()
    total = sum(len(s.response_ids) for s in sequences)
    plan = plan_microbatches([len(s) for s in sequences], max_tokens=max_tokens, layout=layout, world_size=world_size)
    loss = 0.0
    for chosen in (members for rank in plan for members in rank):
        batch = tiny_case.batch([sequences[i] for i in chosen], layout)
        output = policy(batch, cpgd=tiny_case.cpgd_inputs(batch, chosen, total))
        output.loss.backward()
        loss += output.loss.item()
    return loss, tiny_case.gradients(policy)


@functools.cache
def reference_update():
    return update_gradients("padded", 10_000, gradient_checkpointing=False)


@pytest.mark.parametrize("layout, max_tokens, world_size", [
    ("padded", 10_000, 1), ("packed", 10_000, 1), ("packed", 150, 1), ("padded", 200, 2), ("packed", 10_000, 3),
    ("padded", 10_000, 9),  # more micro-batches than sequences: one is empty
])
def test_update_does_not_depend_on_the_layout(layout, max_tokens, world_size):
    loss, gradients = reference_update()
    got_loss, got = update_gradients(layout, max_tokens, world_size)
    assert abs(loss) > 0.01 and got_loss == pytest.approx(loss, abs=1e-6)
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_are_recomputed_without_being_asked_to_train(checkpointing):
    """As the trainer builds it: `load_model` returns eval mode, in which transformers recomputes nothing."""
    policy = tiny_case.policy(gradient_checkpointing=checkpointing)
    body: Any = policy.model.model
    ran: list[str] = []
    for name, layer in (("text", body.language_model.layers[0].mlp), ("vision", body.visual.blocks[0].mlp)):
        layer.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    batch = tiny_case.batch(tiny_case.sequences(), "padded")
    policy(batch, cpgd=tiny_case.cpgd_inputs(batch, list(range(8)), 10)).loss.backward()
    assert [ran.count(name) for name in ("text", "vision")] == [1 + checkpointing] * 2


def test_frozen_vision_trains_the_merger_alike():
    gradients = reference_update()[1]
    got = update_gradients("padded", 10_000, freeze_vision=True)[1]
    assert {n for n in gradients if n not in got} == {n for n in gradients if ".visual." in n and ".merger." not in n}
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("count", [0, 2], ids=["empty", "text"])
def test_without_images_every_parameter_gets_a_gradient(count, checkpointing):
    """Under FSDP a rank with fewer gradients than another would hang or mix them up."""
    policy = tiny_case.policy(gradient_checkpointing=checkpointing).train()
    chosen = [2, 3][:count]  # the sequences of the prompt without images
    batch = tiny_case.batch([tiny_case.sequences()[i] for i in chosen], "packed")
    policy(batch, cpgd=tiny_case.cpgd_inputs(batch, chosen, 10)).loss.backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        if count == 0 or ".visual." in name:
            assert (parameter.grad == 0).all(), name
    largest = max(g.abs().max() for g in tiny_case.gradients(policy).values())
    assert (largest > 0) == (count > 0)


def test_samples_of_a_prompt_share_one_pass_of_the_tower(monkeypatch):
    policy = tiny_case.policy().eval()
    seen = []
    embed = policy.model.model.visual.patch_embed
    monkeypatch.setattr(embed, "forward", lambda x, old=embed.forward: seen.append(len(x)) or old(x))
    with torch.no_grad():
        policy(tiny_case.batch(tiny_case.sequences(group_size=5), "padded"))
    assert seen == [sum(len(p.pixel_values) for p in tiny_case.prompts() if p.pixel_values is not None)]


def test_hidden_states_are_those_of_the_targets():
    policy = tiny_case.policy().eval()
    batch = tiny_case.batch(tiny_case.sequences(), "packed")
    with torch.no_grad():
        stats, hidden = policy(batch, return_hidden=True)
        again = policy.head(hidden, policy.model.lm_head.weight, batch.targets)
    assert torch.equal(again.logprobs, stats.logprobs)


def test_temperature():
    policy = tiny_case.policy(temperature=0.5).eval()
    batch = tiny_case.batch(tiny_case.sequences(), "padded")
    with torch.no_grad():
        stats, hidden = policy(batch, return_hidden=True)
        logits = hidden @ policy.model.lm_head.weight.T + policy.head.bias
    expected = (logits / 0.5).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    torch.testing.assert_close(stats.logprobs, expected, atol=ATOL, rtol=0)


# -- the head against a dense softmax in float64, with suppressed tokens ---------------------------------------------

N, V, D, TEMPERATURE = 12, 37, 16, 0.7
SUPPRESSED = np.array([0, 5, 36])


@pytest.fixture
def case(backend, monkeypatch):
    monkeypatch.setattr(launch, "use_triton", lambda given, device: backend == "triton")
    hidden = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    targets = torch.from_numpy(np.setdiff1d(np.arange(V), SUPPRESSED))[torch.randint(0, V - 3, (N,))]
    return LMHead(V, SUPPRESSED, TEMPERATURE), hidden, weight, targets


def dense(hidden, weight, targets):
    """Log-probs over the allowed tokens alone: the suppressed ones are not in the vocabulary."""
    allowed = torch.from_numpy(np.setdiff1d(np.arange(V), SUPPRESSED))
    places = torch.searchsorted(allowed, targets)
    return dense_linear_logprob(hidden.double(), weight.double()[allowed], places, TEMPERATURE)


def inputs(old_logprobs, count=N, **exact):
    batch: Any = None
    return Update(batch=batch, members=[], old_logprobs=old_logprobs, advantages=torch.randn(count),
                  token_weights=torch.rand(count), clip_eps_high=0.3, drift_coef=0.05, **exact)


def test_suppressed_tokens_are_outside_the_vocabulary(case):
    head, hidden, weight, targets = case
    stats = head(hidden, weight, targets)
    logprobs, entropy = dense(hidden, weight, targets)
    torch.testing.assert_close(stats.logprobs.double(), logprobs, atol=2e-6, rtol=0)
    torch.testing.assert_close(stats.entropy.double(), entropy, atol=2e-6, rtol=0)
    banned = head(hidden[:3], weight, torch.from_numpy(SUPPRESSED)).logprobs
    assert (banned < -1e29).all()

    (stats.logprobs + 0.1 * stats.entropy).sum().backward()
    got = hidden.grad, weight.grad
    expected = torch.autograd.grad((logprobs + 0.1 * entropy).sum(), (hidden, weight))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (weight.grad[SUPPRESSED] == 0).all()


def test_cpgd(case):
    head, hidden, weight, targets = case
    logprobs = dense(hidden, weight, targets)[0]
    old = logprobs.detach() + 0.3 * torch.randn(N)
    cpgd = inputs(old)
    output = head(hidden, weight, targets, cpgd)
    terms = dense_cpgd(logprobs, old, cpgd.advantages.double(), 0.2, 0.3, 0.05, 2.0)
    expected = (cpgd.token_weights * terms).sum()
    torch.testing.assert_close(output.loss.double(), expected, atol=1e-5, rtol=0)
    for a, b in zip(torch.autograd.grad(output.loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)),
                    strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_exact_drift_replaces_the_sampled_one(case):
    head, hidden, weight, targets = case
    old_hidden, old_weight = hidden.detach() + 0.3 * torch.randn(N, D), weight.detach() + 0.1 * torch.randn(V, D)
    old = dense(old_hidden, old_weight, targets)[0]
    cpgd = inputs(old, old_hidden=old_hidden, old_weight=old_weight)
    output = head(hidden, weight, targets, cpgd)

    allowed = np.setdiff1d(np.arange(V), SUPPRESSED)
    kl = dense_linear_kl(old_hidden.double(), old_weight.double()[allowed], hidden.double(), weight.double()[allowed],
                         TEMPERATURE)
    terms = dense_cpgd(dense(hidden, weight, targets)[0], old, cpgd.advantages.double(), 0.2, 0.3, 0.0, 2.0)
    expected = (cpgd.token_weights * (terms + 0.05 * kl)).sum()
    torch.testing.assert_close(output.drift.double(), kl.detach(), atol=1e-5, rtol=1e-5)
    assert not output.drift.requires_grad
    torch.testing.assert_close(output.loss.double(), expected, atol=1e-5, rtol=0)
    for a, b in zip(torch.autograd.grad(output.loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)),
                    strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["logprobs", "cpgd", "exact"])
def test_no_target_gives_zero_gradients(case, mode):
    """A rank without work still sends gradients into the sum over ranks."""
    head, hidden, weight, targets = case
    exact = {"old_hidden": hidden[:0].detach(), "old_weight": weight.detach()} if mode == "exact" else {}
    cpgd = None if mode == "logprobs" else inputs(torch.empty(0), 0, **exact)
    output = head(hidden[:0], weight, targets[:0], cpgd)
    loss = output.logprobs.sum() if mode == "logprobs" else output.loss
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_owns_no_weight():
    head = LMHead(V, SUPPRESSED, 1.0)
    assert not list(head.parameters()) and not head.state_dict()
