"""Recipes: YAML in and out, order, hashing, cache, and every ordered pair of techniques."""

from __future__ import annotations

import copy
import itertools
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from penjing import recipe as recipes
from penjing.errors import PenjingError
from penjing.recipe import Recipe, compress
from penjing.recipes import shipped
from penjing.targets.onnxruntime.export import export
from penjing.targets.onnxruntime.runtime import run
from penjing.tasks import Task, from_arrays
from penjing.techniques import techniques

SETTINGS = {
    "prune_channels": {"ratio": 0.3},
    "prune_weights": {"sparsity": 0.5},
    "factorize": {"ratio": 0.3},
    "share_weights": {"bits": 4},
    "quantize": {"weight_bits": 8, "activation_bits": 8, "calibration": 64},
    "compress_weights": {"distortion": 1e-6, "calibration": 64},
    "round_biases": {"bits": 8},
    "penalize_entropy": {"max_bytes": 3_000},
}
# What cannot be meant: the second would undo, or be undone by, the first.
REFUSED = {
    ("quantize", "prune_channels"),
    ("quantize", "factorize"),
    ("quantize", "share_weights"),
    ("share_weights", "prune_channels"),
    ("share_weights", "prune_weights"),
    ("share_weights", "factorize"),
    ("prune_weights", "factorize"),
    ("compress_weights", "prune_channels"),
    ("compress_weights", "factorize"),
    ("compress_weights", "share_weights"),
    ("compress_weights", "quantize"),
    ("share_weights", "compress_weights"),
    ("quantize", "compress_weights"),
    ("penalize_entropy", "prune_channels"),
    ("penalize_entropy", "factorize"),
    ("penalize_entropy", "share_weights"),
    ("penalize_entropy", "quantize"),
    ("penalize_entropy", "compress_weights"),
    ("share_weights", "penalize_entropy"),
    ("quantize", "penalize_entropy"),
    ("compress_weights", "penalize_entropy"),
}
PAIRS = list(itertools.permutations(SETTINGS, 2))
RUNS = [
    pytest.param(
        *pair,
        together,
        id="-".join([*pair, "together" if together else "apart"]),
        # One order trained together, the other one after the other; the slow half has all.
        marks=() if together == (pair[0] < pair[1]) or pair in REFUSED else pytest.mark.slow,
    )
    for pair in PAIRS
    for together in (False, True)
]


