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

"""What a run shows in TensorBoard, Weights & Biases, Trackio, the console and its folder: the real trackers, offline."""

import io
import json
import socket
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch.distributed as dist
from helpers.launching import Forks
from helpers.opd_fixtures import make_dataset, make_teachers, make_trainer
from helpers.tiny_sd3 import make_pipeline
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from trl_diffusion_opd.guards.files import file_name
from trl_diffusion_opd.reporting import plots, trackers
from trl_diffusion_opd.reporting.completions import Beside, Completion, last_completions, log_completions
from trl_diffusion_opd.reporting.trackers import tensorboard_writers


UPDATES, EVERY = 4, 2
LOGGED = [0, 2, 4]  # the images: at the start and at evaluations
ROWS = [("count0", "count"), ("count1", "count"), ("count2", "count"), ("draw0", "draw")]
PLANTED = ("planted-host", "planted-user", "planted-folder", "hf_planted")


def brightness(images, **kwargs):
    return [float(np.asarray(image).mean()) for image in images]


def even(prompts, **kwargs):
    return [None if int(prompt[-1]) % 2 else 1.0 for prompt in prompts]


def reported_trainer(folder: Path, **options):
    return make_trainer(
        folder / "planted-folder" / "out",
        {task: str(folder / "planted-folder" / task) for task in ("count", "draw")},
        pipeline=str(folder / "planted-folder" / "base"),
        reward_funcs={"count": [brightness, even], "draw": brightness},
        eval_dataset=make_dataset(count=4, draw=1),
        max_steps=UPDATES,
        learning_rate=0.1,
        eval_strategy="steps",
        eval_steps=EVERY,
        log_completions=True,
        num_completions_to_print=3,
        model_init_kwargs={"token": "hf_planted"},
        hub_token="hf_planted",
        project="tiny",
        **options,
    )


def main(folder: Path) -> None:
    """Trains, and evaluates once more when the trackers have seen the end of training."""
    connect, outside = socket.socket.connect, []

    def watched(self, address):
        if isinstance(address, tuple) and not str(address[0]).startswith(("127.", "::1", "localhost")):
            outside.append(address)
        return connect(self, address)

    socket.socket.connect = watched
    socket.gethostname = lambda: "planted-host"
    trainer = reported_trainer(folder, report_to=["tensorboard", "wandb", "trackio"])
    dry_run = trainer.dry_run()
    trainer.train()
    trainer.evaluate()
    rank = trainer.accelerator.process_index
    if rank == 0:
        import trackio
        import wandb

        wandb.finish()
        trackio.finish()
    report = {"log": trainer.state.log_history, "outside": outside, "dry_run": dry_run}
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, processes: Forks) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("run")
    make_teachers(folder / "planted-folder")
    make_pipeline().save_pretrained(folder / "planted-folder" / "base")
    (folder / "wandb").mkdir()
    environment = {
        "USER": "planted-user",
        "LOGNAME": "planted-user",
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder / "wandb"),
        "WANDB_DATA_DIR": str(folder / "wandb-data"),
        "WANDB_CACHE_DIR": str(folder / "wandb-cache"),
        "WANDB_CONFIG_DIR": str(folder / "wandb-config"),
    }
    ended = processes.run(main, folder, environment=environment)
    assert [one.code for one in ended] == [0, 0], "".join(one.error[-3000:] for one in ended)
    reports = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    out = folder / "planted-folder" / "out"
    return SimpleNamespace(folder=folder, out=out, reports=reports, stdout=[one.output for one in ended])


def trackers_name(name: str) -> str:
    """A metric's name in trackers: timings of updates have a section of their own."""
    if name.startswith("eval_"):
        return f"eval/{name[5:]}"
    is_time = name in ("step_time", "generation_time") or name.startswith(("time/", "reward_time/"))
    return f"time/{name.removeprefix('time/')}" if is_time else f"train/{name}"


@pytest.fixture(scope="module")
def expected(run) -> dict[str, float]:
    """Every scalar of the log, by `(its name in trackers, update)`: the last one where there are several."""
    scalars = {}
    for entry in run.reports[0]["log"]:
        for name, value in entry.items():
            if name != "step":
                scalars[trackers_name(name), entry["step"]] = value
    assert {step for name, step in scalars if name == "train/kl/count"} == {1, 2, 3, 4}
    times = {name for name, _ in scalars if name.startswith("time/")}
    # Parts that do not occur in this run, such as the base's forwards, are not sent.
    assert {"time/step_time", "time/student"} <= times and not times & {"time/reference", "time/rollout"}
    assert {step for name, step in scalars if name == "eval/draw/brightness"} == {2, 4}
    return scalars


