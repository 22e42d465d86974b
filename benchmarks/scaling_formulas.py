# Copyright 2026 The trl-diffusion-opd Authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The formulas of scaling.py: from what scaling_shapes.py counts to bytes, seconds and bytes moved. Nothing is measured here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


# NVIDIA's data sheet of the H100 SXM (80 GB). The bfloat16 rate is without sparsity; NVLink is 900 GB/s both ways together.
RATE = 989e12
MEMORY = 80e9
NVLINK = 450e9
GPUS_A_NODE = 8
# Assumed: a network card of 400 Gbit/s for each GPU.
NETWORK = 50e9
# Assumed: the share of a link's bytes a second that a collective gets.
LINK_SHARE = 0.8
# Assumed: model FLOPs utilisation, as a target and as caution.
MFU = (0.45, 0.30)
# Assumed: what of the memory is for the CUDA context, NCCL, workspaces, and what the allocator loses.
RESERVE = 0.1

TEACHERS = 3
TASKS = 3
STEPS = 9  # trained of 10; the walk ends after the last trained one
SAMPLES = 72
# Which of the three teachers are guided: aesthetics and OCR are, GenEval is not.
GUIDED = (True, True, False)

BF16, FP32 = 2, 4
# Bytes a weight of the base. nf4: half a byte and a float32 constant a 64 weights; 8 bit: a byte (its row constants vanish).
BASE_BYTES = {"bf16": 2.0, "8 bit": 1.0, "4 bit (nf4)": 0.5 + 4 / 64}


@dataclass(frozen=True)
class Layout:
    """
    How a training is laid out.

    Attributes:
        gpus (`int`): N.
        shards (`int`): S, GPUs that share the base; 1 is DDP, or one GPU.
        checkpointing (`bool`)
        batch (`int`): B, samples a GPU and micro-batch.
        micro_batches (`int`): of each task in an update.
    """

    gpus: int
    shards: int
    checkpointing: bool
    batch: int
    micro_batches: int

    @property
    def samples(self) -> int:
        return TASKS * self.gpus * self.batch * self.micro_batches


# Memory


def activations(counted: Mapping[str, Any], side: int, batch: int, checkpointing: bool) -> float:
    """Bytes for `batch` samples, on the line through those counted for 1 and for 8."""
    sizes = counted["activations"][str(side)]["checkpointing" if checkpointing else "plain"]
    return float(sizes["1"] + (sizes["8"] - sizes["1"]) / 7 * (batch - 1))


def memory(
    counted: Mapping[str, Any], side: int, layout: Layout, base_bytes: float = BASE_BYTES["bf16"]
) -> dict[str, float]:
    """Bytes on a GPU by part: encoders and VAE are not there (`offload_encoders`)."""
    n, s = counted["parameters"], layout.shards
    lora = n["lora"]
    adapters = FP32 * lora + TEACHERS * BF16 * lora  # the student's and the teachers'
    parts = {
        "base": base_bytes * n["base"] / s,
        "buffers": float(BF16 * n["buffers"]),
        "adapters": adapters / s,
        "gradients": float(FP32 * lora),  # whole until the update's last backward, also under FSDP2
        "optimizer": 2 * FP32 * lora / s,
        "moving average": FP32 * lora / s,
        "activations": activations(counted, side, layout.batch, layout.checkpointing),
    }
    if s > 1:
        root = n["base"] - n["blocks"]
        of_block = base_bytes * n["largest_block"] + adapters / n["number_of_blocks"]
        parts["gathered"] = base_bytes * root + 2 * of_block
        parts["gradients"] += FP32 * lora / s
    elif layout.gpus > 1:
        parts["gradients"] += FP32 * lora  # DDP's buckets
    return parts


def fits(parts: Mapping[str, float]) -> bool:
    return sum(parts.values()) <= (1 - RESERVE) * MEMORY


# Operations


def teacher_rows(counted: Mapping[str, Any]) -> list[int]:
    """Rows of a sample in the forwards of each task's teacher."""
    guided = counted["rows"] * counted["calls"]
    return [guided if is_guided else 1 for is_guided in GUIDED]


def sample_flops(counted: Mapping[str, Any], side: int, checkpointing: bool, passes: int = 1) -> float:
    """
    Operations for a sample in an update, the mean over tasks.

    A trained step is a forward of the teacher, one of the student and its backward; checkpointing repeats the student's
    forward; the three passes of published loops have one more, without gradients, for the rollout.
    """
    f, rows = counted["flops"][str(side)], counted["rows"] * counted["calls"]
    teacher = sum(teacher_rows(counted)) / TASKS * f["forward"]
    student = rows * (f["forward"] + f["backward"] + checkpointing * f["recompute"])
    rollout = rows * f["forward"] if passes == 3 else 0.0
    return STEPS * (teacher + student + rollout)


