"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from command_line import penjing
from penjing import models
from penjing.cli import compress, main
from penjing.cli.inputs import Device, Inputs
from penjing.devices import artifact
from penjing.errors import PenjingError
from penjing.exploration import Budget
from penjing.models.renormalized import Renormalized
from penjing.recipe import load
from penjing.tasks.interval import Comparison, exact_bounds


def refused(result: CompletedProcess[str], *words: str) -> None:
    """One sentence on standard error that holds ``words``, exit code 2, nothing else."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    sentence = " ".join(result.stderr.split())
    for word in words:
        assert word in sentence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of two kinds of stripes, 16×16 RGB."""
    root = tmp_path_factory.mktemp("stripes")
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 20)):
        for axis, kind in enumerate(("across", "down")):
            target = root / part / kind
            target.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 100, (16, 16, 3)).astype(np.uint8)
                pixels.swapaxes(0, axis)[::4] += 150
                Image.fromarray(pixels).save(target / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A user's own model file."""
    file = tmp_path_factory.mktemp("models") / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def net(num_classes=2):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8),\n"
        "        nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "        nn.Flatten(), nn.Linear(16, num_classes))\n"
    )
    return f"{file}:net"


INPUT = ("--image-size", "16", "--mean", "0.4,0.4,0.4", "--std", "0.3,0.3,0.3")