def read_table(run, step: int, tmp_path: Path) -> datasets.Dataset:
    path = str(run.out / "completions" / f"completions_{step:05d}.parquet")
    return datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path))


def pixels(image) -> np.ndarray:
    return np.asarray((Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image).convert("RGB"))


# The folder and the console


def test_parquet(run, tmp_path):
    tables = {step: read_table(run, step, tmp_path) for step in LOGGED}
    names = {path.name for path in (run.out / "completions").iterdir()}
    assert names == {f"completions_{s:05d}.parquet" for s in LOGGED} | {f"step_{s:06d}.png" for s in LOGGED} | {
        "last.json",
        *(f"sample_count_{n}.png" for n in (1, 2, 3)),
        "sample_draw_1.png",
    }
    for step, table in tables.items():
        assert table.column_names == ["step", "prompt", "task", "image", "brightness", "even"]
        # Of four images on two processes, and of one, none is there twice.
        assert list(zip(table["prompt"], table["task"], strict=True)) == ROWS
        assert set(table["step"]) == {step}
        assert table["even"] == [1.0, None, 1.0, None]  # and "draw" has no such reward
        assert table["brightness"] == brightness(table["image"])  # of these very images
    assert len(set(tables[0]["brightness"])) == 4
    assert all(a != b for a, b in zip(tables[0]["brightness"], tables[4]["brightness"], strict=True))


def test_images_are_those_of_one_process(run, tmp_path):
    trainer = reported_trainer(run.folder, report_to="none")
    data = trainer.eval_dataset
    alone = [
        image
        for task, rows in (("count", [0, 1, 2]), ("draw", [4]))
        for _, image in trainer.evaluator.draw(data, task, rows)
    ]
    for image, ours in zip(read_table(run, 0, tmp_path)["image"], alone, strict=True):
        assert np.abs(pixels(image).astype(int) - pixels(ours).astype(int)).max() <= 1


def test_console(run):
    first, second = run.stdout
    for step in LOGGED:
        assert first.count(f"Images at update {step} ") == 1
    assert first.count("count2") == len(LOGGED)
    assert "Images" not in second


def test_dry_run_on_two_processes(run):
    """What it shows is what one process shows, and what the trackers have has nothing of it."""
    alone = reported_trainer(run.folder, report_to="none", per_device_train_batch_size=4).dry_run()
    for rank, report in enumerate(run.reports):
        assert ("rewards" in report["dry_run"]["tasks"]["count"]) == (rank == 0)
        for task, figures in alone["tasks"].items():
            ours = report["dry_run"]["tasks"][task]
            for name in ("kl", "velocity_gap"):
                assert ours[name] == pytest.approx(figures[name], rel=1e-4)
            assert ours["teachers"][0]["gap_to_base"] == pytest.approx(figures["teachers"][0]["gap_to_base"], rel=1e-4)
    first, second = (report["dry_run"] for report in run.reports)
    assert first["seconds_per_update"] == second["seconds_per_update"]
    assert "first update" in run.stdout[0] and "first update" not in run.stdout[1]


def test_nothing_leaves_the_machine(run):
    assert [report["outside"] for report in run.reports] == [[], []]


# The trackers


