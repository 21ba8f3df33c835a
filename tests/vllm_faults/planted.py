"""The worker of a vLLM server, with faults to be switched on one at a time: for tests/test_vllm_rollout.py."""

import cosmo_rl_worker
import numpy as np
import torch


class Worker(cosmo_rl_worker.Worker):
    """`plant("")` is honest again."""

    def plant(self, fault: str) -> None:
        kind, _, what = fault.partition(":")
        model = self.model_runner.get_model()
        for name in ("load_weights", "get_mrope_input_positions"):
            vars(model).pop(name, None)
        for hook in vars(self).pop("_planted", ()):
            hook.remove()
        if kind == "never":  # tensors whose names hold this are not loaded
            real = model.load_weights
            model.load_weights = lambda weights: real((n, t) for n, t in weights if what not in n)
        elif kind == "bit":  # the last bit of one weight
            real = model.load_weights
            model.load_weights = lambda weights: real((n, _flipped(t) if n == what else t) for n, t in weights)
        elif kind == "positions":
            real = model.get_mrope_input_positions
            change = {"lost": _lost, "swapped": _swapped}[what]
            model.get_mrope_input_positions = lambda *args, **kwargs: change(*real(*args, **kwargs))
        elif kind == "pixels":
            self._planted = [model.visual.register_forward_pre_hook(
                lambda _module, args, kwargs: _scaled(args, kwargs, float(what)), prepend=True, with_kwargs=True)]
        else:
            assert not kind, fault


def _flipped(tensor):
    tensor = tensor.clone()
    tensor.view(-1).view(torch.int32)[-1] ^= 1
    return tensor


def _lost(positions, _delta):
    """Text positions, as without M-RoPE."""
    return torch.from_numpy(np.broadcast_to(np.arange(positions.shape[1]), (3, positions.shape[1])).copy()), 0


def _swapped(positions, delta):
    """Height for width."""
    return positions[[0, 2, 1]].contiguous(), delta


def _scaled(args, kwargs, by):
    if args:
        return (args[0] * by, *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, kwargs | {first: kwargs[first] * by}
