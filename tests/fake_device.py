"""A device that PyTorch does not have here: tensors on it do not mix with those on the CPU.

A tensor on it is a ``FakeDeviceTensor``: it says that its device is ``meta``, and holds its values on
the CPU. Every operation passes ``__torch_dispatch__``, where what a GPU would refuse is refused: an
operation on tensors of both kinds. Numbers (tensors without axes) may lie on the CPU, and a copy may
lead from one to the other, as with CUDA. NumPy cannot read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import UnsupportedOperatorException
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
TENSOR = torch.tensor
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
# What is on a GPU may be indexed by what is on the CPU.
INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten.index_put.default,
}


class FakeDeviceTensor(Tensor):
    """A tensor on the fake device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> FakeDeviceTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FakeDeviceTensor({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return FakeDeviceTensor(self.held.new_tensor(data, **options))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _FakeDevice(TorchDispatchMode):
    """What makes tensors from nothing, or moves them, must know the device, too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = [isinstance(tensor, FakeDeviceTensor) for tensor in tensors]
    if function in INDEXING and there[0]:
        tensors = [tensors[0], *(x for x in args[2:] if isinstance(x, Tensor))]
    strangers = [x for x in tensors if not isinstance(x, FakeDeviceTensor)]
    if any(there) and function not in COPIES and any(x.dim() for x in strangers):
        raise RuntimeError(f"{function}: expected all tensors on one device, found two")
    onto = kwargs.get("device")
    result_there = any(there) if onto is None else torch.device(onto) == DEVICE
    if onto is not None:
        kwargs = kwargs | {"device": _there(onto)}
    if function is torch.ops.aten.copy_.default:
        result_there = there[0]
    result = function(*_held(args), **_held(kwargs))
    return _returned(result, args, kwargs, function) if result_there else result


def _there(device: Any) -> torch.device:
    """Where the values of what is on ``device`` lie."""
    return torch.device("cpu") if torch.device(device) == DEVICE else torch.device(device)


def _held(values: Any) -> Any:
    return tree_map(lambda x: x.held if isinstance(x, FakeDeviceTensor) else x, values)


def _returned(result: Any, args: Any, kwargs: Any, function: Any) -> Any:
    """What an operation in place returns is the tensor it was given."""
    given = {
        id(x.held): x for x in tree_flatten((args, kwargs))[0] if isinstance(x, FakeDeviceTensor)
    }

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return given[id(value)] if id(value) in given else FakeDeviceTensor(value)

    return tree_map(wrapped, result)


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, _there(device))


@contextmanager
def fake_device() -> Iterator[torch.device]:
    """The device, there until the block ends."""
    with (
        mock.patch("torch.autocast", _no_autocast),
        mock.patch("torch.Generator", _Generator),
        mock.patch("torch.tensor", _tensor),
        # A mode of PyTorch's for shapes without values, which does not know the tensors here.
        mock.patch(
            "penjing.net.profiling.FakeTensorMode", side_effect=UnsupportedOperatorException(0)
        ),
        mock.patch("torch.onnx.export", _outside(torch.onnx.export)),
        _FakeDevice(),
    ):
        yield DEVICE


def _tensor(data: Any, device: Any = "cpu", **options: Any) -> Tensor:
    made = TENSOR(data, device=_there(device or "cpu"), **options)
    return made.to(device or "cpu")


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` without the mode: the exporter has modes of its own, and only sees the CPU."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


@contextmanager
def _no_autocast(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield
