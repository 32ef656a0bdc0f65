import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from penjing.errors import PenjingError
from penjing.models import load_weights


def net(classes: int = 3) -> nn.Module:
    torch.manual_seed(classes)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes)
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def changed() -> nn.Module:
    model = net()
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


@pytest.mark.parametrize("ending", ["pt", "pth", "safetensors"])
def test_round_trip(tmp_path, ending):
    source, path = changed(), tmp_path / f"w.{ending}"
    save = save_file if ending == "safetensors" else torch.save
    save(source.state_dict(), path)
    model = net()
    load_weights(model, path)
    assert same(source, model)


@pytest.mark.parametrize("under", ["state_dict", "model"])
def test_training_checkpoints_are_unwrapped(tmp_path, under):
    source = changed()
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    torch.save({under: state, "epoch": 3}, tmp_path / "w.pth")
    model = net()
    load_weights(model, tmp_path / "w.pth")
    assert same(source, model)


def test_half_precision_and_absent_batch_counts_are_accepted(tmp_path):
    source = changed()
    state = {k: v.half() for k, v in source.state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "w.safetensors")
    model = net()
    load_weights(model, tmp_path / "w.safetensors")
    assert model[3].weight.dtype == torch.float32
    torch.testing.assert_close(model[3].weight, source[3].weight, atol=1e-2, rtol=1e-2)


def without_bias(state):
    del state["3.bias"]


def with_another(state):
    state["4.weight"] = torch.zeros(3)


def wider(state):
    state["3.weight"] = torch.zeros(10, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_bias, r"'3.bias' should be \[3\] and is absent \(1 of 9 tensors missing, 0 unexp"),
        (
            with_another,
            r"'4.weight' should be absent and is \[3\] \(0 of 9 tensors missing, 1 unexp",
        ),
        (wider, r"'3.weight' should be \[3, 16\] and is \[10, 16\] .* 1 of another shape"),
    ],
)
def test_misfit_is_named_and_changes_nothing(tmp_path, change, message):
    state = net().state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pt")
    model = changed()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PenjingError, match=message):
        load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Bomb:
    exploded = False

    def __reduce__(self):
        return (setattr, (Bomb, "exploded", True))


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.pkl", "w.bin", "w.ckpt", "w.safetensors"])
def test_hidden_code_is_not_run(tmp_path, name):
    path = tmp_path / name
    torch.save({"state_dict": Bomb()}, path)
    with pytest.raises(PenjingError):
        load_weights(net(), path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(PenjingError):
        load_weights(net(), path)
    assert not Bomb.exploded


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (net(), "holds Python objects"),
        ([torch.zeros(1)], "holds a list, expected a state dict"),
        ({}, "holds a dict, expected a state dict"),
        ({"a": torch.zeros(1), "epoch": 3}, "'epoch' is a int, expected a tensor"),
    ],
)
def test_says_what_a_file_holds_instead(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(PenjingError, match=message):
        load_weights(net(), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_broken_and_missing_files(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(PenjingError, match="no such weights file"):
        load_weights(net(), path)
    path.write_bytes(b"garbage")
    with pytest.raises(PenjingError, match=name):
        load_weights(net(), path)
