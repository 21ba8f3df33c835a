"""What runs inside the workers of a vLLM server that cosmo-rl trains with: `--worker-extension-cls`, alone on the path.

It receives weights (a backend of vLLM's weight-transfer API, over torch.distributed: gloo, or NCCL between GPUs), says
what the model really holds, and what pixels reached its vision tower. Imports nothing of cosmo-rl: the server's
environment need not have it. Run with vLLM 0.32, of whose transfer API it uses the worker half alone.
"""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import vllm
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

PREFIXES = (("model.language_model.", "language_model.model."), ("model.visual.", "visual."),
            ("lm_head.", "language_model.lm_head."))
"""Of a checkpoint's names, and of the model's."""
BORN = secrets.token_hex(8)
"""Another in each process: a server that was started again is in no group of the trainer's."""
STACKED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2),
           "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
"""Modules that vLLM holds as one, and the place of each in it."""


@dataclass
class Join(WeightTransferInitInfo):
    """How a worker joins the trainer's group."""

    host: str
    port: int
    prefix: str
    """Of keys in the store: another for each group that was formed."""
    rank_offset: int
    """Rank in the group of this server's first worker; the trainer is rank 0."""
    world_size: int
    transport: str
    """"gloo" or "nccl"."""
    timeout_s: float


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """Tensors that come as one buffer, one behind the other."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    nbytes: int


class GroupTransfer(WeightTransferEngine[Join, Bucket]):
    """Receives buckets that the trainer broadcasts; backend "cosmo"."""

    init_info_cls = Join
    update_info_cls = Bucket
    supports_draft_weight_update = False
    group = None
    begun = False
    """An update has begun and not ended: its trainer may have died in it."""

    def init_transfer_engine(self, init_info: Join) -> None:
        self.shutdown()
        timeout = timedelta(seconds=init_info.timeout_s)
        store = dist.PrefixStore(init_info.prefix, dist.TCPStore(
            init_info.host, init_info.port, is_master=False, timeout=timeout, wait_for_workers=False))
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.group = open_group(store, rank, init_info.world_size, init_info.transport, timeout)
        self.staging = self.device if init_info.transport == "nccl" else torch.device("cpu")

    def start_weight_update(self) -> None:
        if self.begun:  # or the layers would take what they lack for what comes now
            self.finish_weight_update()
        self.begun = True
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self.begun = False
        for module in self.model.modules():  # a tied head has its own copy on a CPU, and no weight of its own came
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def receive_weights(self, update_info: Bucket) -> None:
        if self.group is None:
            raise RuntimeError("no trainer has called init_weight_transfer_engine")
        buffer = torch.empty(update_info.nbytes, dtype=torch.uint8, device=self.staging)
        self.group.broadcast([buffer], dist.BroadcastOptions()).wait()  # from rank 0
        buffer, start, weights = buffer.to(self.device), 0, []
        for name, dtype, shape in zip(update_info.names, update_info.dtypes, update_info.shapes, strict=True):
            dtype = getattr(torch, dtype)
            size = dtype.itemsize * torch.Size(shape).numel()
            weights.append((name, buffer[start:start + size].view(dtype).view(shape)))
            start += size
        self.model.load_weights(weights)

    def shutdown(self) -> None:
        self.group = None


def open_group(store, rank: int, size: int, transport: str, timeout: timedelta):
    """A group beside the default one, which belongs to vLLM."""
    if transport == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


if "cosmo" not in WeightTransferEngineFactory._registry:  # this module can have two names in one process
    WeightTransferEngineFactory.register_engine("cosmo", GroupTransfer)


class Worker:
    """Methods for `collective_rpc`; vLLM adds them to its own worker class."""

    def cosmo_describe(self) -> dict:
        """What a trainer must know of this worker before it joins."""
        model = self.model_runner.get_model()
        cuda = self.device.type == "cuda"
        return {"born": BORN, "vllm": vllm.__version__, "torch": str(torch.__version__), "device": self.device.type,
                "gpu": str(torch.cuda.get_device_properties(self.device).uuid) if cuda else "",
                "dtype": str(self.model_config.dtype).removeprefix("torch."), "model": type(model).__name__,
                "vocab_size": self.model_config.get_vocab_size(), "max_model_len": self.model_config.max_model_len,
                "logprobs_mode": self.model_config.logprobs_mode,
                "data_parallel_size": self.parallel_config.data_parallel_size,
                "pipeline_parallel_size": self.parallel_config.pipeline_parallel_size}

    def cosmo_load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """A bucket of the trainer's own process."""
        self.weight_transfer_engine.model.load_weights(weights)

    def cosmo_digests(self, names: list[str]) -> dict:
        """Of each tensor, by its checkpoint's name: [SHA-256, shape, first row of a slice of a vocabulary] of what this
        worker computes with; three of a fused qkv. None: the model has no such tensor."""
        return {"tp_rank": get_tensor_model_parallel_rank(), "tp_size": get_tensor_model_parallel_world_size(),
                "tensors": {name: self._cosmo_digest(name) for name in names}}

    def _cosmo_digest(self, name: str) -> list | None:
        for old, new in PREFIXES:
            if name.startswith(old):
                path, _, leaf = (new + name.removeprefix(old)).rpartition(".")
                break
        else:
            return None
        parent, _, last = path.rpartition(".")
        stack, place = STACKED.get(last, (last, None))
        model = self.model_runner.get_model()
        try:
            module = model.get_submodule(f"{parent}.{stack}" if parent else stack)
        except AttributeError:
            return None
        tensor = _held(module, leaf)
        if tensor is None:
            return None
        start = None
        if hasattr(module, "shard_indices"):  # a vocabulary, padded
            tensor, start = tensor[:module.shard_indices.num_org_elements], module.shard_indices.org_vocab_start_index
        parts = [tensor]
        if place is not None:
            parts = [tensor.split(module.output_partition_sizes)[place]]
        elif last == "qkv":
            parts = tensor.split(module.output_partition_sizes)
        return [[digest(part), list(part.shape), start] for part in parts]

    def cosmo_watch_pixels(self, count: int) -> None:
        """From here on keep, of all that enters the vision tower, the number of patches, whether they are still the
        picture's bytes (vLLM can normalise them on the device), and about `count` of their values."""
        self._cosmo_pixels = []

        def look(_module, args, kwargs) -> None:
            pixels = (*args, *kwargs.values())[0].detach()
            values = pixels.flatten()[::max(1, pixels.numel() // count)]
            self._cosmo_pixels.append([len(pixels), pixels.dtype == torch.uint8, values.float().cpu().tolist()])

        visual = self.model_runner.get_model().visual
        self._cosmo_hook = visual.register_forward_pre_hook(look, with_kwargs=True)

    def cosmo_pixels_seen(self) -> list:
        """What `cosmo_watch_pixels` has kept; it ends."""
        self._cosmo_hook.remove()
        return self._cosmo_pixels


def _held(module: torch.nn.Module, leaf: str) -> torch.Tensor | None:
    """A parameter as the module computes with it. On a CPU vLLM hands the weights of linear layers and of the head to
    oneDNN, which copies them: then the layer itself is asked, by the identity."""
    tensor = getattr(module, leaf, None)
    if leaf != "weight" or tensor is None or not hasattr(module, "cpu_linear"):
        return tensor
    if isinstance(module, ParallelLMHead):
        width = module.embedding_dim
    elif not tensor.numel():
        width = module.input_size_per_partition
    else:
        return tensor
    return module.cpu_linear(torch.eye(width, dtype=tensor.dtype), tensor, None).t()


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the bytes, 0 for -0 (as a product with the identity leaves it)."""
    tensor = (tensor.detach() + 0.0).cpu().contiguous()
    return hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy()).hexdigest()