def test_tensorboard(run, expected):
    (folder,) = (run.out / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()
    seen = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    assert seen.keys() == expected.keys()
    assert [seen[key] for key in expected] == pytest.approx(list(expected.values()), rel=1e-6)
    grids = events.Images("completions_grid")
    assert [event.step for event in grids] == LOGGED
    for step, event in zip(LOGGED, grids, strict=True):
        picture = run.out / "completions" / f"step_{step:06d}.png"
        assert (pixels(event.encoded_image_string) == pixels(picture.read_bytes())).all()
    texts = events.Tensors("completions/text_summary")
    assert [event.step for event in texts] == LOGGED
    lines = texts[0].tensor_proto.string_val[0].decode().splitlines()
    assert lines[:2] == ["| prompt | task | brightness | even |", "| --- | --- | ---: | ---: |"]
    assert [line.split(" | ")[:2] for line in lines[2:]] == [[f"| {prompt}", task] for prompt, task in ROWS]
    arguments = json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
    assert arguments["output_dir"] == "out" and arguments["learning_rate"] == 0.1


def test_trackio(run, expected, tmp_path):
    database = sqlite3.connect(run.folder / "trackio" / "tiny.db")
    rows = [
        (step, json.loads(text)) for step, text in database.execute("SELECT step, metrics FROM metrics ORDER BY id")
    ]
    assert all(metrics["train/global_step"] == step for step, metrics in rows)
    seen = {(name, step): value for step, metrics in rows for name, value in metrics.items()}
    scalars = {key: value for key, value in seen.items() if key[0] not in ("completions", "completions_grid")}
    assert {key for key in scalars if key[0] != "train/global_step"} == expected.keys()
    assert [scalars[key] for key in expected] == pytest.approx(list(expected.values()))
    # The evaluation after training is of the same run.
    assert database.execute("SELECT COUNT(DISTINCT run_id) FROM metrics").fetchone() == (1,)

    media = run.folder / "trackio" / "media"
    assert [step for name, step in seen if name == "completions"] == LOGGED
    for step in LOGGED:
        table, ours = seen["completions", step]["_value"], read_table(run, step, tmp_path)
        assert [list(row) for row in table] == [["prompt", "task", "image", "brightness", "even"]] * 4
        assert [(row["prompt"], row["task"]) for row in table] == ROWS
        assert [row["brightness"] for row in table] == ours["brightness"]
        for row, image in zip(table, ours["image"], strict=True):
            assert (pixels((media / row["image"]["file_path"]).read_bytes()) == pixels(image)).all()
        grid = (media / seen["completions_grid", step]["file_path"]).read_bytes()
        assert (pixels(grid) == pixels((run.out / "completions" / f"step_{step:06d}.png").read_bytes())).all()
    ((config,),) = database.execute("SELECT config FROM configs").fetchall()
    assert json.loads(config)["lora_r"] == 4 and json.loads(config)["output_dir"] == "out"


def wandb_records(path: Path) -> Iterator:
    """What wandb would sync: its file is a log in LevelDB's format with a header of its own."""
    from wandb.proto import wandb_internal_pb2

    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if left < 7 or kind == 0:
            position += left
            continue
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_wandb(run, expected, tmp_path):
    (folder,) = (run.folder / "wandb" / "wandb").glob("offline-run-*")
    records = list(wandb_records(next(folder.glob("run-*.wandb"))))
    seen, tables, grids = {}, {}, {}
    for record in records:
        if record.WhichOneof("record_type") != "history":
            continue
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        step = row["train/global_step"]
        if "completions/path" in row:
            tables[step], grids[step] = row["completions/path"], row["completions_grid/path"]
        else:
            seen |= {(name, step): value for name, value in row.items() if not name.startswith("_")}
    once = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}
    logged = {key: value for key, value in expected.items() if key[0].removeprefix("train/") not in once}
    assert {key for key in seen if key[0] != "train/global_step"} == logged.keys()
    assert [seen[key] for key in logged] == pytest.approx(list(logged.values()))
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert [metric.step_metric for metric in metrics if metric.glob_name == "*"] == ["train/global_step"]

    assert list(tables) == LOGGED
    for step in LOGGED:
        table, ours = json.loads((folder / "files" / tables[step]).read_text()), read_table(run, step, tmp_path)
        assert table["columns"] == ["prompt", "task", "image", "brightness", "even"]
        assert [tuple(row[:2]) for row in table["data"]] == ROWS
        assert [row[3] for row in table["data"]] == ours["brightness"]
        grid = (folder / "files" / grids[step]).read_bytes()
        assert (pixels(grid) == pixels((run.out / "completions" / f"step_{step:06d}.png").read_bytes())).all()
    # The table's images are in the artifact that wandb makes of it.
    stored = [pixels(path.read_bytes()) for path in (run.folder / "wandb-data").rglob("*") if is_png(path)]
    for image in read_table(run, 4, tmp_path)["image"]:
        assert any(np.array_equal(pixels(image), other) for other in stored)


def is_png(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:4] == b"\x89PNG"


def test_no_names_of_the_machine(run):
    shown = [*(run.out).rglob("*"), *(run.folder / "trackio").rglob("*"), *(run.folder / "wandb").rglob("*")]
    shown = [path for path in shown if path.is_file() and "logs" not in path.parts]  # wandb keeps its own log
    assert len(shown) > 20
    names = [*PLANTED, *([host] if len(host := socket.gethostname()) > 4 else [])]
    for path in shown:
        relative = str(path.relative_to(run.folder)).removeprefix("planted-folder")
        content = path.read_bytes()
        found = [name for name in names if name in relative or name.encode() in content]
        assert not found, (relative, found)


# The parts


