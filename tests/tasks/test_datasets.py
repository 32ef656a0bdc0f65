import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from penjing import tasks
from penjing.errors import PenjingError
from penjing.tasks import Preprocessing, datasets

SHARED = Path(__file__).parents[3] / "shared"


def make_folder(
    root: Path, parts=("train", "val", "test"), classes=("cat", "dog"), count=6
) -> Path:
    rng = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def sizes(task: tasks.Task) -> dict[str, int]:
    return {name: task.size(name) for name in task.splits}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("train", "val", "test"), {"train": 12, "validation": 12, "test": 12}),
        (("train", "validation"), {"train": 12, "validation": 12}),
        (("train", "valid", "test"), {"train": 12, "validation": 12, "test": 12}),
        (("train", "test"), {"train": 11, "validation": 1, "test": 12}),
        (("train",), {"train": 11, "validation": 1}),
    ],
)
def test_image_folder_layouts(tmp_path, parts, expected):
    task = tasks.load(make_folder(tmp_path, parts))
    assert task.classes == ["cat", "dog"]
    assert sizes(task) == expected
    assert task.has_test == ("test" in parts)


def test_reads_the_pixels_of_the_files(tmp_path):
    make_folder(tmp_path)
    plain = Preprocessing(size=10, resize=10, mean=(0,) * 3, std=(1,) * 3)
    images, labels = next(tasks.load(tmp_path, plain).batches("test"))
    assert labels.tolist() == [0] * 6 + [1] * 6
    expected = np.asarray(Image.open(tmp_path / "test" / "dog" / "0.png"))[:, 1:11] / 255
    np.testing.assert_allclose(images[6].permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_lazy_reading_gives_the_same_as_reading_into_memory(tmp_path, monkeypatch):
    make_folder(tmp_path)
    kept = tasks.load(tmp_path)
    monkeypatch.setattr(datasets, "LARGEST_IN_MEMORY", 0)
    lazy = tasks.load(tmp_path)
    assert kept.splits["train"].keep and not lazy.splits["train"].keep
    for (a, x), (b, y) in zip(
        kept.batches("train", 5, shuffle=True), lazy.batches("train", 5, shuffle=True), strict=True
    ):
        assert torch.equal(a, b) and torch.equal(x, y)


def test_split_off_parts_are_disjoint_complete_and_repeatable(tmp_path):
    make_folder(tmp_path, ("train",), count=20)
    first, second = (tasks.load(tmp_path, validation=0.25, seed=3) for _ in range(2))
    train, validation = (first.splits[name].sources for name in ("train", "validation"))
    assert len(validation) == 10
    assert sorted(train + validation) == sorted((tmp_path / "train").rglob("*.png"))
    assert first.fingerprint == second.fingerprint
    other = tasks.load(tmp_path, validation=0.25, seed=4)
    assert other.splits["validation"].sources != validation
    assert other.fingerprint != first.fingerprint


def test_share_of_validation_is_capped_but_a_number_is_not():
    images, labels = np.zeros((60_000, 2, 2), np.uint8), np.zeros(60_000, int)
    labels[0] = 1
    assert tasks.from_arrays(images, labels, test=10).size("validation") == 5000
    assert tasks.from_arrays(images, labels, test=10, validation=7000).size("validation") == 7000


def break_nothing_there(root):
    return root / "absent", "no such folder"


def break_train(root):
    make_folder(root, ("val", "test"))
    return root, r"no train/ folder \(but test/, val/\)"


def break_empty_class(root):
    make_folder(root)
    (root / "train" / "bird").mkdir()
    return root, "class 'bird' has no images"


def break_unknown_class(root):
    make_folder(root, ("train",))
    make_folder(root, ("test",), ("cat", "cow"))
    return root, "class 'cow' is not one of the 2 classes"


def break_two_validations(root):
    return make_folder(root, ("train", "val", "validation")), "both val/ and validation/"


def break_two_other_validations(root):
    return make_folder(root, ("train", "val", "valid")), "both val/ and valid/"


def break_only_unknown_endings(root):
    make_folder(root)
    (root / "train" / "bird").mkdir()
    for index in range(3):
        (root / "train" / "bird" / f"{index}.heic").touch()
    return root, r"class 'bird' has no images, only 3 \.heic"


def break_singles(root):
    return make_folder(root, ("train",), count=1), "at most 0 can be taken"


def break_single_class(root):
    return make_folder(root, classes=("cat",)), "1 class folders, at least 2"


@pytest.mark.parametrize(
    "break_it",
    [
        break_nothing_there,
        break_train,
        break_empty_class,
        break_unknown_class,
        break_two_validations,
        break_two_other_validations,
        break_only_unknown_endings,
        break_singles,
        break_single_class,
    ],
)
def test_says_what_is_wrong_with_a_folder(tmp_path, break_it):
    folder, message = break_it(tmp_path)
    with pytest.raises(PenjingError, match=message):
        tasks.load(folder)


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
@pytest.mark.parametrize("largest", [0, 2**30])
def test_names_a_corrupt_image(tmp_path, content, largest, monkeypatch):
    monkeypatch.setattr(datasets, "LARGEST_IN_MEMORY", largest)
    make_folder(tmp_path)
    bad = tmp_path / "train" / "dog" / "3.png"
    bad.write_bytes(bad.read_bytes()[:200] if content == "truncated" else content)
    with pytest.raises(PenjingError, match=r"dog/3\.png: cannot be read as an image"):
        list(tasks.load(tmp_path).batches("train"))


def test_what_is_not_read_is_named(tmp_path, capsys):
    make_folder(tmp_path, ("train", "dev", "holdout"))
    for name in ("a.heic", "b.heic", "c.txt"):
        (tmp_path / "train" / "dog" / name).touch()
    (tmp_path / "train" / "loose.png").touch()
    tasks.load(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert any("dev/, holdout/" in line and "valid/" in line for line in lines)
    assert any(
        "train: " in line and "2 .heic, 1 in no class folder, 1 .txt" in line for line in lines
    )


@pytest.mark.parametrize(("bits", "said"), [(12, True), (16, False)])
def test_images_that_leave_upper_bits_unused_are_named(tmp_path, capsys, bits, said):
    values = np.linspace(0, 2**bits - 1, 64).astype(np.uint16).reshape(8, 8)
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(10):
            Image.fromarray(values).save(tmp_path / "train" / name / f"{index}.png")
    tasks.load(tmp_path)
    assert ("the upper 4 are 0" in capsys.readouterr().err) is said


def test_names_that_are_no_unicode_are_read(tmp_path):
    make_folder(tmp_path)
    image = tmp_path / "train" / "cat" / "0.png"
    image.rename(image.with_name(os.fsdecode(b"caf\xe9.png")))
    task = tasks.load(tmp_path)
    assert len(task.fingerprint) == 64 and len(next(task.batches("train"))[0]) == 12


def test_nothing_is_said_of_folders_that_are_read_whole(tmp_path, capsys):
    tasks.load(make_folder(tmp_path))
    assert capsys.readouterr().err == ""


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    share=st.floats(0.05, 0.9),
    seed=st.integers(0, 1000),
)
def test_a_split_leaves_every_class_an_image_and_takes_of_every_class_that_has_enough(
    sizes, share, seed
):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    images = np.arange(len(labels), dtype=np.uint16).view(np.uint8).reshape(-1, 1, 2)
    count = round(share * len(labels))
    if not 0 < count <= len(labels) - len(sizes):
        with pytest.raises(PenjingError, match="splits"):
            tasks.from_arrays(images, labels, validation=share, test=(images, labels), seed=seed)
        return
    first, second = (
        tasks.from_arrays(images, labels, validation=share, test=(images, labels), seed=seed)
        for _ in range(2)
    )
    train, validation = (
        np.bincount(first.splits[name].labels, minlength=len(sizes))
        for name in ("train", "validation")
    )
    assert validation.sum() == count and (train + validation == sizes).all()
    assert (train >= 1).all()
    enough = (np.array(sizes) > 1) & (np.array(sizes) * count >= len(labels) / 2)
    if enough.sum() <= count:
        assert (validation[enough] >= 1).all()
    assert first.fingerprint == second.fingerprint
    seen = np.concatenate([first.splits[name].sources for name in ("train", "validation")])
    assert sorted(seen.view(np.uint16).ravel()) == list(range(len(labels)))


def test_splits_of_common_data_sets_are_where_chance_puts_them():
    """As in earlier versions, so that a model trained there has not seen its validation images."""
    labels = np.arange(2000) % 10
    task = tasks.from_arrays(np.zeros((2000, 2, 2), np.uint8), labels, test=100, seed=1)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(task.splits["test"].labels, torch.tensor(labels)[order[:100].sort().values])


def test_classes_too_small_to_split_are_named(capsys):
    labels = np.array([0] * 50 + [1] * 48 + [2] * 2)
    tasks.from_arrays(np.zeros((100, 2, 2), np.uint8), labels, test=4, classes=["a", "b", "rare"])
    assert "test: no images of rare" in capsys.readouterr().err


def test_counts_of_each_class_are_described():
    images, labels = np.zeros((40, 2, 2), np.uint8), np.arange(40) // 20
    parts = {"validation": (images[:6], labels[:6]), "test": (images[18:24], labels[18:24])}
    task = tasks.from_arrays(images, labels, classes=["cat", "dog"], **parts)
    assert tasks.describe(task) == (
        "train 40 images (cat 20, dog 20); validation 6 images (cat 6, dog 0); "
        "test 6 images (cat 2, dog 4)"
    )
    many = np.repeat(np.arange(12), np.arange(10, 22))
    task = tasks.from_arrays(np.zeros((len(many), 2, 2), np.uint8), many, **parts)
    assert tasks.describe(task).startswith("train 186 images (12 classes, 10 to 21 of each)")


def test_oblong_arrays_stay_oblong():
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 9, 3), dtype=np.uint8)
    task = tasks.from_arrays(images, np.arange(20) % 2)
    assert task.preprocessing.size == (4, 9)
    expected = torch.from_numpy(task.splits["train"].sources[0]).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(task.example[0], expected, atol=1e-5, rtol=1e-5)


