"""What a run will need, worked out from shapes before it starts."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from offline_prune.block_pruning import weighs_channels
from offline_prune.calibration.generated import PIECE, Writer
from offline_prune.calibration.images import image_places
from offline_prune.calibration.sensitivity import LENGTH, SEQUENCES
from offline_prune.checkpoint.output_folder import PARTIAL
from offline_prune.checkpoint.writer import merges
from offline_prune.expert_pruning import batch_bytes, experts_at_once
from offline_prune.methods.recipe import Layout, Quantize, Selection
from offline_prune.model.companions import companions
from offline_prune.model.experts import Experts
from offline_prune.model.loading import SourceModel
from offline_prune.model.whole import output_head
from offline_prune.runtime import deterministic_reduce, distributed
from offline_prune.runtime.activation_store import Place
from offline_prune.runtime.pinned_buffers import pinned_bytes
from offline_prune.settings import AUTO, PruneSettings
from vllm_spense.errors import SpenseError

GIB = 2**30
#: Share of the memory that is free which a plan may count on.
USABLE = 0.9
#: That a plan counts on; of published models up to 10.
_EXPERTS_OF_A_TOKEN = 10
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one rank needs, by what they are for.

    Attributes:
        activations: hidden states of its calibration sequences, and what else blocks are given of each token.
        pinned_activations: what they take if they are in host memory that a GPU reads.
        block: one decoder block on the compute device: its weights, and with a GPU also its part of the checkpoint.
        work: the largest of what its passes and its pruning need beside them, on the compute device.
        staging: blocks on their way in or out, in host memory; with a GPU all of it is pinned. And masks and positions
            of images, which are not.
        disk: the checkpoint, and room to make one file of its parts where it is small.
        device: that computes.
        place: of the activations.
        ranks: how many there are.
        gradients: all but the blocks of the dense model, and logits of a sequence with their gradients, before pruning
            begins; 0 where tuning weighs all channels alike.
        generation: the whole dense model while it writes calibration text, before all else; 0 where it writes none.
        written_at_once: texts that it then writes together.
    """

    activations: int
    pinned_activations: int
    block: int
    work: int
    staging: int
    disk: int
    device: torch.device
    place: Place
    ranks: int = 1
    gradients: int = 0
    generation: int = 0
    written_at_once: int = 0

    @property
    def on_device(self) -> int:
        pruning = self.block + self.work + (self.activations if self.place is Place.DEVICE else 0)
        return max(pruning, self.generation, self.gradients)

    @property
    def host(self) -> int:
        on_device = self.on_device if self.device.type == "cpu" else 0
        activations = self.activations if self.device.type == "cpu" else self.pinned_activations
        return self.staging + on_device + (activations if self.place is Place.HOST else 0)

    @property
    def on_disk(self) -> int:
        """Of all ranks together."""
        return self.disk + (self.ranks * self.activations if self.place is Place.DISK else 0)

    def lines(self) -> list[str]:
        """For people, one item a line."""

        def gib(size: int) -> str:
            return f"{size / GIB:.2f} GiB"

        places = {Place.DEVICE: f"memory of {self.device}", Place.HOST: "host memory", Place.DISK: "a file"}
        return [
            *([f"{self.ranks} processes; memory of each:"] if self.ranks > 1 else []),
            f"calibration activations in {places[self.place]}: {gib(self.activations)}",
            f"one block and the work on it in memory of {self.device}: {gib(self.block + self.work)}",
            *([f"gradients at the output head: {gib(self.gradients)}"] if self.gradients else []),
            *([f"the dense model while it writes text: {gib(self.generation)}"] if self.generation else []),
            f"memory of {self.device} in all: {gib(self.on_device)}",
            f"host memory in all: {gib(self.host)}, beyond Python, its libraries and the mapped model",
            f"disk in all: {gib(self.on_disk)}, of it {gib(self.disk)} for the checkpoint",
        ]


