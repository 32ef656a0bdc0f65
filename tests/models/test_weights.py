import argparse
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file, save_model
from torch import nn

from penjing import models
from penjing.errors import PenjingError
from penjing.models import load_weights
from penjing.tasks import Preprocessing
from penjing.training import save_weights


def net(classes: int = 3) -> nn.Module:
    torch.manual_seed(classes)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes)
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def changed(seed: int = 0) -> nn.Module:
    model = net()
    torch.manual_seed(seed)
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
        (
            {"epoch": 3, "args": {"lr": 0.1}},
            "holds a dict of 'epoch', 'args', expected a state dict",
        ),
        (
            {"a": torch.zeros(1), "epoch": 3},
            r"the file has 'a', the model '0\.weight', '0\.bias', ",
        ),
        ({"best": np.float64(0.5), "model": net().state_dict()}, "numpy.*scalar.* is not opened"),
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


ENDINGS = ("w.pt", "w.pth", "w.pth.tar", "w.ckpt", "w.bin", "w.safetensors")


def write(state: object, path: Path) -> Path:
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(state, path)  # type: ignore[arg-type]
    return path


def prefixed(prefix: str, model: nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "net.model._orig_mod.", "ema."],
)
def test_prefixes_go_in_every_kind_of_file(tmp_path, ending, prefix):
    source, model = changed(), net()
    load_weights(model, write(prefixed(prefix, source), tmp_path / ending))
    assert same(source, model)


@pytest.mark.parametrize("ending", ENDINGS[:-1])
@pytest.mark.parametrize("under", [*models.weights.CONTAINERS, "net", "module"])
def test_checkpoints_hold_other_things_too(tmp_path, ending, under):
    source, model = changed(), net()
    optimizer = torch.optim.Adam(source.parameters())
    source(torch.zeros(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "arch": "net",
        "best": torch.tensor(0.5),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1),
        under: prefixed("module.", source),
    }
    load_weights(model, write(content, tmp_path / ending))
    assert same(source, model)


@pytest.mark.parametrize("averaged", [True, False])
def test_a_checkpoint_of_timms_trainer(tmp_path, averaged):
    utils = pytest.importorskip("timm.utils")
    source = changed()
    average = utils.ModelEmaV3(changed(1)) if averaged else None
    optimizer = torch.optim.SGD(source.parameters(), 0.1, momentum=0.9)
    options = argparse.Namespace(model="net", lr=0.1)
    saver = utils.CheckpointSaver(
        source, optimizer, options, average, checkpoint_dir=tmp_path, recovery_dir=tmp_path
    )
    saver.save_checkpoint(3, metric=0.5)
    model = net()
    load_weights(model, tmp_path / "model_best.pth.tar")
    assert same(average.module if averaged else source, model)


def test_a_checkpoint_inside_another(tmp_path):
    source, model = changed(), net()
    content = {"checkpoint": {"model": {"state_dict": source.state_dict(), "step": 3}}}
    load_weights(model, write(content, tmp_path / "w.ckpt"))
    assert same(source, model)