def write_mnist(root: Path, images: np.ndarray, labels: np.ndarray) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = struct.pack(">4i", 0x803, *images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">2i", 0x801, len(labels))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def test_torchvision_data_set(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)
    labels = (np.arange(50) % 10).astype(np.uint8)
    write_mnist(tmp_path, images, labels)
    task = tasks.load("torchvision:MNIST", root=tmp_path)
    assert sizes(task) == {"train": 45, "validation": 5, "test": 50}
    batch, target = next(task.batches("test", 50))
    assert torch.equal(target, torch.from_numpy(labels).long())
    torch.testing.assert_close(
        batch[:, 0], (torch.from_numpy(images) / 255 - 0.1307) / 0.3081, atol=1e-5, rtol=1e-5
    )
    assert not task.splits["train"].mirrored


@pytest.mark.parametrize(
    ("name", "root", "message"),
    [
        ("torchvision:MNIST", None, "needs root"),
        ("torchvision:MNIST", "absent", "finds no MNIST"),
        ("torchvision:COCO", "x", "known are CIFAR10"),
    ],
)
def test_says_what_is_wrong_with_a_torchvision_set(tmp_path, name, root, message):
    with pytest.raises(PenjingError, match=message):
        tasks.load(name, root=root and tmp_path / root)


def test_a_damaged_torchvision_set_is_one_sentence(tmp_path):
    write_mnist(tmp_path, np.zeros((50, 28, 28), np.uint8), np.zeros(50, np.uint8))
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(PenjingError, match="finds no MNIST there"):
        tasks.load("torchvision:MNIST", root=tmp_path)