@pytest.fixture(scope="module")
def task() -> Task:
    """Two kinds of stripes that a small net tells apart."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    images = rng.integers(0, 120, (400, 12, 12, 1)).astype(np.uint8)
    images[labels == 0, ::3] += 120
    images[labels == 1, :, ::3] += 120
    return from_arrays(images, labels)


@pytest.fixture(scope="module")
def model(task: Task) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 32),
        nn.ReLU(),
        nn.Linear(32, 2),
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for images, labels in itertools.islice(task.batches("train", 32, shuffle=True), 10):
        optimizer.zero_grad()
        task.loss(net(images), labels).backward()
        optimizer.step()
    return net.eval()


def pair(first: str, second: str, train: bool) -> Recipe:
    entries = [{first: SETTINGS[first]}, {second: SETTINGS[second]}]
    training = {"epochs": 0.3, "batch_size": 32, "distill": {}}
    if not train:
        needs = [techniques()[next(iter(entry))].needs_training for entry in entries]
        stages = [
            {"techniques": [entry]} | ({"train": training} if needed else {})
            for entry, needed in zip(entries, needs, strict=True)
        ]
        return Recipe.model_validate({"stages": stages})
    return Recipe.model_validate({"stages": [{"techniques": entries, "train": training}]})


def test_the_pairs_are_of_all_techniques_there_are() -> None:
    assert set(SETTINGS) <= set(techniques())
    assert {name for name in techniques() if name != "distill"} == set(SETTINGS)


@pytest.mark.parametrize(("first", "second", "together"), RUNS)
def test_every_ordered_pair_runs_and_deploys_or_is_refused(
    first: str, second: str, together: bool, model: nn.Module, task: Task, tmp_path: Path
) -> None:
    steps = pair(first, second, together)
    if (first, second) in REFUSED:
        with pytest.raises(PenjingError, match=f"{second} comes after {first}, but"):
            compress(model, task, steps)
        return
    before = copy.deepcopy(model.state_dict())
    small = compress(model, task, steps)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the model itself must stay as it was"

    if together:
        check_both_last(small, model, {first, second})
    check_deployed(small, task, tmp_path, 0.05 if "quantize" in (first, second) else 1e-4)


def check_both_last(small: nn.Module, model: nn.Module, names: set[str]) -> None:
    """What each of the techniques ``names`` does to ``model`` is still there in ``small``."""
    layers = [m for m in small.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    weights = [layer.weight.detach() for layer in layers]
    count = sum(p.numel() for p in small.parameters())
    if "prune_weights" in names:
        zeros = sum(int((w == 0).sum()) for w in weights)
        assert zeros >= 0.4 * sum(w.numel() for w in weights)
    if "prune_channels" in names:
        assert count < 0.9 * sum(p.numel() for p in model.parameters())
    if "factorize" in names:
        assert len(layers) > 4
    if "share_weights" in names:
        assert all(len(w.unique()) <= 17 for w in weights)
    if {"quantize", "compress_weights", "penalize_entropy"} & names:
        assert all(getattr(layer, "weight_format", None) is not None for layer in layers)


def check_deployed(small: nn.Module, task: Task, folder: Path, tolerance: float) -> None:
    """The exported file answers as the model does, up to ``tolerance`` of the largest answer."""
    export(small, task.example, folder / "model.onnx", calibration=task.calibration(64))
    images = torch.cat([batch for batch, _ in task.batches("test", 64)])
    with torch.no_grad():
        expected = small.cpu()(images).numpy()
    ((found,),) = run(folder / "model.onnx", [images.numpy()])
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("training", [False, True], ids=["after-training", "in-training"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_technique_works_on_a_gpu(
    name: str, training: bool, model: nn.Module, task: Task, tmp_path: Path
) -> None:
    stage: dict[str, object] = {"techniques": [{name: SETTINGS[name]}]}
    if training or techniques()[name].needs_training:
        stage["train"] = {"epochs": 0.3, "batch_size": 32, "distill": {}}
    steps = Recipe.model_validate({"stages": [stage]})
    small = compress(copy.deepcopy(model).cuda(), task, steps)
    assert next(small.parameters()).is_cuda
    check_deployed(small, task, tmp_path, 0.05 if name == "quantize" else 1e-4)


def most_in_a_block(weight: torch.Tensor) -> int:
    return int((weight.detach().movedim(1, -1).unflatten(-1, (-1, 4)) != 0).sum(-1).max())


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("pattern_first", [False, True])
def test_two_prunings_both_last(
    together: bool, pattern_first: bool, model: nn.Module, task: Task
) -> None:
    entries: list[dict] = [
        {"prune_weights": {"sparsity": {"3": 0.2, "8": 0.7}}},
        {"prune_weights": {"pattern": "2:4"}},
    ]
    entries = entries[::-1] if pattern_first else entries
    training = {"epochs": 0.3, "batch_size": 32}
    stages = [{"techniques": entries, "train": training}]
    if not together:
        stages = [{"techniques": [entry], "train": training} for entry in entries]
    small = compress(model, task, Recipe.model_validate({"stages": stages}))
    # The first layer has one input channel, which no pattern fits.
    assert all(most_in_a_block(small[index].weight) <= 2 for index in (3, 8, 10))
    assert all(float((small[index].weight == 0).double().mean()) >= 0.5 for index in (3, 10))
    assert float((small[8].weight == 0).double().mean()) >= 0.7 - 1e-3


PATTERN = {"prune_weights": {"pattern": "2:4"}}
CHANNELS = {"prune_channels": {"ratio": 0.2}}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([[CHANNELS, CHANNELS]], "prune_channels is in one stage with prune_channels, but"),
        ([[PATTERN, CHANNELS]], "prune_channels comes after prune_weights with a pattern, but"),
        ([[PATTERN], [CHANNELS]], "prune_channels comes after prune_weights with a pattern, but"),
        ([[CHANNELS, PATTERN]], "prune_weights with a pattern is in one stage with prune_channels"),
    ],
)
def test_prunings_that_would_undo_each_other_are_rejected(stages: list, message: str) -> None:
    with pytest.raises(PenjingError, match=message):
        recipes.parse({"stages": [{"techniques": one, "train": {}} for one in stages]})


def test_channels_and_a_pattern_in_stages_of_their_own(model: nn.Module, task: Task) -> None:
    rounded = {"prune_channels": {"ratio": 0.2, "round_to": 4}}
    steps = recipes.parse({"stages": [{"techniques": [rounded]}, {"techniques": [rounded]}]})
    assert compress(model, task, steps)[0].weight.shape[0] < 16
    steps = recipes.parse({"stages": [{"techniques": [rounded]}, {"techniques": [PATTERN]}]})
    small = compress(model, task, steps)
    assert most_in_a_block(small[3].weight) <= 2 and len(small[0].weight) % 4 == 0


def test_one_bit_after_pruning_is_refused_before_any_work(model: nn.Module, task: Task) -> None:
    stages = [
        {"techniques": [{"prune_weights": {"sparsity": 0.5}}, {"quantize": {"weight_bits": 1}}]}
    ]
    with pytest.raises(PenjingError, match="has no zero; use weight_bits: 2"):
        compress(model, task, Recipe.model_validate({"stages": stages}))


def test_a_technique_that_needs_training_is_refused_without(model: nn.Module, task: Task) -> None:
    stages = [{"techniques": [{"penalize_entropy": {"max_bytes": 3_000}}]}]
    with pytest.raises(
        PenjingError, match="penalize_entropy works in training only; give its stage"
    ):
        compress(model, task, Recipe.model_validate({"stages": stages}))


def test_yaml_round_trip(tmp_path: Path) -> None:
    steps = pair("prune_channels", "quantize", train=True)
    steps.save(tmp_path / "steps.yaml")
    again = recipes.load(tmp_path / "steps.yaml")
    assert again.to_dict() == steps.to_dict()
    assert [t.name for t in again.techniques] == ["prune_channels", "quantize"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [{techniques: [{shrink: {}}]}]", "no technique is called 'shrink'"),
        (
            "stages: [{techniques: [quantize: {bits: 8}]}]",
            "quantize.bits: there is no such setting",
        ),
        ("stages: [{techniques: [prune_channels: {}]}]", "prune_channels.ratio: is missing"),
        ("stages: [{techniques: [quantize: {weight_bits: 7}]}]", "must be 16, 8, .*, found 7$"),
        ("stages: [{techniques: [prune_channels: {ratio: .nan}]}]", "less than 1, found nan$"),
        (
            "stages: [{techniques: [quantize: {calibration: a}]}]",
            "must be a valid integer, found 'a'$",
        ),
        ("stages: [{train: {epoch: 3}}]", "epoch"),
        ("- 1", "must hold a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(PenjingError, match=message) as caught:
        recipes.load(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(PenjingError, match=r"nowhere\.yaml"):
        recipes.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_is_known_by_its_name(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    assert recipe.techniques
    assert 20 < len(recipe.about) < 100
    assert "\n" not in recipe.about


def test_an_unknown_recipe_is_told_the_names() -> None:
    with pytest.raises(PenjingError, match=r"int9.*deep-compression, .*int8.*smallest"):
        recipes.load("int9")


def test_a_file_is_meant_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "int8").write_text("name: mine\nstages: [{techniques: [quantize]}]")
    assert recipes.load("./int8").name == "mine"
    assert recipes.load("int8").name == "int8"


def test_a_finished_stage_is_taken_from_the_cache(
    model: nn.Module, task: Task, tmp_path: Path
) -> None:
    steps = pair("prune_channels", "quantize", train=True)
    first = compress(model, task, steps, cache=tmp_path)
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    again = compress(model, task, steps, cache=tmp_path)
    assert stamps == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    with torch.no_grad():
        assert torch.equal(first(task.example), again(task.example))


def test_the_key_of_a_stage_depends_on_weights_data_and_stages_so_far(
    model: nn.Module, task: Task
) -> None:
    steps = pair("prune_channels", "quantize", train=False)
    keys = recipes.stage_keys(model, task, steps, model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-3
    assert len(set(keys)) == 2
    assert recipes.stage_keys(other, task, steps, model)[0] != keys[0]
    changed = pair("prune_channels", "share_weights", train=False)
    assert recipes.stage_keys(model, task, changed, model)[0] == keys[0]
    assert recipes.stage_keys(model, task, changed, model)[1] != keys[1]


def stage(technique: str = "quantize") -> Recipe:
    return recipes.parse({"stages": [{"techniques": [{technique: SETTINGS[technique]}]}]})


def stripes(**more: Any) -> Task:
    images = np.random.default_rng(0).integers(0, 255, (40, 12, 12, 1), np.uint8)
    return from_arrays(images, np.arange(40) % 2, **more)


def plain(act: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()


def test_one_architecture_is_not_served_another_ones_stage(tmp_path: Path) -> None:
    task = stripes()
    compress(plain(nn.ReLU), task, stage(), cache=tmp_path)
    cached = compress(plain(nn.Sigmoid), task, stage(), cache=tmp_path)
    with torch.no_grad():
        expected = compress(plain(nn.Sigmoid), task, stage())(task.example)
        assert torch.equal(cached(task.example), expected)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_keys_hold_the_loss_the_defaults_and_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(scale: float = 1.0) -> str:
        task = stripes(loss=lambda o, y: o.sum() * scale, score=lambda o, y: float(o.sum()))
        net = plain(nn.ReLU)
        return recipes.stage_keys(net, task, stage(), net)[0]

    first = key()
    assert key() == first != key(2.0)
    quantize = techniques()["quantize"]
    monkeypatch.setattr(
        quantize, "model_dump", lambda self, **_: {"calibration": 1}
    )  # as another version's defaults would
    assert key() != first
    monkeypatch.undo()
    monkeypatch.setattr(recipes, "__version__", "another")
    assert key() != first


def test_what_cannot_be_identified_is_not_cached_and_that_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = threading.Lock()

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with held:
            return output.sum()

    task = stripes(loss=loss, score=lambda o, y: float(o.sum()))
    for _ in range(2):
        compress(plain(nn.ReLU), task, stage(), cache=tmp_path)
    said = capsys.readouterr().err
    assert said.count("Stages are not cached: A _thread.lock cannot be told from") == 1
    assert not list(tmp_path.iterdir())


def test_a_damaged_stage_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = stripes()
    expected = compress(plain(nn.ReLU), task, stage(), cache=tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-50])
    found = compress(plain(nn.ReLU), task, stage(), cache=tmp_path)
    assert capsys.readouterr().err.startswith("A damaged stage is made anew: ")
    with torch.no_grad():
        assert torch.equal(found(task.example), expected(task.example))


def test_an_interrupted_stage_resumes_from_the_cache_or_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task, net = stripes(), plain(nn.ReLU)
    steps = recipes.parse({"stages": [{"train": {"epochs": 3, "batch_size": 16}}]})
    expected = compress(net, task, steps)
    for damage in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(recipes.snapshot, "save", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                compress(net, task, steps, cache=tmp_path)
        (checkpoint,) = tmp_path.glob("*.checkpoint")
        if damage:
            checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
        found = compress(net, task, steps, cache=tmp_path)
        pairs = zip(found.state_dict().values(), expected.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert ("begins anew" in capsys.readouterr().err) is damage
        assert not list(tmp_path.glob("*.checkpoint"))
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)
