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

"""What the trainer refuses before its first step, and with which words."""

import functools
import re
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from datasets import Dataset
from diffusers import DDIMScheduler, StableDiffusion3Pipeline
from helpers.opd_fixtures import make_config
from helpers.teachers_helpers import PEFT_FILE, rewrite
from helpers.tiny_sd3 import forward, make_lora, make_pipeline, make_transformer
from huggingface_hub.errors import RepositoryNotFoundError
from peft import IA3Config, LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainerCallback

from trl_diffusion_opd import DiffusionOPDTrainer, TeacherConfig


TASKS = ("count", "ocr", "style")
TRAIN = Dataset.from_dict({"prompt": ["one cat", "a sign", "dusk"], "task": list(TASKS)})


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers") / "good"
    make_lora(make_pipeline(), folder, seed=1)
    return folder


def make_args(tmp_path, **options):
    return make_config(tmp_path / "out", **options)


def make_trainer(tmp_path, model=None, teachers="base", train_dataset=TRAIN, options=None, **arguments):
    return DiffusionOPDTrainer(
        model=make_pipeline() if model is None else model,
        teachers=teachers,
        args=make_args(tmp_path, **(options or {})),
        train_dataset=train_dataset,
        **arguments,
    )


def refused(tmp_path, *messages, **arguments):
    """Asserts that a trainer doesn't start, with one bullet for each message and none besides."""
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, **arguments)
    head, *lines = str(error.value).splitlines()
    assert head == "DiffusionOPDTrainer cannot start:"
    bullets = [line for line in lines if not line.endswith(":")]  # a bullet that heads others
    assert len(bullets) == len(messages), bullets
    for line, message in zip(bullets, messages, strict=True):
        assert line.lstrip().startswith("- ") and message in line
    assert not (tmp_path / "out").exists()


# Teachers


def test_a_teacher_for_another_base(tmp_path):
    other = make_pipeline()
    other.transformer = make_transformer(num_attention_heads=4, caption_projection_dim=32)
    make_lora(other, tmp_path / "wide", seed=1)
    refused(
        tmp_path,
        "task 'ocr': wide: made for another base: transformer_blocks.0.attn.add_k_proj.lora_A.weight is (4, 32) in the "
        "file and (4, 16) here",
        teachers={"count": "base", "ocr": str(tmp_path / "wide"), "style": "base"},
    )


def test_no_teachers(tmp_path):
    refused(
        tmp_path,
        "teachers=None: name a teacher for every task, such as a folder, owner/repo or 'base'.",
        teachers=None,
    )


def drop_one(tensors):
    name = next(key for key in sorted(tensors) if "to_q.lora_B" in key)
    return {key: value for key, value in tensors.items() if key != name}


