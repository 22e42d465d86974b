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

"""What of a run goes to the Hub, and how."""

import glob
import json
import logging
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME
from huggingface_hub import CommitInfo, get_token, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress, hf_api

from ..guards.redaction import last_part, public_value, shown
from ..models.student import public_name
from .errors import ERRORS, http_reason, retried


if TYPE_CHECKING:
    from ..trainer.base_config import DiffusionConfig
    from ..trainer.base_trainer import DiffusionTrainer

logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "training_args.json"
CARD_FILE = "README.md"
REPORT_FILE = "retention.json"

LORA_FILES = ("adapter_config.json", "pytorch_lora_weights.safetensors")
# What a saved student consists of, which a checkpoint has as well.
STUDENT_FILES = (
    *LORA_FILES,
    "adapter_model.safetensors",
    "config.json",
    "diffusion_pytorch_model*.safetensors",
    SAFE_WEIGHTS_INDEX_NAME,
    ARGUMENTS_FILE,
    "teacher_manifest.json",
    "noise_grid.json",
)
PICTURES = ("retention.png", "radar.png", "samples.png", "curves.png")
# Everything that is pushed. Not by exclusion: logs, optimizer states and whatever else lies in the folder may hold
# tokens, paths and the name of the machine.
PUSHED_FILES = (*STUDENT_FILES, CARD_FILE, REPORT_FILE, *PICTURES, "completions/step_*.png")

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
# They are paths even where they look like a Hub id: "outputs/demo".
_PATH_ARGUMENTS = (
    "output_dir",
    "logging_dir",
    "resume_from_checkpoint",
    "deepspeed",
    "fsdp_config",
    "prompt_cache_dir",
)


class PushError(RuntimeError):
    """A student that could not be uploaded, with where it lies and how to upload it."""


def write_arguments(args: Any, folder: str | Path) -> None:
    """
    Writes `training_args.json`: the arguments without tokens, and with local paths reduced to their last part.

    Args:
        args ([`~transformers.TrainingArguments`])
        folder (`str` or `Path`): an existing folder.
    """
    content = json.dumps(public_arguments(args), indent=2, sort_keys=True)
    (Path(folder) / ARGUMENTS_FILE).write_text(content + "\n", encoding="utf-8")


def public_arguments(args: Any) -> dict[str, Any]:
    """The arguments as JSON values, without tokens, and with local paths reduced to their last part."""
    arguments = args.to_dict()
    for name in _PATH_ARGUMENTS:
        if isinstance(arguments.get(name), str):
            arguments[name] = last_part(arguments[name])
    return public_value(arguments, known_tokens(args))


def known_tokens(args: Any) -> list[str]:
    """The tokens that this process uses, which must not be shown wherever they turn up."""
    return [token for token in (args.hub_token, get_token()) if token]


# Before the first step


def repository_id(args: "DiffusionConfig", user: str) -> str:
    """The repository that a run pushes to: `hub_model_id`, or the name of the output folder, of `user` if of nobody."""
    name = args.hub_model_id or last_part(args.output_dir or ".")
    return name if "/" in name else f"{user}/{name}"


def repository_problems(
    args: "DiffusionConfig", base_name: str | None, transformer_class: str | None, token: str | None = None
) -> list[str]:
    """
    What keeps a run from pushing, asked of the Hub before anything is trained: the token, the right to write, and what the
    repository holds. Nothing is made or changed there.

    Args:
        args ([`DiffusionConfig`])
        base_name (`str`, *optional*): the base's id or name, if it is known.
        transformer_class (`str`, *optional*): class of the student if all its weights are trained, `None` for a LoRA.
        token (`str`, *optional*): by default `hub_token` of the arguments, or the one you are logged in with.

    Returns:
        `list[str]`: a sentence or two each, with what to do.
    """
    token = token or args.hub_token or get_token()
    if token is None:
        return [
            "push_to_hub=True, and there is no token: log in with `hf auth login`, or set HF_TOKEN or hub_token to one with "
            "write permission (https://huggingface.co/settings/tokens)."
        ]
    try:
        return _repository_problems(args, token, base_name, transformer_class)
    except HFValidationError as error:
        return [f"push_to_hub=True: set hub_model_id to the name of a repository. {error}"]
    except ERRORS as error:
        return [f"push_to_hub=True: {http_reason(error)}."]


