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
Checks that a pipeline is unmodified, as a base must be: exactly what its classes and configs say.

LoRAs, fused projections, caches and other hooks of diffusers change what the denoiser computes or which layers it
uses, and none of them is saved with a student. The problems found here name them and say how to undo them. Changes
that affect neither are accepted: gradient checkpointing, forward chunking, compiling in place, train mode, frozen
weights; and on the VAE slicing, tiling, fused projections and layerwise casting.
"""

import logging
from collections.abc import Iterator
from types import MethodType

from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.modeling_utils import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..guards.redaction import shown
from .experts import Experts


logger = logging.getLogger(__name__)

_LOAD_AGAIN = "Load the pipeline again without it."
# How the names of diffusers' hooks begin.
_OFFLOADING = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
_CASTING = ("layerwise_casting", "peft_autocast_disable")
_SPLITTING = ("cp_input", "cp_output")


def carries_lora(pipeline: DiffusionPipeline) -> bool:
    """Whether a component of the pipeline has adapter layers (LoRAs), active or not."""
    return any(isinstance(m, BaseTunerLayer) for network in _networks(pipeline) for m in network.modules())


def denoiser_problems(network: nn.Module, name: str = "transformer") -> list[str]:
    """
    Says why LoRAs would not work correctly on a denoiser, one sentence each. Nothing is changed.

    Args:
        network (`nn.Module`): a pipeline's denoiser, without LoRAs. It is compared with its config only if it is a
            diffusers model.
        name (`str`, *optional*): the pipeline's name for it, for messages.
    """
    if isinstance(network, Experts):
        return [problem for name, expert in network.each() for problem in denoiser_problems(expert, name)]
    if isinstance(network, OptimizedModule):
        return [
            f"The {name} is wrapped by torch.compile, which hides the names of its weights and inputs. Unwrap it: "
            f"pipe.{name} = pipe.{name}._orig_mod. torch_compile=True compiles the student and all teachers."
        ]
    if isinstance(network, (DataParallel, DistributedDataParallel)):
        return [
            f"The {name} is wrapped by {type(network).__name__}, which the trainer does itself. Unwrap it: "
            f"pipe.{name} = pipe.{name}.module."
        ]
    problems = _hook_problems(network, name)
    fused = [m for m in network.modules() if vars(m).get("fused_projections")]
    if fused:
        undo = f"Undo it with pipe.{name}.unfuse_qkv_projections()."
        if not all(isinstance(module, AttentionModuleMixin) for module in fused):
            undo = f"{_LOAD_AGAIN} (Unfusing leaves the fused layers in a {type(network).__name__}.)"
        problems.append(
            f"The {name}'s projections are fused (fuse_qkv_projections), so its attention would ignore the LoRAs "
            f"on to_q, to_k and to_v. {undo}"
        )
    elif any(vars(m).get("s1") is not None for m in network.modules()):
        problems.append(
            f"The {name}'s skip connections are scaled (enable_freeu), which is not saved. Undo it with "
            "pipe.disable_freeu()."
        )
    elif isinstance(network, ModelMixin):
        problems += _foreign_parts(network, name)
    return problems


def placement_problems(pipeline: DiffusionPipeline) -> list[str]:
    """Says why the components of a pipeline can't be moved to a device and stay there, one sentence each."""
    networks = list(_networks(pipeline))
    problems = []
    if any("_hf_hook" in vars(module) for network in networks for module in network.modules()):
        problems.append(
            "The pipeline is offloaded to the CPU; its hooks would move the model while it trains. Load it without "
            "enable_model_cpu_offload(), enable_sequential_cpu_offload() and a device_map of several devices; "
            "offload_encoders=True keeps its text encoders and VAE in host memory."
        )
    elif any(parameter.is_meta for network in networks for parameter in network.parameters()):
        problems.append(
            "The pipeline has weights that are not loaded (on the device 'meta'). Load all of them, without a "
            "device_map that leaves some on the disk."
        )
    if any(name.startswith(_OFFLOADING) for network in networks for name in _diffusers_hooks(network)):
        problems.append(
            "The pipeline is offloaded in groups (enable_group_offload); its hooks would move the model while it "
            f"trains. {_LOAD_AGAIN} offload_encoders=True keeps its text encoders and VAE in host memory."
        )
    return problems


def _networks(pipeline: DiffusionPipeline) -> Iterator[nn.Module]:
    return (component for component in pipeline.components.values() if isinstance(component, nn.Module))