BROKEN = {
    "missing tensors": (
        drop_one,
        "its config asks for 1 tensors that the file lacks, such as transformer_blocks.0.attn.to_q.lora_B.weight",
    ),
    "all zero": (
        lambda tensors: {key: value * ("lora_B" not in key) for key, value in tensors.items()},
        "every lora_B of adapter_model.safetensors is zero, so this teacher is the base model. Was it saved before",
    ),
    "text encoder": (
        lambda tensors: {**tensors, "text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(2, 2)},
        "also adapts text encoders (text_encoder.layers.0.q_proj.lora_A.weight), which would be dropped",
    ),
}


@pytest.mark.parametrize("label", BROKEN)
def test_a_broken_teacher(tmp_path, label):
    change, message = BROKEN[label]
    make_lora(make_pipeline(), tmp_path / "broken", seed=1)
    rewrite(tmp_path / "broken" / PEFT_FILE, change)
    refused(tmp_path, message, teachers=str(tmp_path / "broken"), train_dataset=TRAIN.select([0]))


def test_pickled_weights_of_a_teacher(tmp_path):
    make_lora(make_pipeline(), tmp_path / "old", seed=1)
    (tmp_path / "old" / PEFT_FILE).rename(tmp_path / "old" / "adapter_model.bin")
    refused(
        tmp_path,
        "task 'ocr': old: holds adapter_model.bin but no adapter_model.safetensors. Pickled weights are not read",
        teachers={"count": "base", "ocr": str(tmp_path / "old"), "style": "base"},
    )


def test_a_task_without_a_teacher_and_a_teacher_without_prompts(tmp_path):
    refused(
        tmp_path,
        "no teacher for task 'ocr', 'style'; teachers are given for ['count', 'anatomy']",
        "no prompts for task 'anatomy'; the data has ['count', 'ocr', 'style']",
        teachers={"count": "base", "anatomy": "base"},
    )


def test_a_teachers_guidance_that_does_nothing(tmp_path):
    refused(
        tmp_path,
        "guidance_scale=0.5 does nothing: StableDiffusion3Pipeline gives its transformer 1 row(s) a prompt, as at 1.0",
        teachers=TeacherConfig("base", guidance_scale=0.5),
    )


# The Hub


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_a_teacher_that_cannot_be_reached(tmp_path, offline):
    refused(
        tmp_path,
        "task 'count': owner/nothing: no such folder here, not in the local cache, and the Hub cannot be reached. Download it once with",
        "task 'style': owner/nothing@v2: no such folder here, not in the local cache",
        teachers={"count": "owner/nothing/lora", "ocr": "base", "style": "owner/nothing@v2"},
    )


@pytest.mark.parametrize("exists", [False, None])
def test_a_base_that_cannot_be_reached(tmp_path, offline, monkeypatch, exists):
    if exists is False:
        error = RepositoryNotFoundError("404 Client Error: Repository Not Found", response=Mock(headers={}))
        monkeypatch.setattr("diffusers.pipelines.pipeline_utils.model_info", Mock(side_effect=error))
    reason = (
        "no such folder here, not in the local cache, and the Hub cannot be"
        if exists is None
        else "no such folder here and no such repo"
    )
    with pytest.raises(ValueError, match=f"The base model 'owner/nothing': {reason}"):
        make_trainer(tmp_path, model="owner/nothing")


def test_a_base_of_an_impossible_name(tmp_path):
    with pytest.raises(ValueError, match="The base model 'own er': neither an existing folder nor a valid repo"):
        make_trainer(tmp_path, model="own er")


def test_a_folder_that_holds_no_pipeline(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded.*it needs a model_index.json and .safetensors weights"):
        make_trainer(tmp_path, model=str(tmp_path / "empty"))


def test_a_base_with_pickled_weights(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "base")
    weights = tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="cannot be loaded.*no file named diffusion_pytorch_model.safetensors"):
        make_trainer(tmp_path, model=str(tmp_path / "base"))


def test_a_base_that_is_no_pipeline(tmp_path):
    with pytest.raises(
        ValueError, match="The model is a SD3Transformer2DModel; it must be a Hub id, a folder or a diff"
    ):
        make_trainer(tmp_path, model=make_transformer())


def test_options_for_loading_what_is_loaded(tmp_path):
    with pytest.raises(
        ValueError, match="model_init_kwargs and quantization_config are for a model that is given by name"
    ):
        make_trainer(tmp_path, options={"model_init_kwargs": {"variant": "fp16"}})


def test_code_from_the_hub(tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code would run code from the Hub and is refused"):
        make_args(tmp_path, model_init_kwargs={"trust_remote_code": True})


# The data


DATA = {
    "no prompt column": (
        TRAIN.rename_column("prompt", "caption"),
        "train_dataset has no column 'prompt'; its columns are ['caption', 'task']. Use rename_column('caption', 'prompt').",
    ),
    "empty prompts": (
        Dataset.from_dict({"prompt": ["a", " ", ""], "task": list(TASKS)}),
        "train_dataset has 2 empty prompt(s), the first in row 1. Remove them.",
    ),
    "empty task": (
        Dataset.from_dict({"prompt": ["a", "b"], "task": ["ocr", None]}),
        "train_dataset has 1 row(s) without a task in 'task', the first is row 1.",
    ),
    "empty": (TRAIN.select([]), "train_dataset is empty."),
    "none": (None, "train_dataset is None; it must be a datasets.Dataset"),
    "list": (
        [{"prompt": "a"}],
        "since every update needs prompts of all tasks. Make one with Dataset.from_list([...]).",
    ),
    "stream": (
        TRAIN.to_iterable_dataset(),
        "train_dataset is a IterableDataset; it must be a datasets.Dataset, since every update needs prompts of all tasks.",
    ),
}


@pytest.mark.parametrize("label", DATA)
def test_training_data(tmp_path, label):
    dataset, message = DATA[label]
    refused(tmp_path, message, train_dataset=dataset)


def test_evaluation_data(tmp_path):
    refused(
        tmp_path,
        "easy has 1 empty prompt(s), the first in row 0.",
        "hard has prompts of tasks ['anatomy'], but train_dataset only has tasks ['count', 'ocr', 'style'].",
        "stream is a IterableDataset; it must be a datasets.Dataset, or a dict of them.",
        eval_dataset={
            "easy": Dataset.from_dict({"prompt": [""], "task": ["ocr"]}),
            "hard": Dataset.from_dict({"prompt": ["a hand"], "task": ["anatomy"]}),
            "good": TRAIN,
            "stream": TRAIN.to_iterable_dataset(),
        },
    )


def test_data_without_a_column_of_tasks(tmp_path):
    plain = TRAIN.remove_columns("task")
    refused(
        tmp_path,
        "train_dataset has no column 'task', but teachers is a dict for the tasks ['count', 'ocr']. Add the column, or "
        "name yours with task_column: there are ['prompt']. With one task, give teachers without a dict.",
        teachers={"count": "base", "ocr": "base"},
        train_dataset=plain,
        reward_funcs={"ocr": red},
    )
    refused(
        tmp_path,
        "eval_dataset has no column 'task' that names the task, as train_dataset has.",
        eval_dataset=plain,
    )
    make_trainer(tmp_path, teachers={"default": "base"}, train_dataset=plain, eval_dataset=plain)


@pytest.mark.parametrize("options", [{"eval_strategy": "steps", "eval_steps": 1}, {"eval_on_start": True}])
def test_evaluations_of_nothing(tmp_path, options):
    name, value = next(iter(options.items()))
    refused(
        tmp_path,
        f"{name}={value!r}: there are no prompts to evaluate. Give --eval_prompts (in Python, eval_dataset), or leave",
        options=options,
    )


def test_weights_of_unknown_tasks(tmp_path):
    refused(
        tmp_path,
        "task_weights has a weight for task 'anatomy', but no prompt in train_dataset has that task. Tasks found: "
        "['count', 'ocr', 'style'].",
        options={"task_weights": {"ocr": 2.0, "anatomy": 1.0}},
    )


# Rewards


def red(images, **kwargs):
    return [0.0 for _ in images]


def test_rewards(tmp_path):
    refused(
        tmp_path,
        "reward_funcs: no prompts for task 'anatomy'; the data has ['count', 'ocr', 'style'].",
        "reward_funcs: task 'ocr' has 'red' twice.",
        "reward_funcs: tasks 'ocr' and 'style' have two functions named 'red', which would share a metric. Rename one.",
        reward_funcs={"anatomy": red, "ocr": [red, red], "style": functools.partial(red)},
    )


def test_a_reward_that_returns_too_little(tmp_path):
    def lazy(images, **kwargs):
        return [0.0]

    trainer = make_trainer(
        tmp_path, reward_funcs=lazy, eval_dataset=TRAIN, options={"num_eval_images": 2, "num_inference_steps": 2}
    )
    with pytest.raises(
        ValueError,
        match="Reward function 'lazy' returned 1 values for 2 images. It must return one value for each image",
    ):
        trainer.evaluate()


# Options that don't fit each other, the tasks or the model


@pytest.mark.parametrize(("accumulation", "fit"), [(4, 6), (1, 3), (7, 9)])
def test_accumulation_that_is_no_multiple_of_the_tasks(tmp_path, accumulation, fit):
    refused(
        tmp_path,
        f"gradient_accumulation_steps={accumulation} is not a multiple of the 3 tasks (count, ocr, style), which all have "
        f"an equal part of an update. Use {fit}, or leave it unset.",
        options={"gradient_accumulation_steps": accumulation},
    )


def test_a_size_that_is_no_multiple_of_the_vaes_factor(tmp_path):
    factor = make_pipeline().image_processor.config.vae_scale_factor
    refused(
        tmp_path,
        f"height=17 is not a multiple of {factor}, the number of pixels per latent of StableDiffusion3Pipeline. Use 16.",
        f"width=1 is not a multiple of {factor}",
        options={"height": 17, "width": 1},
    )


CONFIGS = {
    "noise with ode": ({"noise_level": 0.7}, "noise_level=0.7 with sampler='ode', which has no noise: leave it unset"),
    "policy gradient with ode": (
        {"loss_type": "policy_gradient"},
        "loss_type='policy_gradient' needs a sampler with noise, but sampler='ode' with noise_level=None has none",
    ),
    "eta of cps": ({"sampler": "cps", "noise_level": 1.2}, "noise_level=1.2: cps takes 0 to 1."),
    "eta of ddim": ({"sampler": "ddim", "noise_level": 1.2}, "noise_level=1.2: ddim takes 0 to 1."),
}


@pytest.mark.parametrize("label", CONFIGS)
def test_options_that_contradict_each_other(tmp_path, label):
    options, message = CONFIGS[label]
    with pytest.raises(ValueError, match=re.escape(message)):
        make_args(tmp_path, **options)


def test_more_trained_steps_than_there_are(tmp_path):
    refused(
        tmp_path,
        "num_trained_timesteps=4: only 3 of the 4 steps can be trained, since skip_last_steps leaves out the last 1.",
        options={"num_trained_timesteps": 4},
    )


def test_steps_without_noise(tmp_path):
    refused(
        tmp_path,
        "Steps [3] of 4 (counted from 0) would be trained but add no noise",
        options={"sampler": "cps", "skip_last_steps": 0},
    )


class Unguided(StableDiffusion3Pipeline):
    """As distilled models are: the argument is there and does nothing."""

    @property
    def do_classifier_free_guidance(self):
        return False


@pytest.mark.parametrize("name", ["guidance_scale", "eval_guidance_scale", "teacher_guidance_scale"])
def test_a_guidance_scale_that_does_nothing(tmp_path, name):
    refused(
        tmp_path,
        "guidance_scale=4.5 does nothing: Unguided gives its transformer 1 row(s) a prompt, as at 1.0. Set guidance_scale",
        model=Unguided(**make_pipeline().components),
        options={name: 4.5},
    )


@pytest.mark.parametrize("option", ["skip_guidance_layers", "skip_layer_guidance_start"])
def test_options_that_depend_on_the_loops_index(tmp_path, option):
    refused(
        tmp_path,
        f"generation_kwargs: '{option}' depends on the step's index within the pipeline's loop, but training runs one",
        options={"generation_kwargs": {option: [1]}},
    )


def test_options_that_the_trainer_sets_or_nobody_knows(tmp_path):
    refused(
        tmp_path,
        "generation_kwargs: 'guidance_scale' is set by the trainer's own arguments. Remove it.",
        "generation_kwargs: StableDiffusion3Pipeline takes no 'strength'.",
        options={"generation_kwargs": {"guidance_scale": 2.0, "strength": 0.5}},
    )


def test_a_scheduler_of_another_kind_of_model(tmp_path):
    pipeline = make_pipeline()
    pipeline.scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    refused(
        tmp_path,
        "StableDiffusion3Pipeline is a flow-matching pipeline, but its scheduler is DDIMScheduler with "
        "prediction_type='epsilon'. Use the scheduler that the model was published with",
        model=pipeline,
    )


def test_a_pipeline_without_a_transformer(tmp_path):
    pipeline = make_pipeline()
    pipeline.transformer = None
    refused(
        tmp_path, "StableDiffusion3Pipeline has no transformer or unet: only text-to-image pipelines", model=pipeline
    )


def test_a_pipeline_that_carries_a_lora(tmp_path, lora):
    pipeline = make_pipeline()
    make_lora(pipeline, tmp_path / "diffusers", seed=1, format="diffusers")
    pipeline.load_lora_weights(str(tmp_path / "diffusers"))
    message = (
        "The pipeline already carries a LoRA, which would become part of the base. Remove it with pipe.unload_lora"
    )
    refused(tmp_path, message, model=pipeline)
    # What the message says helps.
    pipeline.fuse_lora()
    refused(tmp_path, message, model=pipeline)
    pipeline.unload_lora_weights()
    make_trainer(tmp_path, model=pipeline)


def test_an_offloaded_pipeline(tmp_path):
    pipeline = make_pipeline()
    add_hook_to_module(pipeline.vae, ModelHook())
    refused(tmp_path, "The pipeline is offloaded to the CPU; its hooks would move the model", model=pipeline)


def test_what_the_student_cannot_be(tmp_path, lora):
    refused(tmp_path, "peft_config='lora': use 'default', a LoraConfig, or None", peft_config="lora")
    refused(tmp_path, "peft_config is a IA3Config; the student can be a LoRA or full weights", peft_config=IA3Config())
    refused(tmp_path, "peft_config is a dict; the student can be a LoRA or full weights", peft_config={"r": 4})
    refused(tmp_path, "Target modules {'nothing'} not found", peft_config=LoraConfig(target_modules=["nothing"]))
    refused(
        tmp_path,
        "student_init names a LoRA to start from, but peft_config=None trains the full weights.",
        peft_config=None,
        options={"student_init": str(lora)},
    )


def test_a_student_that_starts_from_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(
        tmp_path, "empty: has no pytorch_lora_weights.safetensors.", options={"student_init": str(tmp_path / "empty")}
    )


# All of it


class Never(TrainerCallback):
    def on_init_end(self, *args, **kwargs):
        raise AssertionError("the trainer started")


@pytest.mark.parametrize("full", [False, True])
def test_one_message_lists_everything_and_the_pipeline_is_as_it_was(tmp_path, lora, full):
    make_lora(make_pipeline(), tmp_path / "broken", seed=1)
    rewrite(tmp_path / "broken" / PEFT_FILE, drop_one)
    pipeline = make_pipeline()
    before = forward(pipeline.transformer)
    arguments = dict(model=pipeline, callbacks=[Never()], peft_config=None if full else "default")
    refused(
        tmp_path,
        "eval_dataset has 1 empty prompt(s), the first in row 1.",
        "reward_funcs: no prompts for task 'anatomy'",
        "gradient_accumulation_steps=4 is not a multiple of the 3 tasks",
        "num_trained_timesteps=9: only 3 of the 4 steps can be trained",
        "task 'style': broken: its config asks for 1 tensors that the file lacks",
        teachers={"count": "base", "ocr": str(lora), "style": str(tmp_path / "broken")},
        eval_dataset=Dataset.from_dict({"prompt": ["a", ""], "task": ["ocr", "ocr"]}),
        reward_funcs={"anatomy": red},
        options={"gradient_accumulation_steps": 4, "num_trained_timesteps": 9},
        **arguments,
    )
    refused(
        tmp_path,
        "train_dataset has no column 'prompt'",
        "task 'style': broken: its config asks for 1 tensors that the file lacks",
        teachers={"count": "base", "ocr": str(lora), "style": str(tmp_path / "broken")},
        train_dataset=TRAIN.rename_column("prompt", "text"),
        **arguments,
    )
    # Nothing was trained, and nothing was left on the pipeline: with the mistakes mended it starts.
    assert torch.equal(forward(pipeline.transformer), before)
    assert not any(isinstance(module, BaseTunerLayer) for module in pipeline.transformer.modules())
    assert pipeline.get_list_adapters() == {}
    trainer = make_trainer(tmp_path, model=pipeline, peft_config=None if full else "default")
    assert torch.equal(forward(trainer.model), before)