@pytest.mark.parametrize(
    ("plain", "averaged"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema")],
)
def test_averaged_weights_are_taken_and_that_is_said(tmp_path, capsys, plain, averaged):
    """As torchvision's reference scripts write them, with ``AveragedModel``'s counter."""
    source, other, model = changed(), changed(1), net()
    kept = torch.optim.swa_utils.AveragedModel(source).state_dict()
    path = write({plain: other.state_dict(), averaged: kept}, tmp_path / "w.pth")
    load_weights(model, path)
    assert same(source, model)
    line = f"{path}: took the weights under '{averaged}', not those under '{plain}'\n"
    assert capsys.readouterr().err == line


def test_averaged_and_plain_weights_side_by_side_in_one_flat_file(tmp_path, capsys):
    source, model = changed(), net()
    state = prefixed("model.", changed(1)) | prefixed("ema.", source)
    load_weights(model, write(state, tmp_path / "w.safetensors"))
    assert same(source, model)
    assert "took the weights under 'ema'" in capsys.readouterr().err


def test_an_average_that_does_not_fit_is_left_and_that_is_said(tmp_path, capsys):
    """One of the parameters alone: the norms' statistics are not in it."""
    source, model = changed(), net()
    content = {"model": source.state_dict(), "ema": dict(changed(1).named_parameters())}
    load_weights(model, write(content, tmp_path / "w.pt"))
    assert same(source, model)
    assert "took the weights under 'model', not those under 'ema'" in capsys.readouterr().err


def test_nothing_is_said_where_there_is_nothing_to_choose(tmp_path, capsys):
    state = net().state_dict()
    load_weights(net(), write({"model": state, "model_ema": dict(state)}, tmp_path / "w.pt"))
    assert capsys.readouterr().err == ""


def test_names_that_do_not_fit_are_those_of_the_weights(tmp_path):
    """Not of the few tensors that a trainer keeps beside them."""
    content = {
        "callbacks": {"best": {"score": torch.tensor(0.5)}},
        "state_dict": nn.TransformerEncoderLayer(4, 2, 8).state_dict(),
    }
    with pytest.raises(
        PenjingError, match=r"\(under 'state_dict'\).* has 'self_attn\.in_proj_weight'"
    ):
        load_weights(net(), write(content, tmp_path / "w.ckpt"))


def test_several_sets_of_weights_that_fit_alike_are_rejected(tmp_path):
    content = {"student": changed().state_dict(), "teacher": changed(1).state_dict()}
    with pytest.raises(PenjingError, match="under 'student' and 'teacher'; write the one to load"):
        load_weights(net(), write(content, tmp_path / "w.pt"))


class Wrapped(nn.Module):
    """A user's module around a net of which one part is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x).mean((2, 3)))


def compiled_inside() -> nn.Module:
    model = Wrapped()
    model.backbone = torch.compile(model.backbone)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("give", "take"),
    [
        (compiled_inside, Wrapped),
        (Wrapped, compiled_inside),
        (Wrapped, lambda: nn.DataParallel(Wrapped())),
        (lambda: nn.DataParallel(Wrapped()), lambda: torch.compile(Wrapped())),
        (lambda: nn.Sequential(Wrapped()), Wrapped),
        (Wrapped, lambda: nn.Sequential(Wrapped())),
    ],
)
def test_wrappers_in_the_file_and_around_the_model_go(
    tmp_path, give: Callable[[], nn.Module], take: Callable[[], nn.Module]
):
    source, model = give(), take()
    load_weights(model, write(source.state_dict(), tmp_path / "w.pt"))
    for one, other in zip(source.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_module_of_the_models_own_called_module_stays(tmp_path):
    def made() -> nn.Module:
        return nn.ModuleDict(
            {"0": nn.Linear(2, 2), "module": nn.ModuleDict({"0": nn.Linear(2, 2)})}
        )

    source, model = made(), made()
    load_weights(model, write(source.state_dict(), tmp_path / "w.pt"))
    assert same(source, model)


def test_a_prefix_goes_only_if_all_names_then_fit(tmp_path):
    state = prefixed("backbone.", changed()) | {"decoder.weight": torch.zeros(3)}
    model = changed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PenjingError) as raised:
        load_weights(model, write(state, tmp_path / "w.pt"))
    for name in ("'backbone.0.weight'", "'backbone.1.weight'", "'0.weight'", "'1.weight'"):
        assert name in str(raised.value)
    assert "8 of 8 tensors missing, 9 unexpected" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ending", ["w.pt", "w.safetensors"])
def test_values_are_cast(tmp_path, dtype, ending):
    source, model = changed(), net()
    state = {name: value.to(dtype) for name, value in source.state_dict().items()}
    state["1.num_batches_tracked"] = torch.tensor(7)
    load_weights(model, write(state, tmp_path / ending))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert torch.equal(model[0].weight, source[0].weight.to(dtype).float())


def test_integers_are_not_taken_for_weights(tmp_path):
    """As quantized checkpoints have them: the integers alone are not the weights."""
    state = net().state_dict()
    state["0.weight"] = torch.ones(4, 3, 3, 3, dtype=torch.int8)
    with pytest.raises(PenjingError, match=r"'0.weight' should be .* and is .* of int8"):
        load_weights(net(), write(state, tmp_path / "w.pt"))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def test_tied_weights_are_found_under_either_name(tmp_path):
    source, model = tied(), tied()
    save_model(source, str(tmp_path / "w.safetensors"))
    load_weights(model, tmp_path / "w.safetensors")
    load_weights(other := tied(), write(source.state_dict(), tmp_path / "w.pt"))
    for made in (model, other):
        assert same(source, made) and made[0].weight is made[1].weight


def test_two_values_for_tied_weights_are_rejected(tmp_path):
    untied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict()
    with pytest.raises(PenjingError, match=r"'0.weight' and '1.weight' are one tensor"):
        load_weights(tied(), write(untied, tmp_path / "w.pt"))


def test_layers_without_a_shape_are_named(tmp_path):
    with pytest.raises(PenjingError, match="lazy layer"):
        load_weights(nn.LazyLinear(3), write(net().state_dict(), tmp_path / "w.pt"))


def test_a_foreign_class_is_named_and_not_imported(tmp_path):
    (tmp_path / "w.ckpt").write_bytes(b"\x80\x02cabsent_package.models\nNet\n)\x81.")
    with pytest.raises(PenjingError, match=r"\(absent_package\.models\.Net\) and is not opened"):
        load_weights(net(), tmp_path / "w.ckpt")


def test_code_hidden_in_harmless_objects_is_not_run(tmp_path):
    content = {"state_dict": net().state_dict(), "args": argparse.Namespace(bomb=Bomb())}
    with pytest.raises(PenjingError, match="is not opened"):
        load_weights(net(), write(content, tmp_path / "w.pth.tar"))
    assert not Bomb.exploded


def test_torchscript_is_told_apart(tmp_path):
    torch.jit.trace(net(), torch.zeros(1, 3, 4, 4)).save(tmp_path / "w.pt")
    with pytest.raises(PenjingError, match="TorchScript program"):
        load_weights(net(), tmp_path / "w.pt")


@pytest.mark.parametrize("old", [False, True])
def test_a_damaged_file_is_a_sentence(tmp_path, old):
    path = tmp_path / "w.pt"
    content = {"state_dict": net().state_dict(), "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    whole, dice = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in dice.integers(min(len(whole), 1000), size=3):
            damaged[place] = dice.integers(256)
        path.write_bytes(damaged)
        try:
            load_weights(net(), path)
        except PenjingError as error:
            assert "\n" not in str(error)


def test_versions_that_a_net_asks_for_are_not_needed(tmp_path):
    """torchvision's MNASNet does not load a state dict without its version, as safetensors are."""
    source = torchvision.models.mnasnet0_5(num_classes=3)
    path = write(source.state_dict(), tmp_path / "w.safetensors")
    model = models.load("torchvision:mnasnet0_5", num_classes=3, weights=path)
    assert same(source, model)


@pytest.mark.parametrize(
    ("name", "now", "then"),
    [
        ("densenet121", "denselayer1.norm2.", "denselayer1.norm.2."),
        ("vit_b_32", "mlp.3.", "mlp.linear_2."),
    ],
)
def test_names_of_torchvisions_published_files(name, now, then):
    """https://github.com/pytorch/vision: densenet.py and vision_transformer.py rename them."""
    with torch.device("meta"):
        state = torchvision.models.get_model(name).state_dict()
    assert any(now in key for key in state)
    published = {key.replace(now, then): value for key, value in state.items()}
    assert models.weights._renamed(published, state).keys() == state.keys()


@pytest.mark.parametrize(
    ("spec", "layer"),
    [
        ("penjing:lenet5", "7"),
        ("penjing:resnet20_cifar", "linear"),
        ("torchvision:squeezenet1_1", "classifier.1"),
        ("timm:test_resnet", "fc"),
        ("timm:test_vit", "head"),
    ],
)
def test_weights_for_other_classes_get_a_new_head(tmp_path, capsys, spec, layer):
    source = models.load(spec, num_classes=11)
    path = write(source.state_dict(), tmp_path / "w.safetensors")
    model = models.load(spec, weights=path, num_classes=4, new_head=True)
    for name, value in model.state_dict().items():
        if name.rpartition(".")[0] == layer:
            assert len(value) == 4
        else:
            assert torch.equal(value, source.state_dict()[name])
    said = f"{path}: made a new last layer ({layer}): 11 classes before, 4 now\n"
    assert capsys.readouterr().err == said
    with pytest.raises(PenjingError, match=r"weights for 11 classes .* have 4 .*: penjing train"):
        models.load(spec, weights=path, num_classes=4)


def test_two_heads_of_one_net_are_made_anew(tmp_path, capsys):
    """As distilled vision transformers have."""

    def made(classes: int) -> nn.Module:
        heads = {name: nn.Linear(4, classes) for name in ("head", "head_dist")}
        return nn.ModuleDict({"stem": nn.Linear(4, 4), **heads})

    source, model = made(5), made(3)
    path = write(source.state_dict(), tmp_path / "w.pt")
    load_weights(model, path, new_classes=3)
    assert "(head, head_dist): 5 classes before, 3 now" in capsys.readouterr().err
    assert torch.equal(model["stem"].weight, source["stem"].weight)


@pytest.mark.parametrize("change", [without_bias, with_another, wider])
def test_a_head_is_made_only_where_nothing_else_differs(tmp_path, change):
    state = net(classes=5).state_dict()
    change(state)
    with pytest.raises(PenjingError, match="does not fit the model"):
        load_weights(net(), write(state, tmp_path / "w.pt"), new_classes=3)


def test_a_wider_layer_is_no_head(tmp_path):
    """As many outputs more or less, but not the number of classes."""
    state = net(classes=5).state_dict()
    with pytest.raises(PenjingError):
        load_weights(net(), write(state, tmp_path / "w.pt"), new_classes=10)


def test_trained_weights_know_their_images(tmp_path):
    used = Preprocessing(size=(16, 24), channels=1, mean=(0.1,), std=(0.2,))
    save_weights(models.load("penjing:lenet5"), tmp_path / "w.safetensors", used)
    assert models.preprocessing("penjing:lenet5", weights=tmp_path / "w.safetensors") == used
    plain = write(net().state_dict(), tmp_path / "plain.safetensors")
    assert models.preprocessing("penjing:lenet5", weights=plain).size == 28
    assert models.preprocessing("penjing:lenet5", weights=tmp_path / "absent.pt").size == 28


def test_damaged_preprocessing_is_named(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(net().state_dict(), path, {"preprocessing": '{"size": -3}'})
    with pytest.raises(PenjingError, match="metadata 'preprocessing' is damaged"):
        models.preprocessing("penjing:lenet5", weights=path)
