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

"""Callbacks that count what is handed over to be reduced over the processes, by update."""

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback


class CountReducedBytes(TrainerCallback):
    """Where DDP hands its buckets over. Its trainer is to be set."""

    def __init__(self):
        self.trainer = None
        self.bytes = [0]

    def on_train_begin(self, args, state, control, **kwargs):
        def hook(group, bucket):
            self.bytes[-1] += bucket.buffer().numel() * bucket.buffer().element_size()
            return allreduce_hook(group, bucket)

        self.trainer.model_wrapped.register_comm_hook(None, hook)

    def on_step_end(self, args, state, control, **kwargs):
        self.bytes.append(0)


class CountScatteredBytes(TrainerCallback):
    """Where FSDP2 hands its gradients over."""

    def __init__(self):
        self.bytes, self._reduce = [0], dist.reduce_scatter_single

    def on_train_begin(self, args, state, control, **kwargs):
        def counted(output, input, **options):
            self.bytes[-1] += input.numel() * input.element_size()
            return self._reduce(output, input, **options)

        dist.reduce_scatter_single = counted

    def on_step_end(self, args, state, control, **kwargs):
        self.bytes.append(0)

    def on_train_end(self, args, state, control, **kwargs):
        dist.reduce_scatter_single = self._reduce