def memory_plan(
    model: SourceModel, settings: PruneSettings, device: torch.device, dtype: torch.dtype, to_write: int = 0
) -> MemoryPlan:
    """Works out what the largest block needs, and picks the first place with room for the activations.

    Args:
        to_write: texts that the dense model writes before it is pruned: `generated.pieces`.

    Raises:
        SpenseError: the device has too little memory for one block or, if it writes, for the dense model; or no place
            has room.
    """
    recipe = settings.recipe
    tokens = settings.samples * settings.length // distributed.size()
    batch = max(settings.length, batch_tokens(settings, device))
    experts = list(model.experts.values())
    mlps = [mlp for block in model.blocks for mlp in block.mlps] + experts
    hidden = max(mlp.hidden for mlp in mlps)
    widest = max(mlp.intermediate for mlp in mlps)
    parameters = max(sum(p.numel() for p in model.module(block.name).parameters()) for block in model.blocks)
    written = _written_bytes(model, settings)
    scored = 2 * 4 * 2 * widest * hidden if recipe.selection is Selection.OUTPUT_LOSS else 0
    streams, tunes = 2 if recipe.follows_dense else 1, recipe.tune_steps > 0
    # A float32 weight of down, what becomes of it, its difference, and two products for the loss or copies for descent.
    weights = 5 * 4 * widest * hidden
    # A tree of sums keeps one of each level, and one that is exchanged.
    sums = max(
        len(deterministic_reduce.local_shards(settings.samples // distributed.size())).bit_length(),
        2 if distributed.size() > 1 else 1,
    )
    phases = {
        # H of the parts of the text, and one batch: residual stream and its norms, the MLP's three wide tensors. What
        # layers that are only rounded see is narrower.
        "observe": sums * 4 * widest**2 + batch * (3 * widest + 6 * hidden) * dtype.itemsize,
        # H and three matrices of its size to factorize it; weights twice as large, and once in the model's type. Where
        # every row is pruned to choose among them, the result in both orders.
        "gate and up": 4 * 4 * hidden**2 + 2 * weights + 4 * widest * hidden * dtype.itemsize + scored,
        "tune": (_tuning(widest, hidden, batch, dtype.itemsize) if tunes else 0)
        # Both Hessians' factors wait for the rounding of what is tuned.
        + (4 * (widest**2 + hidden**2) if recipe.rounds_tuned else 0),
        "down": (5 if recipe.layout is not Layout.BACK else 4) * 4 * widest**2 + 4 * hidden**2 + weights,
    }
    if experts:
        most = max(experts, key=lambda each: each.count)
        phases |= _of_experts(most, experts_at_once(most, recipe, device), batch, sums, dtype.itemsize)
    # Tuning keeps a copy of the dense MLP.
    weights_here = (parameters + (3 * widest * hidden if tunes else 0)) * dtype.itemsize
    kept = max(sum(_of_block(block.name, written)) for block in model.blocks)
    rooms = [tokens * width * dtype.itemsize for width in _kept_of_a_token(model, hidden)]
    staging = _pinned_staging(model, written) if device.type == "cuda" else 2 * kept
    if settings.calibration_images is not None:
        seeing = -(-len(image_places(settings.samples, settings.wanted_image_share)) // distributed.size())
        phases["images"] = _seeing_work(model, settings.length, dtype.itemsize)
        staging += streams * seeing * kept_of_images(model, settings.length, dtype.itemsize)
    weighs, few = weighs_channels(model, settings) and model.head_name is not None, min(settings.length, LENGTH)
    if weighs:
        phases["gradients"] = _gradients(model, few, widest, hidden, dtype.itemsize)
        staging += (len(model.blocks) + 1) * min(settings.samples, SEQUENCES) * few * hidden * dtype.itemsize
    needs = MemoryPlan(
        activations=streams * sum(rooms),
        pinned_activations=streams * sum(map(pinned_bytes, rooms)),
        block=weights_here + (kept if device.type == "cuda" else 0),
        work=max(phases.values()),
        staging=staging,
        disk=_disk(model, written),
        device=device,
        place=Place.DEVICE,
        ranks=distributed.size(),
        gradients=_at_the_head(model, few, dtype.itemsize) if weighs else 0,
    )
    room = usable_host() if device.type == "cpu" else int(free_bytes(device) * USABLE)
    return _placed(_with_writer(needs, model, min(settings.length, PIECE), dtype, to_write, room), settings, room)


def _with_writer(
    needs: MemoryPlan, model: SourceModel, length: int, dtype: torch.dtype, to_write: int, room: int
) -> MemoryPlan:
    if not to_write:
        return needs
    writer = Writer.of(model, dtype)
    at_once = writer.at_once(to_write, length, needs.device, room)
    found = replace(needs, generation=writer.bytes(at_once, length), written_at_once=at_once)
    require_room_to_write(found.generation, room, needs.device)
    return found


def _of_experts(experts: Experts, at_once: int, batch: int, sums: int, itemsize: int) -> dict[str, int]:
    """Phases of a block with routed experts, each of which has Hessians of its own until it is pruned.

    Args:
        at_once: experts that are pruned together.
    """
    count, hidden, inner = experts.count, experts.hidden, experts.intermediate
    # Every expert gets all of its tokens once more, in their order, and what is sampled of them stays.
    passed = batch * _EXPERTS_OF_A_TOKEN * (2 * hidden + 3 * inner) * itemsize
    sample = _EXPERTS_OF_A_TOKEN * 2 * max(hidden, inner) * hidden * itemsize
    return {
        "experts": sums * 4 * count * (hidden**2 + inner) + passed + sample,
        # As they are read, one by one, and as the model holds them.
        "experts, loaded": 2 * 3 * count * inner * hidden * itemsize,
        "experts, gate and up": 4 * count * (hidden**2 + inner) + at_once * batch_bytes(experts) + sample,
        "experts, down": sums * 4 * count * inner**2 + passed + sample + at_once * batch_bytes(experts),
    }


def _kept_of_a_token(model: SourceModel, hidden: int) -> list[int]:
    """How many numbers each tensor holds that keeps something of every token.

    They are the hidden states, of which Gemma 3n has several, and the inputs that Gemma 3n and 4 have for each layer.
    """
    config = model.text.config
    streams = getattr(config, "altup_num_inputs", None) or 1
    layer_input = getattr(config, "hidden_size_per_layer_input", None) or 0
    return [streams * hidden, *([layer_input] * len(model.blocks) if layer_input else [])]


def kept_of_images(model: SourceModel, length: int, itemsize: int) -> int:
    """Bytes that a sequence with images keeps of its own in host memory, at most.

    Two kinds of masks, a bit for each pair of tokens; sines and cosines of two kinds of positions, in the three
    dimensions of M-RoPE; what is added in front of blocks (Qwen3-VL).
    """
    text, vision = model.text.config, model.skeleton.config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    added = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    # Row numbers and token positions are int64.
    positions = length * (2 * 2 * 3 * head * itemsize + 4 * 8)
    return 2 * length * -(-length // 8) + positions + added * length * (text.hidden_size * itemsize + 8)


def _seeing_work(model: SourceModel, length: int, itemsize: int) -> int:
    """Bytes of what stands around the blocks, vision tower and all, and of the images of one sequence in it."""
    vision = model.skeleton.config.vision_config
    width = int(getattr(vision, "hidden_size", None) or getattr(vision, "embed_dim", None) or 0)
    wide = int(getattr(vision, "intermediate_size", None) or 4 * width)
    # Gemma-3 makes one token of 16 patches, others of fewer.
    return (model.parameters_outside_blocks() + 16 * length * (8 * width + 2 * wide)) * itemsize


def _tuning(widest: int, hidden: int, batch: int, itemsize: int) -> int:
    """Bytes that tuning needs, as counted on a CPU, where its tensors are the same."""
    # Master, start, gradient, two moments, average; whether it is kept, and what is served, in the model's type.
    per_weight = 6 * 4 + 2 * itemsize
    # Of each token four wide tensors that the gradients need, the gradients of two, and what is H wide.
    return 3 * widest * hidden * per_weight + 6 * batch * (widest + hidden) * itemsize


def _gradients(model: SourceModel, length: int, widest: int, hidden: int, itemsize: int) -> int:
    """Bytes that a block needs beside its weights for the gradient of one sequence."""
    heads = getattr(model.text.config, "num_attention_heads", 1)
    # What attention attends to, in float32 and in the model's type, and their gradients; as when tuning, the rest.
    return heads * length**2 * 2 * (4 + itemsize) + 6 * length * (widest + 2 * hidden) * itemsize


def _at_the_head(model: SourceModel, length: int, itemsize: int) -> int:
    """Bytes of all but the blocks, and of one sequence's logits in float32: with what is drawn from, and gradients."""
    vocabulary, width = output_head(model).weight.shape
    return (model.parameters_outside_blocks() + vocabulary * width) * itemsize + 5 * 4 * length * vocabulary


def batch_tokens(settings: PruneSettings, device: torch.device) -> int:
    """Tokens that pass through a block at once: enough to keep the device busy."""
    return settings.batch_tokens or BATCH_TOKENS[device.type]


def _written_bytes(model: SourceModel, settings: PruneSettings) -> dict[str, int]:
    """Tensor of the model → its bytes in the checkpoint."""
    layers = {*model.linears(), *(layer for experts in model.experts.values() for layer in experts.layers())}
    fp8 = {f"{name}.weight" for name in layers} if settings.quantize is Quantize.FP8 else set()
    sizes = {name: model.tensors.nbytes(name) for name in model.tensors}
    return {name: size // model.tensors.dtype(name).itemsize if name in fp8 else size for name, size in sizes.items()}


def _of_block(block: str, sizes: dict[str, int]) -> list[int]:
    return [size for name, size in sizes.items() if name.startswith(f"{block}.")]


def _disk(model: SourceModel, written: dict[str, int]) -> int:
    """Bytes of the checkpoint, and of the largest part where parts are merged: one at a time is there twice."""
    total = sum(written.values())
    inside = [sum(_of_block(block.name, written)) for block in model.blocks]
    largest = max(*inside, total - sum(inside))
    others = sum((model.folder / name).stat().st_size for name in companions(model.folder))
    return total + others + (largest if merges(total) else 0)


def _pinned_staging(model: SourceModel, written: dict[str, int]) -> int:
    """The largest block on its way to a GPU and on its way to the disk: each tensor has its own memory."""
    read = {name: model.tensors.nbytes(name) for name in model.tensors}
    return sum(
        max(sum(map(pinned_bytes, _of_block(block.name, sizes))) for block in model.blocks) for sizes in (read, written)
    )


def _placed(needs: MemoryPlan, settings: PruneSettings, room: int) -> MemoryPlan:
    device, out = needs.device, settings.out
    host = usable_host()
    if room < needs.block + needs.work:
        raise SpenseError(
            f"{device}: {room / GIB:.2f} GiB of memory usable, one block needs {(needs.block + needs.work) / GIB:.2f} "
            "GiB; smaller --batch-tokens or --length may help"
        )
    # Wherever activations are.
    if room < needs.gradients:
        raise SpenseError(
            f"{device}: {room / GIB:.2f} GiB of memory usable, embeddings and output head need "
            f"{needs.gradients / GIB:.2f} GiB for the gradients that --tune-loss fisher weighs channels by; "
            "--tune-loss relative needs none"
        )
    places = list(Place) if settings.activations == AUTO else [Place(settings.activations)]
    for place in places:
        plan = replace(needs, place=place)
        fits = plan.on_device <= room and (device.type == "cpu" or plan.host <= host)
        if place is Place.DISK or fits or len(places) == 1:
            break
    require_disk_space(out, plan.on_disk)
    return plan


def whole_memory(device: torch.device) -> int:
    """Bytes of memory that one rank may count on where nothing else is in it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * USABLE)
    return int(psutil.virtual_memory().total * USABLE) // distributed.on_this_machine()


def usable_host() -> int:
    """Bytes of host memory that a plan of one rank may count on."""
    return int(psutil.virtual_memory().available * USABLE) // distributed.on_this_machine()


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that nobody uses. What an earlier run of this process left in torch's cache counts as free."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def require_room_to_write(needed: int, room: int, device: torch.device) -> None:
    """Raises SpenseError where a device has fewer usable bytes than the dense model needs while it writes text."""
    if room < needed:
        raise SpenseError(
            f"{device}: {room / GIB:.2f} GiB of memory usable, the dense model needs {needed / GIB:.2f} GiB while it "
            "writes the text of --calibration generated; --calibration builtin needs none of it, nor does text that it "
            "wrote elsewhere, as a .jsonl file"
        )


def require_disk_space(out: Path, needed: int) -> None:
    """Raises SpenseError when so many bytes will not fit where OUT should go."""
    place = Path(os.path.realpath(out))
    # What an unfinished run left is used again, or makes room.
    left = sum(file.stat().st_size for file in (place / PARTIAL).glob("*") if file.is_file())
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + left
    if free < needed:
        raise SpenseError(f"{place}: {free / GIB:.2f} GiB free, the run needs {needed / GIB:.2f} GiB")