@pytest.fixture(scope="module")
def weights(folder: Path, factory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("weights") / "net.safetensors"
    options = ("--epochs", "8", "--batch-size", "16", "--lr", "0.05", "--json")
    result = penjing("train", factory, "--data", folder, *INPUT, *options, "-o", target)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["test_score"] > 0.9
    return target


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom penjing.cli import main\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(main.app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'optuna', 'plotly', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_profile_prints_one_json_document() -> None:
    result = penjing("profile", "torchvision:alexnet", "penjing:lenet5", "--json")
    assert result.returncode == 0, result.stderr
    alexnet, lenet = json.loads(result.stdout)
    assert (alexnet["params"], lenet["params"]) == (61_100_840, 431_080)
    assert lenet["kinds"]["conv"]["params"] == 20 * 26 + 50 * 501
    assert lenet["kinds"]["linear"]["macs"] == 800 * 500 + 500 * 10


def test_recipes_are_listed_and_printed(tmp_path: Path) -> None:
    result = penjing("recipes", "--json")
    names = [recipe["name"] for recipe in json.loads(result.stdout)]
    assert {"int8", "smallest"} <= set(names)
    listed = penjing("recipes").stdout
    assert all(name in listed for name in names)
    (tmp_path / "mine.yaml").write_text(penjing("recipes", "smallest").stdout)
    assert load(tmp_path / "mine.yaml").to_dict() == load("smallest").to_dict()
    refused(penjing("recipes", "int9"), "int9", "int8", "smallest")


def test_compress_pack_unpack_bench(
    folder: Path, factory: str, weights: Path, tmp_path: Path
) -> None:
    source = ("--weights", weights, "--data", folder, *INPUT)
    result = penjing(
        "compress", factory, *source, "--recipe", "int8", "-o", tmp_path / "out", "--json"
    )
    assert result.returncode == 0, result.stderr
    card = json.loads(result.stdout)
    assert card["onnx_bytes"] == (tmp_path / "out" / "model.onnx").stat().st_size
    assert card["packed_bytes"] == (tmp_path / "out" / "model.penjing").stat().st_size

    result = penjing("unpack", tmp_path / "out" / "model.penjing", tmp_path / "again.onnx")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out/model.onnx").read_bytes()

    packed = tmp_path / "out" / "model.penjing"
    contents = json.loads(penjing("inspect", packed, "--json").stdout)
    assert contents["total_bytes"] == packed.stat().st_size
    assert contents["checksum_ok"]
    assert f"{contents['total_bytes']:,} bytes" in penjing("inspect", packed).stdout

    result = penjing("bench", tmp_path / "again.onnx", "--runs", 20, "--json")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)
    assert 0 < row["latency_p10_ms"] <= row["latency_ms"] <= row["latency_p90_ms"]


def test_what_is_not_as_asked_is_said(
    folder: Path, factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = artifact.build

    def with_note(*inputs: Any, **options: Any) -> artifact.Card:
        card = build(*inputs, **options)
        return card.model_copy(update={"notes": [f"{card.name}: 1 of 2 convolutions in float32"]})

    monkeypatch.setattr(artifact, "build", with_note)
    command = ["compress", factory, "--data", folder, *INPUT, "--recipe", "int8", "-o", tmp_path]
    result = CliRunner().invoke(main.app, [*map(str, command), "--json"])
    assert result.exit_code == 0, result.output
    assert "note: int8: 1 of 2 convolutions in float32" in result.stderr.splitlines()
    assert "notes" in json.loads(result.stdout)


def test_explore_leaves_a_whole_study_and_goes_on(
    folder: Path, factory: str, weights: Path, tmp_path: Path
) -> None:
    command = ("explore", factory, "--weights", weights, "--data", folder, *INPUT)
    result = penjing(*command, "--max-drop", "30%", "--trials", "4", "-o", tmp_path, "--json")
    assert result.returncode == 0, result.stderr
    study = json.loads(result.stdout)
    assert study == json.loads((tmp_path / "frontier.json").read_text())
    assert {"model.onnx", "model.penjing", "card.json"} <= {
        file.name for file in (tmp_path / "best").iterdir()
    }
    assert (tmp_path / "report.html").stat().st_size > 1000
    by_name = {point["name"]: point for point in study["points"]}
    for name in study["frontier"]:
        assert by_name[name]["test_score"] is not None
        artifact = tmp_path / by_name[name]["folder"]
        assert (artifact / "model.penjing").stat().st_size == by_name[name]["packed_bytes"]
    count = len(study["points"])
    again = json.loads(
        penjing(*command, "--max-drop", "30%", "--trials", "5", "-o", tmp_path, "--json").stdout
    )
    assert len(again["points"]) > count
    assert again["elapsed_s"] >= study["elapsed_s"]
    missed = penjing(*command, "--max-size", "100B", "--trials", "5", "-o", tmp_path)
    assert missed.returncode == 2
    assert "no point met the budget; the nearest is" in " ".join(missed.stderr.split())
    assert "Traceback" not in missed.stderr
    assert json.loads((tmp_path / "frontier.json").read_text())["best"] is None


def test_bad_input_is_one_sentence(
    folder: Path, factory: str, weights: Path, tmp_path: Path
) -> None:
    out = ("-o", tmp_path / "out")
    explore = ("explore", factory, "--data")
    refused(penjing(*explore, tmp_path / "nowhere", *INPUT, *out), "nowhere")
    refused(penjing(*explore, folder, *INPUT, "--max-size", "huge", *out), "huge", "size")
    refused(penjing(*explore, folder, "--mean", "a", *out), "--mean")
    refused(penjing("profile", "penjing:lenet5", "--image-size", "64y"), "64y", "height x width")
    refused(penjing("explore", "torchvision:resnet19", "--data", folder, *out), "resnet18")
    refused(penjing("explore", "nonsense", "--data", folder, *out), "nonsense", "torchvision:")
    wrong = ("--weights", weights, "--data", folder, *INPUT)
    refused(penjing("explore", "penjing:resnet20_cifar", *wrong, *out), "weight")
    (tmp_path / "file").write_text("not a folder")
    refused(penjing(*explore, folder, *INPUT, "-o", tmp_path / "file"), "cannot write", "file")
    (tmp_path / "broken.penjing").write_bytes(b"PENJING broken")
    refused(penjing("unpack", tmp_path / "broken.penjing"), "broken.penjing")
    refused(penjing("bench", tmp_path / "none.onnx"), "none.onnx")
    train = ("train", factory, "--data", folder, *INPUT, "-o", tmp_path / "w.safetensors")
    refused(penjing(*train, "--epochs", "0"), "--epochs must be greater than 0, found 0")
    refused(penjing(*train, "--lr", "nan"), "--lr must be a finite number, found nan")
    refused(penjing(*train, "--batch-size", "0"), "--batch-size must be greater than or equal to 1")
    compress = ("compress", factory, "--data", folder, *INPUT, *out)
    refused(penjing(*compress, "--max-drop", "0"), "drop must be a positive number", "'0'")
    refused(penjing("report", tmp_path), "frontier.json")


def test_bad_images_are_named(folder: Path, factory: str, tmp_path: Path) -> None:
    for kind in ("across", "down"):
        (tmp_path / "data" / "train" / kind).mkdir(parents=True)
    out = ("-o", tmp_path / "out", *INPUT)
    source = next((folder / "train" / "across").iterdir())
    for index in range(20):
        (tmp_path / f"data/train/across/{index}.png").write_bytes(source.read_bytes())
    refused(penjing("explore", factory, "--data", tmp_path / "data", *out), "down")
    (tmp_path / "data/train/down/torn.png").write_bytes(source.read_bytes()[:60])
    refused(penjing("explore", factory, "--data", tmp_path / "data", *out), "torn.png")


def test_a_model_with_another_number_of_classes_is_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "five.py"
    file.write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(768, 5))\n"
    )
    result = penjing("explore", f"{file}:net", "--data", folder, *INPUT, "-o", tmp_path / "out")
    refused(result, "5", "2", "train 108 images (across 5", "test 40 images (across 20, down 20)")


def test_weights_for_other_classes_are_trained_with_a_new_head_first(
    folder: Path, tmp_path: Path
) -> None:
    imagenet = models.load("penjing:resnet8", num_classes=100)
    torch.save({"state_dict": imagenet.state_dict(), "epoch": 9}, tmp_path / "imagenet.pth.tar")
    source = ("penjing:resnet8", "--data", folder, "--image-size", "16")
    words = (*source, "--weights", tmp_path / "imagenet.pth.tar")

    def run(*given: object) -> str:
        return CliRunner().invoke(main.app, [*map(str, given)], catch_exceptions=False).stderr

    with pytest.raises(PenjingError, match=r"weights for 100 classes .* have 2 .* penjing train"):
        run("compress", *words, "--max-size", "500KB", "-o", tmp_path / "out")
    trained = tmp_path / "trained.safetensors"
    told = run("train", *words, "--epochs", "1", "-o", trained)
    assert "made a new last layer (8): 100 classes before, 2 now" in told
    assert len(load_file(trained)["8.bias"]) == 2


