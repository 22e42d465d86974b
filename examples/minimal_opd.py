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
On-policy distillation on one page: two teachers, one student, one optimizer, and no Trainer.

    python examples/minimal_opd.py

It takes a minute on a laptop. `DiffusionOPDTrainer` computes the same gradient (a test compares the two) and adds what a
real run needs: several processes, mixed precision, checkpoints, evaluation, and checks before the first step.
"""

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from trl_diffusion_opd import VelocityField, sampler_table, step_weights, tiny, walk


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
TASKS = ("letters", "style")


def distil(
    field: VelocityField, model: PeftModel, task: str, prompts: list[str], noise: list[torch.Generator]
) -> float:
    """
    Walks the student's own trajectory once. At each step it adds the gradient of the KL from the teacher's transition to
    the student's (Eq. 12 of the paper).

    Args:
        field (`VelocityField`): asks the pipeline for velocities.
        model (`PeftModel`): the base with an adapter `student` and one for each task's teacher.
        task (`str`): whose teacher corrects the student.
        prompts (`list[str]`): prompts of this task.
        noise (`list[torch.Generator]`): one for each prompt. It draws the first latents.

    Returns:
        `float`: the loss, a mean over prompts, latents, steps and tasks.
    """
    table = sampler_table("ode", field.levels)
    weights = step_weights(table, field.levels, "kl")
    steps = len(table) - 1  # the last step is walked by nobody: it hardly changes the image
    losses = []

    def velocity(j: int, x: Tensor, z: Tensor | None) -> Tensor:
        level = float(table.levels[j])
        with torch.no_grad():
            model.set_adapter(task, inference_mode=True)  # without this mode the teacher would become trainable
            target = field(x, level, prompts, 1.0, model)
        model.set_adapter("student")
        student = field(x, level, prompts, 1.0, model)  # the forward that draws is the forward that learns
        loss = float(weights[j]) * (student - target).square().mean() / (steps * len(TASKS))
        loss.backward()  # at once: nothing of this step has to be kept
        losses.append(loss.item())
        return student.detach()

    walk(velocity, field.initial_latents(prompts, noise), table.head(steps))
    return sum(losses)


def main(updates: int = 60, batch: int = 8) -> None:
    torch.manual_seed(0)
    pipe = DiffusionPipeline.from_pretrained(tiny.BASE)
    size = {"height": 32, "width": 32, "max_sequence_length": 12}
    field = VelocityField(pipe, num_inference_steps=5, **size)
    lora = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=ATTENTION)
    model = get_peft_model(pipe.transformer, lora, adapter_name="student")
    for task in TASKS:
        model.load_adapter(tiny.TEACHERS[task], adapter_name=task)
    model.set_adapter("student")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    prompts = {task: [row["prompt"] for row in tiny.dataset("train") if row["task"] == task] for task in TASKS}

    for update in range(updates):
        numbers = range(update * batch, (update + 1) * batch)
        losses = {}
        for task in TASKS:
            noise = [torch.Generator().manual_seed(number) for number in numbers]
            chosen = [prompts[task][number % len(prompts[task])] for number in numbers]
            losses[task] = distil(field, model, task, chosen, noise)
        optimizer.step()
        optimizer.zero_grad()
        if update % 10 == 0:
            print(f"update {update}: " + ", ".join(f"{task} {loss:.2e}" for task, loss in losses.items()))

    model.save_pretrained("minimal_student", selected_adapters=["student"])
    for name, prompt in (("letters", 'the word "CJ"'), ("style", "a painting of a red ring and a blue square")):
        generator = torch.Generator().manual_seed(0)
        pipe(prompt, num_inference_steps=10, guidance_scale=1.0, generator=generator, **size).images[0].save(
            f"{name}.png"
        )


if __name__ == "__main__":
    main()
