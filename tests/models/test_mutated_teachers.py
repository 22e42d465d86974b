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

"""
Teachers with something changed, drawn by seed: each is refused in the one message, or has the function that its files say. The whole of
it, in processes with limits, is `benchmarks/mutated_teachers.py`.
"""

import time

import pytest
from helpers.judging import Judge


SEEDS = range(60)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return Judge(tmp_path_factory.mktemp("mutated"))


@pytest.mark.parametrize("part", range(4))
def test_mutated_teachers_are_refused_in_the_one_message_or_right(judge, part):
    for seed in SEEDS[part::4]:
        start = time.perf_counter()
        verdict = judge(seed)
        assert verdict.is_right, (seed, verdict)
        assert verdict.seconds < 2 and time.perf_counter() - start < 10, (seed, verdict)