def test_picture_has_base_and_teachers_beside_the_student(tmp_path, monkeypatch):
    drawn = []
    plot = plots.plot_samples
    monkeypatch.setattr(plots, "plot_samples", lambda rows, *a, **k: drawn.append((rows, k)) or plot(rows, *a, **k))
    colours = {"base, CFG 2": "red", "teacher, CFG 1": "lime"}
    beside = {name: Beside(Image.new("RGB", (16, 16), colour), {"x": 0.25}) for name, colour in colours.items()}
    blue = Image.new("RGB", (16, 16), "blue")
    rows = [
        Completion("long " * 400 + "\u202e", "a", blue, {"x": 0.5}, label="student, CFG 2", beside=beside),
        Completion("two", "b\n", blue, {}, beside={}),  # fewer models, and no rewards
    ]
    log_completions(rows, tmp_path, 12, [], [])
    ((first, second), options) = drawn[0]
    assert options == {"title": "update 12"} and first.reward == "x" and second.reward is None
    assert first.scores == {"base, CFG 2": 0.25, "teacher, CFG 1": 0.25, "student, CFG 2": 0.5}
    seen = pixels((tmp_path / "completions" / "step_000012.png").read_bytes()).reshape(-1, 3)
    areas = [int((seen == colour).all(-1).sum()) for colour in ([255, 0, 0], [0, 255, 0], [0, 0, 255])]
    assert areas[0] == pytest.approx(areas[1], rel=0.05) and areas[0] > 150**2
    assert areas[2] == pytest.approx(2 * areas[0], rel=0.05)
    assert last_completions(tmp_path)["samples"] == [
        {"task": "a", "prompt": rows[0].prompt, "file": "completions/sample_a_1.png"},
        {"task": "b\n", "prompt": "two", "file": f"completions/sample_{file_name(chr(98) + chr(10))}_1.png"},
    ]


def test_prompts_and_rewards_of_any_name(tmp_path, capsys):
    written = []
    callback = TensorBoardCallback(
        SimpleNamespace(add_image=lambda *a, **k: None, add_text=lambda name, text, step: written.append(text))
    )
    image = Image.new("RGB", (16, 16))
    rows = [
        Completion("a [red]b[/red] | c\nd", "t", image, {"image": 1.0, "x": None}),
        Completion("e", "u", image, {}),
    ]
    log_completions(rows, tmp_path, 12, [], tensorboard_writers([callback, TensorBoardCallback()]))  # one is not open
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "completions/*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert table["reward_image"] == [1.0, None] and table["x"] == [None, None]
    assert table["prompt"] == [row.prompt for row in rows]
    assert "[red]b[/red]" in capsys.readouterr().out
    assert written[0].splitlines()[2:] == ["| a \\[red\\]b\\[/red\\] \\| c d | t | 1.000 | - |", "| e | u | - | - |"]


def test_nothing_to_show(tmp_path):
    log_completions([], tmp_path, 12, [], [])
    assert list(tmp_path.iterdir()) == []


def test_only_the_own_callbacks_are_replaced():
    class Mine(TensorBoardCallback):
        pass

    callbacks = [Mine(), TrackioCallback(), TensorBoardCallback("writer"), WandbCallback()]
    kept = callbacks[0]
    trackers.use_public_trackers(callbacks)
    assert callbacks[0] is kept and callbacks[2].tb_writer == "writer"
    classes = (TrackioCallback, TensorBoardCallback, WandbCallback)
    for callback, parent in zip(callbacks[1:], classes, strict=True):
        assert isinstance(callback, parent) and type(callback).__module__ == trackers.__name__


def test_a_space_that_cannot_be_reached_does_not_stop_a_push(monkeypatch, caplog):
    callback = trackers._Trackio()
    response = SimpleNamespace(headers={}, request=None, status_code=500)
    error = HfHubHTTPError("500: down", response=response)

    def sync(**options):
        raise error

    monkeypatch.setattr(callback._trackio, "sync", sync)
    token = callback._trackio.context_vars.current_project.set("tiny")
    try:
        args = SimpleNamespace(
            trackio_static_space_id=None, project="tiny", hub_private_repo=None, trackio_bucket_id=None
        )
        callback.on_push_begin(args, SimpleNamespace(is_world_process_zero=True), None, model=None)
    finally:
        callback._trackio.context_vars.current_project.reset(token)
    assert "500: down" in caplog.text


def test_sections():
    logs = {
        "kl": 1,
        "time/student": 2,
        "step_time": 3,
        "reward_time/ocr": 4,
        "eval_reward_time/ocr": 5,
        "eval_kl/a": 6,
    }
    names = ["train/kl", "time/student", "time/step_time", "time/reward_time/ocr", "eval/reward_time/ocr", "eval/kl/a"]
    assert trackers.in_sections(logs) == dict(zip(names, range(1, 7), strict=True))


@pytest.mark.parametrize(("name", "folder"), [("three/teachers", "three%2Fteachers_"), (None, "")])
def test_the_run_folder_of_tensorboard_has_the_runs_name(tmp_path, name, folder):
    callback = trackers._TensorBoard()
    callback._init_summary_writer(SimpleNamespace(output_dir=str(tmp_path), run_name=name))
    callback.tb_writer.close()
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith(folder) and made.name.removeprefix(folder)[:3].isalpha()
