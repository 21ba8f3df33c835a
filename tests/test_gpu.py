"""On a CUDA device: the tests of the kernels with backend="triton", offsets beyond 2^31, same bits, no waits, memory.

TEST_GPU_DEVICE=cpu runs what can run in Triton's interpreter, at shapes that it can bear.
"""

# Tests unpack inputs of mixed types, and a `leaf.grad` that is None fails them anyway.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportUnusedExpression=false

import os
from contextlib import contextmanager

import pytest
import test_cpgd_objective as objective
import test_gemm as products_and_chunks
import test_linear_cpgd as cpgd
import test_linear_kl as kl
import test_linear_logprob as logprob
import torch

from cosmo_rl.kernels.cpgd_objective import cpgd_objective
from cosmo_rl.kernels.gemm import SCRATCH_BYTES
from cosmo_rl.kernels.linear_cpgd import linear_cpgd
from cosmo_rl.kernels.linear_kl import linear_kl
from cosmo_rl.kernels.linear_logprob import linear_logprob
from cosmo_rl.kernels.reference import IGNORE_INDEX, dense_linear_kl, dense_linear_logprob

DEVICE = torch.device(os.environ.get("TEST_GPU_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.gpu
if ON_GPU and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
alone = pytest.mark.alone  # memory and waits are those of the whole GPU
only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="asks the CUDA allocator or the CUDA stream")

OPS = ["linear_logprob", "linear_cpgd", "linear_kl"]
QWEN_7B = (32768, 3584, 152064)


@pytest.fixture(autouse=True)
def device():
    """Tensors of a test are made on DEVICE; what its kernels do wrong is told of this test, and ends the run."""
    with torch.device(DEVICE):
        torch.empty(0)  # lets torch list its factories before a fixture wraps them
        yield
    if ON_GPU:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # the context is lost: every later test would fail, and say nothing
            pytest.exit(f"CUDA: {str(error).splitlines()[0]}, at the end of {os.environ['PYTEST_CURRENT_TEST']}",
                        returncode=1)


@pytest.fixture
def interpreter():
    """Not needed here."""


@pytest.fixture
def backend():
    return "triton"


# The tests of the other files, with the fixtures of this one.
test_logprob_values_and_gradients = logprob.test_values_and_gradients
test_logprob_many_tiles = logprob.test_many_tiles
test_logprob_one_gradient = logprob.test_gradient_from_one_output_alone
test_logprob_vocabularies = logprob.test_vocabularies_of_qwen
test_logprob_loads = logprob.test_both_ways_to_load
test_logprob_programs = logprob.test_any_number_of_programs
test_logprob_float32_statistics = logprob.test_statistics_are_float32_whatever_the_input_dtype
test_logprob_extreme = logprob.test_extreme_logits
test_logprob_ignored = logprob.test_ignored_rows_take_no_part
test_logprob_nothing = logprob.test_nothing_to_score
test_logprob_dropped_rows = logprob.test_rows_without_gradient_are_dropped_before_any_product
test_logprob_frozen = logprob.test_frozen_operands_cost_no_product
test_logprob_small_float16 = logprob.test_float16_gradients_survive_small_coefficients
test_logprob_bans = logprob.test_bias_bans_tokens
test_logprob_bad_target = logprob.test_unchecked_bad_target_gives_nan_and_reads_nothing
test_logprob_same_bits = logprob.test_same_bits_in_every_run
test_logprob_modes = logprob.test_same_bits_in_any_mode
test_logprob_layouts = logprob.test_any_layout
test_cpgd_against_autograd = cpgd.test_against_dense_autograd
test_cpgd_many_tiles = cpgd.test_many_tiles
test_cpgd_vocabularies = cpgd.test_vocabularies_of_qwen
test_cpgd_extreme = cpgd.test_extreme_logits
test_cpgd_two_calls = cpgd.test_against_the_two_separate_calls
test_cpgd_on_policy = cpgd.test_same_bits_with_and_without_gradient
test_cpgd_ratio_is_one = cpgd.test_ratio_is_one_without_old_logprobs
test_cpgd_frozen = cpgd.test_frozen_operands_cost_no_product
test_cpgd_same_bits = cpgd.test_same_bits_in_every_run
test_cpgd_bounds = cpgd.test_bounds_per_token
test_cpgd_layouts = cpgd.test_any_layout
test_cpgd_repeats = cpgd.test_backward_scales_out_of_place
test_cpgd_small_float16 = cpgd.test_float16_gradients_survive_small_token_weights
test_cpgd_ignored = cpgd.test_ignored_rows_take_no_part
test_cpgd_nothing = cpgd.test_nothing_to_train_on
test_cpgd_bad_target = cpgd.test_unchecked_bad_target_makes_the_loss_nan
test_kl_values_and_gradients = kl.test_values_and_gradients
test_kl_many_tiles = kl.test_many_tiles
test_kl_vocabularies = kl.test_vocabularies_of_qwen
test_kl_loads = kl.test_both_ways_to_load
test_kl_programs = kl.test_any_number_of_programs
test_kl_frozen = kl.test_frozen_operands_cost_no_product
test_kl_same_bits = kl.test_same_bits_in_every_run
test_kl_layouts = kl.test_any_layout
test_kl_equal_policies = kl.test_equal_policies_have_none
test_kl_small = kl.test_small_divergences_keep_their_size
test_kl_far = kl.test_far_policies_stay_finite
test_kl_bans = kl.test_bias_bans_tokens
test_kl_nothing = kl.test_no_tokens
test_objective_table = objective.test_hand_computed_table
test_objective_definition = objective.test_value_and_gradient_against_autograd_of_the_definition
test_objective_bounds = objective.test_bounds_per_token
test_objective_off_the_bounds = objective.test_same_as_the_reference_off_the_bounds
test_objective_beyond_numbers = objective.test_ratios_without_bounds
test_objective_drift = objective.test_drift_is_right_and_never_negative
test_objective_repeats = objective.test_only_loss_is_differentiable_and_backward_repeats
test_gemm_products = products_and_chunks.test_products_are_float32
test_gemm_gradients = products_and_chunks.test_gradients
test_gemm_scale = products_and_chunks.test_scale_is_applied_in_float32
test_gemm_ignored = products_and_chunks.test_nan_of_ignored_rows_goes_nowhere


def make_inputs(n, d, v, dtype=torch.bfloat16):
    """hidden, weight, targets (the last token of the vocabulary among them, some ignored) and an old hidden."""
    hidden, weight = torch.randn(n, d, dtype=dtype), torch.randn(v, d, dtype=dtype)
    weight.mul_(3 / d**0.5)
    targets = torch.randint(0, v, (n,))
    targets[::7], targets[0], targets[-1] = IGNORE_INDEX, 0, v - 1
    return hidden, weight, targets, hidden + 0.2 * torch.randn(n, d, dtype=dtype)


def run(op, hidden, weight, targets, old_hidden, backend="triton"):
    """[values, dhidden, dweight] of one op, the values (N,) each, its loss a sum of weighted tokens."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    n = len(targets)
    at = torch.arange(n, device=DEVICE)
    coefficient = 0.5 + 0.5 * torch.cos(at.float())
    if op == "linear_logprob":
        stats = linear_logprob(hidden, weight, targets, backend=backend)
        values, loss = [*stats], (coefficient * (stats.logprobs + 0.3 * stats.entropy)).sum()
    elif op == "linear_cpgd":
        old = torch.full((n,), -5.0)
        out = linear_cpgd(hidden, weight, targets, old, torch.sin(at.float()), coefficient, backend=backend)
        values, loss = [out.logprobs, out.entropy, out.drift], out.loss
    else:
        values = [linear_kl(old_hidden, weight.detach(), hidden, weight, backend=backend)]
        loss = (coefficient * values[0]).sum()
    loss.backward()
    return [*(t.detach() for t in values), hidden.grad, weight.grad]


def sample(size, d):
    """Rows of a (size, d) tensor: the first, the last and those around element 2^31."""
    middle = min(2**31 // d, size - 4)
    return torch.cat((torch.arange(4), torch.arange(middle - 4, middle + 4), torch.arange(size - 4, size)))


@alone
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(530_001, 4096, 512), (70, 4096, 530_001)], ids=["tokens", "vocabulary"])
def test_offsets_beyond_32_bits(op, shape):
    """hidden, then weight, of more than 2^31 elements: sampled rows against the reference and against float64."""
    n, d, v = shape if ON_GPU else (min(shape[0], 70), 64, min(shape[2], 301))
    assert not ON_GPU or max(n, v) * d > 2**31
    inputs = make_inputs(n, d, v)
    at_hidden, at_weight = sample(n, d), sample(v, d)
    *values, dhidden, dweight = run(op, *inputs)
    found = [*(t[at_hidden] for t in values), dhidden[at_hidden], dweight[at_weight]]
    del values, dhidden, dweight
    *values, dhidden, dweight = run(op, *inputs, backend="torch")
    reference = [*(t[at_hidden] for t in values), dhidden[at_hidden], dweight[at_weight]]
    del values, dhidden, dweight
    for index, (a, b) in enumerate(zip(found, reference, strict=True)):
        # An offset that wraps gives other numbers altogether. Gradients are bfloat16, Triton's of the logits too.
        top = b.abs().max().item()
        atol = 1e-2 * top if index >= len(found) - 2 else 1e-3
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=atol)
    hidden, weight, targets, old_hidden = inputs
    with torch.no_grad():
        rows = [t[at_hidden].double() for t in (hidden, old_hidden)]
        if op == "linear_kl":
            head = weight.double()
            exact = [dense_linear_kl(rows[1], head, rows[0], head)]
        else:
            exact = dense_linear_logprob(rows[0], weight.double(), targets[at_hidden])
    for a, e in zip(found, exact, strict=False):
        # 256 steps of the tensor cores over 4096 products, each truncated to a unit in the last place of about 8.
        torch.testing.assert_close(a.double(), e, rtol=0, atol=2e-4)


@alone
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_same_bits_twice_at_a_real_vocabulary(op, dtype):
    inputs = make_inputs(*((4099, 512, 152064) if ON_GPU else (20, 32, 300)), dtype)
    first, second = run(op, *inputs), run(op, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_objective_same_bits_twice():
    n = 1_000_003 if ON_GPU else 3001
    logprobs, old, advantages = -torch.rand(n), -torch.rand(n), torch.randn(n)
    found = []
    for _ in range(2):
        leaf = logprobs.clone().requires_grad_()
        terms = cpgd_objective(leaf, old, advantages, clip_eps_low=torch.full((n,), 0.1), backend="triton")
        terms.loss.sum().backward()
        found.append((*terms, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@only_on_gpu
def test_values_are_read_on_request_only():
    hidden, weight, targets, _ = make_inputs(20, 64, 100)
    targets[3] = 100
    with pytest.raises(ValueError, match=r"targets\[3\] is 100"):
        linear_logprob(hidden, weight, targets, check=True)
    assert torch.isnan(linear_logprob(hidden, weight, targets).logprobs[3])


@alone
@only_on_gpu
@pytest.mark.parametrize("op", [*OPS, "cpgd_objective"])
def test_nothing_waits_for_the_device(op):
    """Once the constants of a call are there, only the backward of linear_logprob reads back, which rows are live."""
    hidden, weight, targets, old_hidden = make_inputs(600, 64, 1000)
    hidden.requires_grad_(), weight.requires_grad_()
    ones, leaf = torch.ones(600), torch.zeros(600, requires_grad=True)

    def call():
        if op == "linear_logprob":
            linear_logprob(hidden, weight, targets)
        elif op == "linear_cpgd":
            linear_cpgd(hidden, weight, targets, -ones, ones, ones).loss.backward()
        elif op == "linear_kl":
            linear_kl(old_hidden, weight, hidden, weight).sum().backward()
        else:
            cpgd_objective(leaf, -ones, ones).loss.sum().backward()

    call()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def memory(limit):
    """At most `limit` bytes beyond what is allocated at the start."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    assert used <= limit, f"{used / 1e9:.3f} GB, allowed {limit / 1e9:.3f}"


VECTORS = 400
"""Bytes a token for everything of shape (N,), partial sums excepted."""
WORKSPACE = 32 << 20
"""Bytes that cuBLAS may take, on some versions of torch for each call anew."""


@alone
@only_on_gpu
@pytest.mark.parametrize("op", OPS)
def test_memory_at_the_head_of_7b(op):
    """As the docstrings have it."""
    n, d, v = QWEN_7B
    run(op, *make_inputs(600, 256, 2000))
    hidden, weight, targets, old_hidden = make_inputs(n, d, v)
    targets.clamp_(min=0)  # all tokens live, so that no copy of their hidden states is made
    hidden.requires_grad_(), weight.requires_grad_()
    ones = torch.ones(n)
    dhidden, dweight, dweight32, vectors = 2 * n * d, 2 * v * d, 4 * v * d, VECTORS * n + WORKSPACE
    if op == "linear_cpgd":
        with memory(dhidden + dweight32 + 1.5e9):
            loss = linear_cpgd(hidden, weight, targets, -5 * ones, ones, ones / n).loss
        with memory(dhidden + dweight + vectors):
            loss.backward()
    elif op == "linear_logprob":
        with memory(16 * n * 64 + vectors):
            stats = linear_logprob(hidden, weight, targets)
        with memory(dhidden + dweight32 + max(dweight, SCRATCH_BYTES + 4 * 4096 * d) + vectors):
            (stats.logprobs + stats.entropy).sum().backward()
    else:
        with memory(20 * n * 64 + vectors):
            total = linear_kl(old_hidden, weight, hidden, weight).sum()
        with memory(dhidden + dweight32 + max(dweight, SCRATCH_BYTES + 4 * 4096 * d + 4 * 512 * v) + vectors):
            total.backward()
    assert torch.isfinite(hidden.grad[::97]).all() and torch.isfinite(weight.grad[::97]).all()
    assert (hidden.grad[-1] != 0).any() and (weight.grad[targets[-1]] != 0).any()