@pytest.mark.parametrize(
    ("images", "labels", "classes", "message"),
    [
        (np.zeros((20, 4, 4, 3)), np.zeros(20, int), None, "expected uint8"),
        (np.zeros((20, 4, 4, 2), np.uint8), np.zeros(20, int), None, "expected uint8"),
        (np.zeros((20, 4, 4), np.uint8), np.zeros(19, int), None, r"expected integers \[20\]"),
        (np.zeros((20, 4, 4), np.uint8), np.zeros(20), None, "expected integers"),
        (np.zeros((20, 4, 4), np.uint8), np.full(20, -1), None, "start at -1"),
        (np.zeros((20, 4, 4), np.uint8), np.full(20, 2), ["a", "b"], "out of range"),
        (np.zeros((4, 4, 4), np.uint8), np.zeros(4, int), None, "splits 0 of 4"),
    ],
)
def test_refuses_arrays_that_do_not_fit(images, labels, classes, message):
    with pytest.raises(PenjingError, match=message):
        tasks.from_arrays(images, labels, classes=classes)


def test_given_arrays_are_taken_as_they_are():
    rng = np.random.default_rng(0)
    parts = [
        (rng.integers(0, 256, (n, 6, 6, 3), dtype=np.uint8), rng.integers(0, 3, n))
        for n in (30, 9, 8)
    ]
    task = tasks.from_arrays(*parts[0], validation=parts[1], test=parts[2], classes=list("abc"))
    assert sizes(task) == {"train": 30, "test": 8, "validation": 9}
    images, labels = next(task.batches("validation"))
    assert labels.tolist() == parts[1][1].tolist()
    expected = torch.from_numpy(parts[1][0]).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_mnist_is_complete():
    if not (SHARED / "data" / "mnist").is_dir():
        pytest.skip("MNIST is not beside the repository")
    task = tasks.load("torchvision:MNIST", root=SHARED / "data" / "mnist")
    assert sizes(task) == {"train": 55_000, "validation": 5_000, "test": 10_000}
    images = torch.cat([batch for batch, _ in task.batches("train", 1000)])
    # The published mean and deviation of the training images normalise to 0 and 1.
    assert abs(float(images.mean())) < 0.01 and abs(float(images.std()) - 1) < 0.01