def compute_seconds(counted: Mapping[str, Any], side: int, layout: Layout, mfu: float) -> float:
    per_gpu = layout.samples / layout.gpus * sample_flops(counted, side, layout.checkpointing)
    return per_gpu / (RATE * mfu)


# Communication


def link(gpus: int) -> float:
    """
    Bytes a second of a collective's ring into a GPU. Between nodes a ring goes through all network cards of a node, each with
    its part of the data: what a node's NVLink could do a GPU, limited by a card a GPU times the GPUs of a node.
    """
    return LINK_SHARE * (NVLINK if gpus <= GPUS_A_NODE else min(NVLINK, GPUS_A_NODE * NETWORK))


def ddp_bytes(counted: Mapping[str, Any], gpus: int) -> float:
    """Bytes that a GPU sends in an update: the ring's all-reduce of the gradients. Buffers are not broadcast."""
    return 2 * (gpus - 1) / gpus * FP32 * counted["parameters"]["lora"]


def gathers(counted: Mapping[str, Any], reshard: bool = True) -> float:
    """
    How often FSDP2 gathers all blocks in a trained step, the mean over tasks: in each call of the teacher and of the
    student, and for each of the student's again in the backward. Without `reshard_after_forward` in the teacher's first,
    and in the backward of each of the student's but one, since a block is split again after its first backward.
    """
    calls = counted["calls"]
    if not reshard:
        return float(calls)
    teacher = sum(calls if is_guided else 1 for is_guided in GUIDED) / TASKS
    return teacher + 2 * calls


def gathered_bytes(counted: Mapping[str, Any]) -> float:
    """Bytes of all blocks with their adapters, as they are gathered: the student's LoRA in float32."""
    n = counted["parameters"]
    return BF16 * n["blocks"] + (FP32 + TEACHERS * BF16) * n["lora"]


def gather_seconds(counted: Mapping[str, Any], shards: int) -> float:
    return gathered_bytes(counted) * (shards - 1) / shards / link(shards)


def update_gather_bytes(counted: Mapping[str, Any], layout: Layout, reshard: bool = True) -> float:
    """Bytes that a GPU receives in an update's gathers."""
    share = (layout.shards - 1) / layout.shards
    return TASKS * layout.micro_batches * STEPS * gathers(counted, reshard) * gathered_bytes(counted) * share


def call_seconds(counted: Mapping[str, Any], side: int, batch: int, mfu: float) -> float:
    """Of the shortest forward that a gather has to hide behind: a teacher's without guidance."""
    return batch * counted["flops"][str(side)]["forward"] / (RATE * mfu)


def hiding_batch(counted: Mapping[str, Any], side: int, shards: int, mfu: float) -> int:
    """The smallest batch a GPU whose forward takes as long as a gather."""
    return math.ceil(gather_seconds(counted, shards) / call_seconds(counted, side, 1, mfu))


def exposed_seconds(counted: Mapping[str, Any], side: int, layout: Layout, mfu: float) -> float:
    """What communication adds to an update: DDP's all of it, FSDP2's gathers where they take longer than their forwards."""
    across = LINK_SHARE * (
        NVLINK if layout.gpus <= GPUS_A_NODE else NETWORK
    )  # as if each GPU's ran through its own card
    if layout.shards == 1:
        return ddp_bytes(counted, layout.gpus) / across
    flops, rows, calls = counted["flops"][str(side)], counted["rows"], counted["calls"]
    gather, scale = gather_seconds(counted, layout.shards), layout.batch / (RATE * mfu)
    forward, backward = flops["forward"], flops["backward"] + layout.checkpointing * flops["recompute"]

    def late(rows: int, work: float) -> float:
        return max(0.0, gather - rows * work * scale)

    teachers = sum(calls * late(rows, forward) if is_guided else late(1, forward) for is_guided in GUIDED) / TASKS
    step = teachers + calls * (late(rows, forward) + late(rows, backward))
    reduced = FP32 * counted["parameters"]["lora"]
    replicas = layout.gpus // layout.shards
    reduction = reduced * (layout.shards - 1) / layout.shards / link(layout.shards)
    reduction += 2 * (replicas - 1) / replicas * reduced / layout.shards / (LINK_SHARE * NETWORK)
    return TASKS * layout.micro_batches * STEPS * step + reduction


# Choice


def layouts(counted: Mapping[str, Any], side: int, gpus: int, shards: int, checkpointing: bool) -> Layout | None:
    """
    The paper's 72 samples an update, 24 a task, where GPUs divide them, and else one sample a GPU and task; with the largest
    batch that fits and divides what a GPU has of a task.
    """
    of_task = max(1, SAMPLES // TASKS // gpus)
    for batch in range(of_task, 0, -1):
        if of_task % batch == 0:
            layout = Layout(gpus, shards, checkpointing, batch, of_task // batch)
            if fits(memory(counted, side, layout)):
                return layout
    return None