def _diffusers_hooks(network: nn.Module) -> list[str]:
    """Names of diffusers' hooks on a network's modules. A module may have a registry without hooks."""
    registries = (vars(module).get("_diffusers_hook") for module in network.modules())
    return sorted({name for registry in registries if isinstance(registry, HookRegistry) for name in registry.hooks})


def _hook_problems(network: nn.Module, part: str) -> list[str]:
    problems = []
    names = [name for name in _diffusers_hooks(network) if not name.startswith(_OFFLOADING)]
    casting, splitting = ([n for n in names if n.startswith(kind)] for kind in (_CASTING, _SPLITTING))
    others = [name for name in names if name not in (*casting, *splitting)]
    if casting:
        problems.append(
            f"The {part}'s weights are cast layer by layer (enable_layerwise_casting), which rounds LoRAs too and "
            f"gives other gradients. {_LOAD_AGAIN} A quantization_config saves as much memory."
        )
    if splitting:
        problems.append(
            f"The {part} is split over processes (enable_parallelism: {', '.join(splitting)}). {_LOAD_AGAIN}"
        )
    if others:
        problems.append(
            f"The {part} has a cache or another hook of diffusers ({', '.join(others)}), which skips or changes "
            f"layers while it trains. What enable_cache(...) set, pipe.{part}.disable_cache() undoes; else: "
            f"{_LOAD_AGAIN[0].lower()}{_LOAD_AGAIN[1:]}"
        )
    hooked = [name or "itself" for name, module in network.named_modules() if _has_hooks(module)]
    if hooked:  # only a warning: hooks that just watch, such as those of wandb.watch(...), do no harm
        logger.warning(
            f"The {part} has forward or backward hooks (on {_some(hooked)}). They run for student and teachers "
            "alike but are not saved, so a student trained with a hook that changes values would miss it later. "
            "Remove a hook with .remove() of its handle."
        )
    replaced = [name or "itself" for name, module in network.named_modules() if _has_other_forward(module)]
    if replaced:
        problems.append(
            f"The {part}'s forward was replaced (of {_some(replaced)}), but a saved student would run with the "
            f"class's own. {_LOAD_AGAIN}"
        )
    return problems


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _has_other_forward(module: nn.Module) -> bool:
    """
    Whether a module's forward is not its class's own. Those of accelerate's and diffusers' hooks don't count: other
    problems name them.
    """
    own = vars(module)
    if "forward" not in own or "_hf_hook" in own or _diffusers_hooks(module):
        return False
    # Removed hooks leave the class's own forward as an attribute of the module.
    return not (isinstance(own["forward"], MethodType) and own["forward"].__func__ is type(module).forward)


def _foreign_parts(network: ModelMixin, part: str) -> list[str]:
    """Says in what a network differs from one that its config creates."""
    with init_empty_weights():
        plain = type(network).from_config(network.config)
    expected = dict(plain.named_modules())
    found = dict(network.named_modules())
    # A quantized layer's class is derived from the plain layer's.
    foreign = [name for name, m in found.items() if name not in expected or not isinstance(m, type(expected[name]))]
    # An optional part that is None is not a module.
    missing = [name for name in expected if name not in found]
    problems = []
    if any(name.endswith(".processor") for name in foreign):
        problems.append(
            f"The {part} carries an IP-adapter or other weights in its attention processors ({_some(foreign)}), "
            "which would become part of the base. Remove them with pipe.unload_ip_adapter()."
        )
    elif foreign or missing:
        named = f"has {_some(foreign)}" if foreign else f"lacks {_some(missing)}"
        problems.append(
            f"The {part} does not match its config: it {named}. A saved student could not be loaded on the "
            "original base. Load the pipeline again, or save it with a config that fits."
        )
    else:
        ours, theirs = _processors(found), _processors(expected)
        other = [name for name in ours if type(ours[name]) is not type(theirs[name])]
        if other:
            first = other[0]
            problems.append(
                f"The {part}'s attention processors were replaced ({_some(other)}: {type(ours[first]).__name__} "
                f"in place of {type(theirs[first]).__name__}), and processors are not saved. Undo it with "
                f"pipe.{part}.set_attn_processor({type(theirs[first]).__name__}()), or load the pipeline again."
            )
    return problems


def _processors(modules: dict[str, nn.Module]) -> dict[str, object]:
    """The attention processors of the modules that have one."""
    return {name: vars(module)["processor"] for name, module in modules.items() if "processor" in vars(module)}


def _some(names: list[str]) -> str:
    return shown(names[0]) if len(names) == 1 else f"{shown(names[0])} and {len(names) - 1} more"