def test_a_teacher_sees_its_own_images(
    folder: Path, factory: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its name, by what it was trained with, or, where it is the student's, as the student."""
    inputs = Inputs(model="penjing:resnet8", data=str(folder), image_size="24", device=Device.CPU)
    _, task = inputs.load()
    other = models.load("torchvision:squeezenet1_1", num_classes=2).state_dict()
    torch.save(other, tmp_path / "large.pt")
    for spec, file, size in (
        ("torchvision:squeezenet1_1", tmp_path / "large.pt", 224),
        (factory, weights, 16),
        (factory, None, None),
        ("penjing:resnet8", None, None),
    ):
        capsys.readouterr()
        teacher = inputs.teacher(task, spec, file)
        said = capsys.readouterr().err
        assert isinstance(teacher, Renormalized) == (size is not None)
        assert (f"the teacher sees {size} x {size} pixels" in said) == (size is not None)
        assert teacher(task.example).shape == (1, 2)


def test_the_version_is_told() -> None:
    result = penjing("--version")
    assert result.stdout.split() == ["penjing", version("penjing")]


def test_completion_is_offered() -> None:
    # No shell is above this process for Typer to find: name it.
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    result = penjing("--show-completion", "bash", env=named)
    assert result.returncode == 0
    assert "complete " in result.stdout


def test_threads_device_and_seed_are_stated_and_used(
    folder: Path, factory: str, weights: Path, tmp_path: Path
) -> None:
    source = ("--weights", weights, "--data", folder, *INPUT)
    machine = ("--threads", 2, "--seed", 3, "--device", "cpu")
    result = penjing(
        "compress", factory, *source, *machine, "--recipe", "int8", "-o", tmp_path, "--json"
    )
    assert result.returncode == 0, result.stderr
    assert "on cpu, 2 threads, seed 3" in result.stderr
    assert json.loads(result.stdout)["threads"] == 2
    assert json.loads((tmp_path / "original" / "card.json").read_text())["threads"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none_is_one_sentence(
    folder: Path, factory: str, tmp_path: Path
) -> None:
    command = ("compress", factory, "--data", folder, *INPUT, "--recipe", "int8", "-o", tmp_path)
    refused(penjing(*command, "--device", "cuda"), "--device cuda", "--device cpu")


def test_ctrl_c_in_a_training_says_that_it_resumes(folder: Path, tmp_path: Path) -> None:
    """The user's own net presses Ctrl-C in its tenth step."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import os, signal, torch\n"
        "class Net(torch.nn.Linear):\n"
        "    steps = 0\n"
        "    def forward(self, x):\n"
        "        self.steps += self.training\n"
        "        if self.steps == 10 and os.environ.get('STOP'):\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        return super().forward(x.flatten(1))\n"
        "def net():\n    return Net(768, 2)\n"
    )
    command = ("train", f"{file}:net", "--data", folder, *INPUT, "--batch-size", "8", "--epochs", 1)
    result = penjing(*command, "-o", tmp_path / "w.safetensors", env={"STOP": "1"})
    assert result.returncode == 130, result.stderr
    assert result.stderr.splitlines()[-1] == "penjing: stopped; the same command resumes"
    assert "Traceback" not in result.stderr
    assert (tmp_path / "w.checkpoint").exists()
    assert penjing(*command, "-o", tmp_path / "w.safetensors").returncode == 0
    assert (tmp_path / "w.safetensors").exists() and not (tmp_path / "w.checkpoint").exists()


def card_of(lost: int, gained: int, images: int) -> artifact.Card:
    low, high = exact_bounds(lost, gained, images)
    drop = (lost - gained) / images
    compared = Comparison(
        images=images, drop=drop, drop_low=low, drop_high=high, lost=lost, gained=gained
    )
    figures = {"packed_bytes": 1000, "latency_ms": 1.0}
    return artifact.Card.model_construct(**(compared.model_dump() | figures))


def test_a_file_that_misses_what_was_asked_for_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """32 points lost on many images; one image of fifty; none of a thousand."""
    compress._judge(card_of(0, 0, 1000), Budget(drop="1%"))
    compress._judge(card_of(0, 0, 1000), Budget(size="1KB"))
    assert not capsys.readouterr().err
    with pytest.raises(PenjingError, match=r"loses 32\.00% \(.*1000 images\) of at most 1\.00%"):
        compress._judge(card_of(320, 0, 1000), Budget(drop="1%"))
    with pytest.raises(PenjingError, match=r"size 1\.0 KB of at most 0\.9 KB"):
        compress._judge(card_of(0, 0, 1000), Budget(size="0.9KB"))
    compress._judge(card_of(0, 0, 50), Budget(drop="1%"))
    said = capsys.readouterr().err
    assert "cannot be told" in said and "about 299 validation images would tell" in said
