import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto, numpy_helper
from torch import nn

from penjing.devices import measurement
from penjing.errors import PenjingError
from penjing.targets.onnxruntime import runtime
from penjing.targets.onnxruntime.export import export
from penjing.tasks import Task, from_arrays
from penjing.techniques.quantize import quantize
from penjing.techniques.share_weights import share_weights

FLOAT_KERNELS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"}


@pytest.fixture(scope="module")
def large_task() -> Task:
    """Noise of 64 px, with edges: a flat image would leave ranges at zero."""
    noise = np.random.default_rng(0).integers(0, 256, (14, 64, 64, 3), dtype=np.uint8)
    return from_arrays(noise, np.arange(14) % 12, validation=1, test=1)


def stored(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def found(path: Path, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(runtime.run(path, [x.numpy()])[0][0])


def largest(net: nn.Module, task: Task) -> float:
    with torch.no_grad():
        return float(net(task.example).abs().max())


@pytest.mark.slow
def test_a_torchvision_net_holds_only_integer_kernels(large_task: Task, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v2(weights=None, width_mult=0.35).eval()
    small = quantize(net, large_task, calibration=8)
    path = tmp_path / "net.onnx"
    export(small, large_task.example, path, calibration=large_task.calibration(8))
    kernels = runtime.kernels(path)
    layers = sum(isinstance(m, nn.Conv2d) for m in net.modules())
    assert kernels["QLinearConv"] == layers
    assert kernels["QGemm"] == 1
    assert kernels["QLinearAdd"] > 0 and kernels["QLinearGlobalAveragePool"] == 1
    assert not FLOAT_KERNELS & set(kernels)
    assert kernels["DequantizeLinear"] == 0

    x = torch.cat(large_task.calibration(8))
    with torch.no_grad():
        expected = small(x)
    error = (found(path, x) - expected).square().mean().sqrt()
    assert error < 0.1 * (expected - expected.mean(0)).square().mean().sqrt() + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "squeezenet1_1"])
def test_nets_with_other_activations_hold_only_integer_convolutions(
    name: str, large_task: Task, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(weights=None)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    x = torch.cat(large_task.calibration(8))
    net(x)  # norms of an untrained net let activations vanish
    small = quantize(net.eval(), large_task, calibration=8)
    path = tmp_path / "net.onnx"
    export(small, large_task.example, path, calibration=large_task.calibration(8))
    assert not {"Conv", "FusedConv"} & set(runtime.kernels(path))
    with torch.no_grad():
        original, simulated = net(x), small(x)
    # Random nets amplify any change: judge the file by what PyTorch's simulation loses.
    lost = (simulated - original).norm()
    assert (found(path, x) - original).norm() < 2 * lost + 0.02 * original.norm()


@pytest.mark.parametrize(
    ("bits", "activation_bits", "dtype", "levels"),
    [
        (16, None, TensorProto.INT16, 2**16),
        (8, 8, TensorProto.INT8, 255),
        (4, 8, TensorProto.INT4, 16),
        (4, None, TensorProto.INT4, 16),
        (2, 8, TensorProto.INT2, 3),
    ],
)
def test_weights_are_stored_in_their_bits_and_come_back(
    bits: int,
    activation_bits: int | None,
    dtype: int,
    levels: int,
    net: nn.Module,
    task: Task,
    tmp_path: Path,
) -> None:
    small = quantize(net, task, weight_bits=bits, activation_bits=activation_bits, calibration=64)
    path = tmp_path / "net.onnx"
    notes = export(small, task.example, path, calibration=task.calibration(64))
    tensor = stored(path)[f"branch.weight_int{bits}"]
    assert tensor.data_type == dtype
    codes = numpy_helper.to_array(tensor).astype(np.float32)
    assert len(np.unique(codes)) <= levels
    scale = small.branch.weight_format.scale.numpy()
    np.testing.assert_array_equal(
        codes * scale[:, None, None, None], small.branch.weight.detach().numpy()
    )
    agreement = measurement.agreement(small, path, task.calibration(64))
    assert agreement.max_error < (0.02 if activation_bits else 1e-5)
    assert any("branch" in note for note in notes) == (bits != 8)
    if activation_bits:
        assert not {*FLOAT_KERNELS, "Cast"} & set(runtime.kernels(path))


def test_one_bit_weights_take_one_bit(net: nn.Module, task: Task, tmp_path: Path) -> None:
    small = quantize(net, task, weight_bits=1, activation_bits=None, calibration=64)
    path = tmp_path / "net.onnx"
    export(small, task.example, path)
    packed = numpy_helper.to_array(stored(path)["branch.weight_bits"])
    assert packed.nbytes == small.branch.weight.numel() / 8
    signs = np.unpackbits(packed, bitorder="little").astype(bool)
    np.testing.assert_array_equal(signs, small.branch.weight.detach().numpy().reshape(-1) > 0)
    assert measurement.agreement(small, path, task.calibration(64)).max_error < 1e-5


@pytest.mark.parametrize(("bits", "dtype"), [(4, TensorProto.UINT4), (6, TensorProto.UINT8)])
def test_codebooks_are_stored_as_indices(
    bits: int, dtype: int, net: nn.Module, task: Task, tmp_path: Path
) -> None:
    small = share_weights(net, task, bits=bits)
    path = tmp_path / "net.onnx"
    export(small, task.example, path)
    assert stored(path)["branch.weight_indices"].data_type == dtype
    assert measurement.agreement(small, path, task.calibration(64)).max_error < 1e-5


def test_one_bit_weights_run_on_integer_kernels_too(
    net: nn.Module, task: Task, tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    small = quantize(net, task, calibration=64, weight_bits=1)
    notes = export(small, task.example, path, calibration=task.calibration(64))
    assert not {*FLOAT_KERNELS, "Cast", "BitShift"} & set(runtime.kernels(path))
    assert any("branch" in note and "widened once" in note for note in notes)


def test_weights_alone_leave_the_runtime_nothing_to_do_but_the_float_graph(
    net: nn.Module, task: Task, tmp_path: Path
) -> None:
    plain, stored_small = tmp_path / "plain.onnx", tmp_path / "small.onnx"
    export(net, task.example, plain)
    small = quantize(net, task, weight_bits=4, activation_bits=None, calibration=32)
    export(small, task.example, stored_small)
    assert runtime.kernels(stored_small) == runtime.kernels(plain)


@pytest.mark.parametrize("gain", [0.0, 1e-7])
def test_a_dead_branch_does_not_stop_the_runtime(
    gain: float, net: nn.Module, task: Task, tmp_path: Path
) -> None:
    """Pooling what is (nearly) zero would ask the kernel for a ratio that it refuses."""
    dead = copy.deepcopy(net)
    with torch.no_grad():
        dead.features[6].weight.mul_(gain)
        dead.features[6].bias.zero_()
        dead.branch.bias.zero_()
    small = quantize(dead, task, calibration=32)
    path = tmp_path / "net.onnx"
    export(small, task.example, path, calibration=task.calibration(32))
    assert measurement.agreement(small, path, task.calibration(32)).max_error < 0.01


def test_the_batch_axis_is_free(net: nn.Module, task: Task, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export(quantize(net, task, calibration=32), task.example, path, calibration=task.calibration(8))
    x = torch.cat(task.calibration(6))
    together = found(path, x)
    alone = torch.cat([found(path, image[None]) for image in x])
    torch.testing.assert_close(together, alone)


def test_a_fine_clip_survives_a_grid_that_reaches_further(task: Task, tmp_path: Path) -> None:
    """Range learning may widen a grid beyond ReLU6's limit; values above 6 must still be cut."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    with torch.no_grad():
        net[0].weight.mul_(40)
    small = quantize(net, task, calibration=32)
    small[2].input_quantizer.scale.mul_(1.7)
    path = tmp_path / "net.onnx"
    export(small, task.example, path, calibration=task.calibration(32))
    assert runtime.kernels(path)["QLinearConv"] == 2
    scale = largest(small, task)
    assert measurement.agreement(small, path, task.calibration(32)).max_error < 0.03 * scale


def test_two_readers_with_their_own_grids_each_get_theirs(task: Task, tmp_path: Path) -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.left, self.right = nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.stem(x))
            return torch.cat([self.left(x), self.right(x)], 1).mean((2, 3))

    torch.manual_seed(0)
    small = quantize(Fork().eval(), task, calibration=32)
    small.right.input_quantizer.scale.mul_(0.25)
    path = tmp_path / "net.onnx"
    export(small, task.example, path, calibration=task.calibration(32))
    scale = largest(small, task)
    assert measurement.agreement(small, path, task.calibration(32)).max_error < 0.03 * scale


def test_tokens_run_on_integer_matrix_products(task: Task, tmp_path: Path) -> None:
    """A linear layer on [N, T, C] is exported as a product with the transposed weight."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(48, 32), nn.Linear(32, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(torch.relu(self.one(x.permute(0, 2, 1, 3).flatten(2)))).mean(1)

    torch.manual_seed(0)
    small = quantize(Tokens().eval(), task, calibration=32)
    path = tmp_path / "net.onnx"
    export(small, task.example, path, calibration=task.calibration(32))
    kernels = runtime.kernels(path)
    assert not FLOAT_KERNELS & set(kernels), kernels
    assert measurement.agreement(small, path, task.calibration(32)).max_error < 0.02


def test_integer_activations_need_calibration(net: nn.Module, task: Task, tmp_path: Path) -> None:
    small = quantize(net, task, calibration=32)
    with pytest.raises(PenjingError, match="needs calibration images"):
        export(small, task.example, tmp_path / "net.onnx")


def test_weights_off_their_grid_are_refused(net: nn.Module, task: Task, tmp_path: Path) -> None:
    small = quantize(net, task, calibration=32)
    with torch.no_grad():
        small.branch.weight.add_(0.3 * small.branch.weight_format.scale[:, None, None, None])
    with pytest.raises(PenjingError, match="branch are not 8-bit integers times their scale"):
        export(small, task.example, tmp_path / "net.onnx", calibration=task.calibration(32))


def test_the_model_stays_as_it_was(net: nn.Module, task: Task, tmp_path: Path) -> None:
    small = quantize(net, task, calibration=32)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with torch.no_grad():
        output = small(task.example)
    export(small, task.example, tmp_path / "net.onnx", calibration=task.calibration(32))
    after = small.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(small(task.example), output)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Shuffled(nn.Module):
    """As ShuffleNet: one half of the channels goes on as it is, the other through layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, 2), nn.Linear(16, 10)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, changed = self.stem(x).relu().chunk(2, dim=1)
        x = torch.cat([kept, self.second(self.first(changed).relu()).relu()], 1)
        return self.head(x.mean((2, 3)))


def test_a_layer_may_read_any_part_of_a_split(task: Task, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = quantize(Shuffled().eval(), task, calibration=16)
    export(small, task.example, tmp_path / "m.onnx", calibration=task.calibration(16))
    kernels = runtime.kernels(tmp_path / "m.onnx")
    assert kernels["QLinearConv"] == 3 and not FLOAT_KERNELS & set(kernels)
    error = measurement.agreement(small, tmp_path / "m.onnx", task.calibration(16)).max_error
    assert error < 0.05 * largest(small, task)
