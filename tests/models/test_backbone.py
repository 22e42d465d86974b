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

import copy

import pytest
import torch
from helpers.teachers_helpers import make_student
from helpers.tiny_sd3 import forward, make_lora, make_pipeline

from trl_diffusion_opd.models.backbone import BASE, STUDENT, Backbone
from trl_diffusion_opd.models.expert_teachers import read_lora
from trl_diffusion_opd.models.old_policy import OLD, OldPolicy
from trl_diffusion_opd.models.teacher_config import parse_teacher


def output(backbone, role):
    with torch.no_grad(), backbone.use(role) as network:
        return forward(network)


def whole_student(pipeline):
    """A student of full weights that has moved away from its base."""
    student = pipeline.transformer.requires_grad_(True)
    return student, lambda: [p.data.add_(0.01) for p in student.parameters()]


def lora_student(pipeline):
    student = make_student(pipeline)
    return student, lambda: [p.data.add_(0.1) for p in student.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", [lora_student, whole_student])
def test_every_role_computes_as_itself(kind, tmp_path):
    pipeline = make_pipeline()
    base = forward(pipeline.transformer)
    teacher = forward(make_lora(make_pipeline(), tmp_path, seed=1))
    student, move = kind(pipeline)
    config, weights, _ = read_lora(make_pipeline(), parse_teacher(str(tmp_path)))
    backbone = Backbone.of(student)
    backbone.add_adapter("teacher_0", config, weights)
    OldPolicy(backbone, student)
    before = output(backbone, STUDENT)
    move()
    for _ in range(2):  # also after all the others
        assert torch.equal(output(backbone, BASE), base)
        assert torch.allclose(output(backbone, "teacher_0"), teacher, atol=1e-6)
        assert torch.equal(output(backbone, OLD), before)
        assert not torch.equal(output(backbone, STUDENT), before)
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    frozen = [p for of_role in backbone.frozen().values() for p in of_role]
    assert trained and frozen and not any(p.requires_grad or id(p) in trained for p in frozen)
    assert len({id(p) for p in frozen}) == len(frozen)


def test_without_a_need_for_the_base_full_weights_have_no_copy_of_it():
    student = copy.deepcopy(make_pipeline().transformer)
    backbone = Backbone.of(student, with_base=False)
    assert backbone.networks() == [] and backbone.frozen() == {}
    OldPolicy(backbone, student)
    assert [*backbone.frozen()] == [OLD] and len(backbone.networks()) == 1