def _repository_problems(
    args: "DiffusionConfig", token: str, base_name: str | None, transformer_class: str | None
) -> list[str]:
    api = hf_api()
    account = retried(api.whoami, token)
    # A token of another kind (OAuth, fine-grained) has no role: the check below asks for its right to write.
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return [
            "push_to_hub=True: your token may only read. Make one with write permission on "
            "https://huggingface.co/settings/tokens and log in with it (`hf auth login`), or set HF_TOKEN or hub_token."
        ]
    repo_id = repository_id(args, account["name"])
    validate_repo_id(repo_id)
    owners = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    if repo_id.split("/")[0] not in owners:
        return [
            f"hub_model_id={repo_id!r}: it belongs to {repo_id.split('/')[0]!r}, and your token to {account['name']!r}, who "
            f"can push for {', '.join(owners)}. Choose one of them, or log in as its owner."
        ]
    try:
        info = retried(api.model_info, repo_id, token=token)
    except GatedRepoError:
        return [f"hub_model_id={repo_id!r}: the repository is gated and your token has no access to it."]
    except RepositoryNotFoundError:
        for kind in ("dataset", "space"):
            if retried(api.repo_exists, repo_id, repo_type=kind, token=token):
                return [f"hub_model_id={repo_id!r} is a {kind} on the Hub, not a model. Choose another name."]
        return []
    try:
        retried(api.auth_check, repo_id, token=token, write=True)
    except HfHubHTTPError as error:
        # A Hub of one's own may be older than this check: it then shows with the first push, which costs no checkpoint.
        if error.response.status_code in (401, 403):
            return [
                f"hub_model_id={repo_id!r}: your token is not allowed to write there "
                f"({error.response.status_code}). Give it write permission on https://huggingface.co/settings/tokens."
            ]
    names = {sibling.rfilename for sibling in info.siblings or []}
    recorded = info.card_data.get("base_model") if info.card_data else None
    found = _foreign_content(repo_id, token, names, recorded, base_name, transformer_class)
    return [f"hub_model_id={repo_id!r} holds {found}. Choose another name, or empty it."] if found else []


def _foreign_content(
    repo_id: str, token: str, names: set[str], recorded: Any, base_name: str | None, transformer_class: str | None
) -> str | None:
    """What a repository holds that this student would be mixed with, or overwrite."""
    if "model_index.json" in names:
        return "a whole pipeline"
    if names.intersection(LORA_FILES):
        if transformer_class is not None:
            return "a LoRA, and this run trains all weights"
        if recorded is None and "adapter_config.json" in names:
            recorded = _read_json(repo_id, token, "adapter_config.json").get("base_model_name_or_path")
        if isinstance(recorded, str) and base_name is not None and not _same_base(recorded, base_name):
            return f"a LoRA for another base, '{shown(recorded)}' (this run's is {base_name!r})"
        return None
    if "config.json" in names:
        config = _read_json(repo_id, token, "config.json")
        kind = config.get("_class_name") or (config.get("architectures") or [config.get("model_type")])[0]
        return (
            None
            if kind is not None and kind == transformer_class
            else f"another model ({shown(kind or 'of unknown class')})"
        )
    weights = sorted(name for name in names if "/" not in name and name.endswith(_WEIGHTS))
    return f"other weights ({', '.join(map(shown, weights[:3]))})" if weights else None


def _read_json(repo_id: str, token: str, name: str) -> dict[str, Any]:
    path = retried(hf_hub_download, repo_id, name, token=token)
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _same_base(one: str, two: str) -> bool:
    # A local copy is known by the name of its folder.
    if "/" in one and "/" in two:
        return one == two
    return one.split("/")[-1] == two.split("/")[-1]


def pushed_kind(pipeline: DiffusionPipeline, is_lora: bool) -> tuple[str | None, str | None]:
    """The base's name and the class of fully trained weights, which [`repository_problems`] compares."""
    kind = None if is_lora else type(pipeline.components.get("transformer")).__name__
    return public_name(pipeline.config.get("_name_or_path")), kind


def make_repository(trainer: "DiffusionTrainer", token: str | None = None, private: bool | None = None) -> None:
    """
    Makes the repository, and the branch `hub_revision` in it, if they are not there.

    Raises:
        [`PushError`]: if that is not possible.
    """
    args, api = trainer.args, hf_api()
    token = args.hub_token if token is None else token
    name = args.hub_model_id or last_part(args.output_dir or ".")
    try:
        url = retried(
            api.create_repo,
            name,
            token=token,
            private=args.hub_private_repo if private is None else private,
            exist_ok=True,
        )
        if args.hub_revision is not None and not args.hub_revision.startswith("refs/"):
            retried(api.create_branch, url.repo_id, branch=args.hub_revision, token=token, exist_ok=True)
    except ERRORS as error:
        raise PushError(f"The repository {name!r} cannot be made: {http_reason(error)}.") from error
    trainer.hub_model_id = url.repo_id
    trainer.push_in_progress = None


# Pushing


