from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from penjing.targets.onnxruntime import runtime
from penjing.targets.onnxruntime.export import export
from penjing.tasks import Task, from_arrays
from penjing.techniques.quantize import quantize


@pytest.fixture(scope="module")
def task() -> Task:
    images = np.random.default_rng(0).integers(0, 256, (24, 12, 12, 1), dtype=np.uint8)
    return from_arrays(images, np.arange(24) % 2, validation=4, test=4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2), nn.MaxPool2d(2)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 2)).eval()


def test_nothing_is_left_that_a_runtime_infers(task: Task, tmp_path: Path) -> None:
    small = quantize(
        net(), task, weight_bits=4, activation_bits=None, first_last_bits=4, scales="layer"
    )
    path = tmp_path / "net.onnx"
    export(small, task.example, path)
    graph = onnx.load(path).graph
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert not any(node.name for node in graph.node)
    assert not graph.value_info and not graph.input[0].metadata_props
    assert graph.input[0].name == "image"
    convolutions = [
        {a.name: list(a.ints) for a in node.attribute}
        for node in graph.node
        if node.op_type == "Conv"
    ]
    assert convolutions[0] == {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    assert convolutions[1] == {"kernel_shape": [3, 3], "strides": [2, 2]}
    kinds = {node.op_type for node in graph.node}
    assert "Flatten" in kinds and "Reshape" not in kinds
    scales = [tensor for tensor in graph.initializer if tensor.name.endswith("_scale")]
    assert scales and all(np.prod(tensor.dims) == 1 for tensor in scales)
    x = torch.randn(3, 1, 12, 12)
    with torch.no_grad():
        expected = small(x)
    found = torch.from_numpy(runtime.run(path, [x.numpy()])[0][0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
