"""Liger's kernels in place of transformers' layers: the same policy, to rounding. In the interpreter on a CPU."""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import sys

import pytest
import runs
import torch
from liger_kernel.ops import LigerRopeFunction
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from cosmo_rl.model import liger
from cosmo_rl.model.load import load_model


@pytest.fixture
def rotary_restored():
    before = modeling_qwen2_5_vl.apply_rotary_pos_emb
    yield
    modeling_qwen2_5_vl.apply_rotary_pos_emb = before


def logits_and_gradients(model):
    ids = torch.arange(30, 48, device=model.device).view(2, 9)
    text = torch.arange(9, device=model.device).expand(1, 2, 9)
    # Three different axes, as behind an image: a kernel that read one of them for all would show.
    positions = torch.cat([text, text, 2 * text, text // 2])
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    logits.square().mean().backward()
    layer = model.model.language_model.layers[0]
    named = [layer.self_attn.q_proj.weight, layer.mlp.gate_proj.weight, layer.input_layernorm.weight]
    return [logits.detach(), *(p.grad for p in named)]


class PlainNorm:
    """Stands in for a kernel that calls `.to` on a Python float, which the interpreter does not allow."""

    @staticmethod
    def apply(states, weight, eps, offset, casting_mode, in_place):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return torch.nn.functional.rms_norm(states, weight.shape, weight, eps)


class PlainSiLUMul:
    """As PlainNorm. The rotary kernel is the real one."""

    @staticmethod
    def apply(gate, up):
        return torch.nn.functional.silu(gate) * up


@pytest.mark.skipif(not liger.INTERPRET, reason="needs Triton's interpreter")
def test_the_same_policy(rotary_restored, monkeypatch):
    monkeypatch.setattr("liger_kernel.ops.LigerRMSNormFunction", PlainNorm)
    monkeypatch.setattr("liger_kernel.ops.LigerSiLUMulFunction", PlainSiLUMul)
    plain = logits_and_gradients(load_model(runs.MODEL))
    calls = []
    forward = LigerRopeFunction.forward
    monkeypatch.setattr(LigerRopeFunction, "forward", lambda *args: (calls.append(1), forward(*args))[1])
    model = load_model(runs.MODEL, liger=True)
    fused = logits_and_gradients(model)
    assert len(calls) == len(model.model.language_model.layers)
    for a, b in zip(fused, plain, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_policy_on_a_gpu(rotary_restored):
    plain = logits_and_gradients(load_model(runs.MODEL).cuda())
    fused = logits_and_gradients(load_model(runs.MODEL, liger=True).cuda())
    for a, b in zip(fused, plain, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_the_tower_and_the_state_dict_stay(rotary_restored):
    plain, fused = load_model(runs.MODEL), load_model(runs.MODEL, liger=True)
    assert list(plain.state_dict()) == list(fused.state_dict())
    norms = [m for m in fused.modules() if isinstance(m, modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm)]
    assert norms and all("forward" in vars(m) for m in norms)


def test_when_it_is_used(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not liger.wants_liger("auto", cpu) and not liger.wants_liger("off", gpu)
    assert liger.wants_liger("auto", gpu) and liger.wants_liger("on", gpu)
    with pytest.raises(ValueError, match=r"--model\.liger on needs a GPU, and this run is on cpu"):
        liger.wants_liger("on", cpu)
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    assert not liger.wants_liger("auto", gpu)
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        liger.wants_liger("on", gpu)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        liger.use_liger(torch.nn.Linear(1, 1))