def push_folder(
    folder: str | Path,
    repo_id: str,
    commit_message: str = "Upload student",
    token: str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """
    Uploads what [`PUSHED_FILES`] names of an output folder to a model repository that exists.

    Args:
        folder (`str` or `Path`), repo_id (`str`)
        commit_message (`str`, *optional*, defaults to `"Upload student"`)
        token (`str`, *optional*): with write permission, by default the one you are logged in with.
        revision (`str`, *optional*): branch to commit to.
    """
    folder = Path(folder)
    names = [path.relative_to(folder).as_posix() for path in _matching(folder, PUSHED_FILES)]
    return retried(
        hf_api().upload_folder,
        repo_id=repo_id,
        folder_path=folder,
        # By name: in the Hub's patterns a star also matches slashes, and "*.png" whatever lies in a subfolder.
        allow_patterns=[glob.escape(name) for name in names],
        commit_message=commit_message,
        token=token,
        revision=revision,
    )


def push(
    trainer: "DiffusionTrainer",
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **kwargs: Any,
) -> Any:
    """
    Saves the student with its card and uploads what of the output folder [`PUSHED_FILES`] names.

    Call it on all processes.

    Args:
        trainer ([`DiffusionTrainer`])
        commit_message (`str`, *optional*, defaults to `"End of training"`)
        blocking (`bool`, *optional*, defaults to `True`): whether to return only when the upload is done.
        token (`str`, *optional*): with write permission, by default `hub_token` of the arguments.
        revision (`str`, *optional*): branch to commit to, by default `hub_revision` of the arguments.
        private (`bool`, *optional*): whether a repository that is made is private, by default `hub_private_repo`.
        kwargs: passed to `create_model_card`.

    Returns:
        The [`~huggingface_hub.CommitInfo`], or with `blocking=False` a future of it; `None` on other processes.

    Raises:
        [`PushError`]: if the upload fails; the student is saved by then.
    """
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    args = trainer.args
    token = args.hub_token if token is None else token
    if trainer.is_world_process_zero():
        trainer._finish_current_push()  # it reads the files that are written next
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    trainer.create_model_card(**kwargs)
    try:
        if trainer.hub_model_id is None:
            problems = repository_problems(args, *pushed_kind(trainer._pipeline, trainer.student.is_lora), token)
            if problems:
                raise PushError(" ".join(problems).rstrip("."))
            make_repository(trainer, token, private)
            trainer.create_model_card(**kwargs)  # which names the repository
        revision = revision or args.hub_revision
        parts = (args.output_dir or ".", trainer.hub_model_id, commit_message or "End of training", token, revision)
        if blocking:
            return push_folder(*parts)
    except (*ERRORS, PushError, ValueError) as error:
        raise PushError(_failure(trainer, error)) from error
    job = hf_api().run_as_future(push_folder, *parts)
    job.add_done_callback(lambda job: _report_failure(job, lambda error: _failure(trainer, error)))
    return job


def _failure(trainer: "DiffusionTrainer", error: BaseException) -> str:
    folder = trainer.args.output_dir or "."
    repo_id = trainer.hub_model_id or trainer.args.hub_model_id or last_part(folder)
    return (
        f"The student could not be pushed to {repo_id!r}: {http_reason(error)}. Nothing is lost, it is saved in {folder!r} "
        "with its card. Push it with trainer.push_to_hub(), or later with "
        f"`trl-diffusion-opd push {folder} {repo_id}`."
    )


def push_checkpoint(trainer: "DiffusionTrainer", checkpoint_folder: str | Path) -> None:
    """
    Uploads the student of a checkpoint in the background, as `hub_strategy` says.

    `"end"` uploads nothing here and `"every_save"` the student. `"checkpoint"` adds the whole checkpoint, with its
    optimizer state, as `last-checkpoint`, and `"all_checkpoints"` under its own name. While an upload is under way the next
    one is left out; with `hub_always_push` training waits for it. A failure is a warning: training goes on.
    """
    args = trainer.args
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    if trainer.push_in_progress is not None and not trainer.push_in_progress.is_done():
        if not args.hub_always_push:
            return
        trainer.push_in_progress.wait_until_done()  # it reads the files that are written next
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    # A copy, because saving again would gather sharded weights from all processes.
    for path in _matching(Path(checkpoint_folder), STUDENT_FILES):
        shutil.copy(path, Path(args.output_dir or ".") / path.name)
    if args.save_strategy == SaveStrategy.EPOCH:
        message = f"Training in progress, epoch {int(trainer.state.epoch or 0)}"
    else:
        message = f"Training in progress, step {trainer.state.global_step}"
    options = {"token": args.hub_token, "revision": args.hub_revision}
    run = hf_api().run_as_future  # one after another
    jobs = [run(push_folder, args.output_dir or ".", trainer.hub_model_id, message, **options)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        is_last = args.hub_strategy == HubStrategy.CHECKPOINT
        options |= {
            "repo_id": trainer.hub_model_id,
            "folder_path": checkpoint_folder,
            "path_in_repo": "last-checkpoint" if is_last else Path(checkpoint_folder).name,
            "commit_message": f"{message}, checkpoint",
        }
        jobs.append(run(retried, hf_api().upload_folder, **options))
    what = f"{trainer.hub_model_id!r} ({message[0].lower()}{message[1:]})"
    for job in jobs:
        job.add_done_callback(
            lambda job: _report_failure(
                job,
                lambda error: (
                    f"The push to {what} failed: {http_reason(error)}. Training goes on and its checkpoints are intact; the "
                    "next push brings everything."
                ),
            )
        )
    trainer.push_in_progress = PushInProgress(jobs)


def _report_failure(job: "Future[Any]", message: Any) -> None:
    # Nobody asks these futures for their result: without this a student would silently not be there.
    error = None if job.cancelled() else job.exception()
    if error is not None:
        logger.warning(message(error))


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
