"""Hashes of models, losses and any other values: equal in every process, and different whenever
their behaviour may be.

Functions and classes of the user are read: bytecode, constants, defaults, the values that a closure
holds, and the globals that the code names, in turn. Those of installed packages and of Python itself
are known by their name and the package's version. Nothing is called but ``__reduce_ex__``, by which
objects say what they are made of.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from penjing.errors import PenjingError

PLAIN: tuple[type, ...] = (bool, int, float, complex, str, bytes, range, slice)
PLAIN += (types.NoneType, types.EllipsisType)
PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format)
INSTALLED = [Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib", "stdlib")]
SLOT: tuple[type, ...] = (
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    types.WrapperDescriptorType,
)
SLOT += (types.MethodDescriptorType, types.ClassMethodDescriptorType)
"""Types of attributes that Python or C made for a class; class and name identify them."""
OF_CLASSES = {"__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "_abc_impl"}
OF_CLASSES |= {"__annotations__", "__firstlineno__", "__static_attributes__", "__slots__"}
"""Entries of every class that have no effect on its behaviour."""
OF_MODULES = {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
OF_MODULES |= {"_is_full_backward_hook", "_backward_hooks", "_backward_pre_hooks", "_graph"}
OF_MODULES |= {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"}
OF_MODULES |= {"_load_state_dict_post_hooks"}
"""Attributes of every module that are hashed elsewhere, or have no effect on what it computes."""


class UnidentifiedError(PenjingError):
    """A value holds state that cannot be identified in another process, such as a lock."""


def of(*values: Any) -> bytes:
    """Return the SHA-256 of ``values``: numbers, text, containers, tensors, modules, functions,
    objects.

    A module counts with its structure, its weights, buffers and plain tensors. An object that cannot
    be identified counts by its type and its attribute ``name``.

    Raises:
        UnidentifiedError: an object that cannot be identified has no ``name``.
    """
    return _Reader(weights=True).read(values)


def structure(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of ``model`` without the values of its parameters and buffers: their
    shapes, the types and settings of its modules, the code of the user's own modules, and the
    versions of the packages that others come from.

    Raises:
        UnidentifiedError: an object that cannot be identified has no ``name``.
    """
    return _Reader(weights=False).read(model).hex()


class _Reader:
    """Hash values by their parts; ``weights``: with the values of modules' tensors."""

    def __init__(self, *, weights: bool) -> None:
        self.weights = weights
        self.stack: list[int] = []
        # The values are kept, so that no other gets their address, which is the key.
        self.known: dict[int, tuple[Any, bytes]] = {}

    def read(self, value: Any) -> bytes:
        if isinstance(value, PLAIN) and not isinstance(value, enum.Enum):
            return _hash([type(value).__name__.encode(), repr(value).encode()])
        if id(value) in self.known:
            return self.known[id(value)][1]
        if id(value) in self.stack:
            return _hash([b"cycle", str(len(self.stack) - self.stack.index(id(value))).encode()])
        self.stack.append(id(value))
        try:
            found = _hash(self.parts(value))
        except UnidentifiedError:
            if _name(value) is None:
                raise
            found = _hash([b"named", str(_name(value)).encode()])
        finally:
            self.stack.pop()
        self.known[id(value)] = value, found
        return found

    def parts(self, value: Any) -> Iterator[bytes]:
        """Yield the parts of ``value`` that are hashed."""
        for kind, parts in _KINDS:
            if isinstance(value, kind):
                yield kind.__name__.encode()
                yield from parts(self, value)
                return
        yield from self.instance(value)

    def sequence(self, values: Iterable[Any]) -> Iterator[bytes]:
        yield from map(self.read, values)

    def collection(self, values: Iterable[Any]) -> Iterator[bytes]:
        yield from sorted(map(self.read, values))

    def mapping(self, values: Mapping[Any, Any]) -> Iterator[bytes]:
        for key, value in values.items():
            yield self.read(key)
            yield self.read(value)

    def enumeration(self, value: enum.Enum) -> Iterator[bytes]:
        yield self.read(type(value))
        yield value.name.encode()

    def tensor(self, value: Tensor) -> Iterator[bytes]:
        yield _shape(value)
        yield _bytes(value)

    def array(self, value: np.ndarray | np.generic) -> Iterator[bytes]:
        if value.dtype.hasobject:
            yield from self.sequence(value.ravel().tolist())
        yield f"{value.dtype.str} {value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()

    def package(self, value: types.ModuleType) -> Iterator[bytes]:
        yield _version(value.__name__).encode()

    def partial(self, value: functools.partial[Any]) -> Iterator[bytes]:
        yield from self.sequence([value.func, value.args, value.keywords])

    def method(self, value: types.MethodType) -> Iterator[bytes]:
        yield from self.sequence([value.__func__, value.__self__])

    def builtin(self, value: types.BuiltinFunctionType) -> Iterator[bytes]:
        yield f"{value.__module__} {value.__qualname__}".encode()
        if not isinstance(value.__self__, types.ModuleType | types.NoneType | type):
            yield self.read(value.__self__)

    def wrapper(self, value: Any) -> Iterator[bytes]:
        yield self.read(getattr(value, "__wrapped__", None) or value.__func__)

    def slot(self, value: Any) -> Iterator[bytes]:
        # Only the name of the class, which may be the one that is being read.
        yield f"{_version(value.__objclass__.__module__)} {value.__qualname__}".encode()

    def accessor(self, value: property) -> Iterator[bytes]:
        yield from self.sequence([value.fget, value.fset, value.fdel])

    def function(self, value: types.FunctionType) -> Iterator[bytes]:
        if _installed(value.__module__):
            yield f"{_version(value.__module__)} {value.__qualname__}".encode()
        else:
            yield self.read(value.__code__)
            yield from self.mapping(_globals(value))
        yield self.read(value.__defaults__)
        yield self.read(value.__kwdefaults__)
        yield from self.sequence(_cells(value))

    def code(self, value: types.CodeType) -> Iterator[bytes]:
        yield value.co_code + value.co_exceptiontable
        names = [value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars]
        counts = [value.co_argcount, value.co_kwonlyargcount, value.co_posonlyargcount]
        yield from self.sequence([*names, *counts, value.co_flags, value.co_consts])

    def kind(self, value: type) -> Iterator[bytes]:
        if _installed(value.__module__):
            yield f"{_version(value.__module__)} {value.__qualname__}".encode()
            return
        yield value.__name__.encode()
        yield from self.sequence(value.__bases__)
        own = {k: v for k, v in vars(value).items() if k not in OF_CLASSES}
        yield from self.mapping({k: v for k, v in own.items() if not k.startswith("__pydantic")})

    def scripted(self, value: torch.jit.ScriptModule) -> Iterator[bytes]:
        yield str(value.inlined_graph).encode()
        yield from self.tensors(value)

    def module(self, value: nn.Module) -> Iterator[bytes]:
        yield self.read(type(value))
        if isinstance(value, fx.GraphModule):
            yield value.code.encode()
        settings = {k: v for k, v in vars(value).items() if k not in OF_MODULES and not _empty(v)}
        for name in sorted(settings):
            yield name.encode()
            try:
                yield self.read(settings[name])
            except UnidentifiedError:
                if _name(value) is None:
                    raise
                yield str(_name(value)).encode()
        yield from self.tensors(value)
        for name, child in value._modules.items():
            yield name.encode()
            yield self.read(child)

    def tensors(self, value: nn.Module) -> Iterator[bytes]:
        """Yield the module's own parameters and buffers, which may be shared."""
        own = [*value.named_parameters("", False, False), *value.named_buffers("", False, False)]
        if isinstance(value, torch.jit.ScriptModule):
            own = [*value.named_parameters(), *value.named_buffers()]
        for name, one in own:
            yield name.encode() + _shape(one) + type(one).__name__.encode()
            if self.weights:
                yield b"trained" if one.requires_grad else b"fixed"
            yield b"first" if id(one) not in self.known else b"shared"
            self.known.setdefault(id(one), (one, _hash(self.tensor(one)) if self.weights else b""))
            yield self.known[id(one)][1]

    def instance(self, value: Any) -> Iterator[bytes]:
        """Yield the parts from which ``copy`` and ``pickle`` would rebuild ``value``."""
        try:
            made = value.__reduce_ex__(2)
        except Exception as error:
            raise _unidentified(value) from error
        if isinstance(made, str):
            yield f"{_version(type(value).__module__)} {made}".encode()
            return
        make, arguments, *state = made
        yield from self.sequence([type(value), make, arguments])
        yield from self.sequence(list(s) if isinstance(s, Iterator) else s for s in state)


_KINDS: list[tuple[type, Callable[[_Reader, Any], Iterator[bytes]]]] = [
    (enum.Enum, _Reader.enumeration),
    (Tensor, _Reader.tensor),
    (np.ndarray, _Reader.array),
    (np.generic, _Reader.array),
    (torch.jit.ScriptModule, _Reader.scripted),
    (nn.Module, _Reader.module),
    (type, _Reader.kind),
    (types.ModuleType, _Reader.package),
    (types.FunctionType, _Reader.function),
    (types.MethodType, _Reader.method),
    (types.BuiltinFunctionType, _Reader.builtin),
    (types.CodeType, _Reader.code),
    (functools.partial, _Reader.partial),
    (functools._lru_cache_wrapper, _Reader.wrapper),
    (staticmethod, _Reader.wrapper),
    (classmethod, _Reader.wrapper),
    (property, _Reader.accessor),
    *((kind, _Reader.slot) for kind in SLOT),
    (dict, _Reader.mapping),
    (list, _Reader.sequence),
    (tuple, _Reader.sequence),
    (set, _Reader.collection),
    (frozenset, _Reader.collection),
]


def _hash(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _shape(value: Tensor) -> bytes:
    return f"{value.dtype} {list(value.shape)}".encode()


def _bytes(value: Tensor) -> bytes:
    plain = value.detach().cpu()
    if plain.is_sparse or plain.is_quantized or plain.layout != torch.strided:
        plain = plain.dequantize() if plain.is_quantized else plain.to_dense()
    return plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _name(value: Any) -> str | None:
    """Return the type of ``value`` and the name that its owner gave it, if any."""
    name, kind = getattr(value, "name", None), type(value)
    return f"{kind.__module__} {kind.__qualname__} {name}" if isinstance(name, str) else None


def _unidentified(value: Any) -> UnidentifiedError:
    kind = type(value)
    return UnidentifiedError(
        f"A {kind.__module__}.{kind.__qualname__} cannot be told from another one in a later run; "
        "give it, or what holds it, an attribute 'name' that changes whenever what it does changes."
    )


def _empty(value: Any) -> bool:
    """Whether ``value`` is an empty dict, as of hooks; modules of old files lack the attribute."""
    return isinstance(value, dict) and not value


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # Not filled yet.
            yield None


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """Find the globals that the code of ``function`` names, and the attributes of the user's own
    modules that it names."""
    names = sorted(set(_names(function.__code__)))
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, value in list(found.items()):
        if isinstance(value, types.ModuleType) and not _installed(value.__name__):
            own = [other for other in names if hasattr(value, other)]
            found |= {f"{name}.{other}": getattr(value, other) for other in own}
    return found


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


@functools.cache
def _installed(module: str | None) -> bool:
    """Whether ``module`` belongs to an installed package, penjing or Python."""
    top = (module or "builtins").partition(".")[0]
    if top == "penjing" or top in sys.stdlib_module_names:
        return top != "__main__"
    found = sys.modules.get(module or "")
    try:
        file = inspect.getsourcefile(found) if found is not None else None
    except TypeError:  # Written in C, or made by a program.
        return found is not None and (top in sys.builtin_module_names or bool(_homes(top)))
    if file is None:
        return False
    return any(p in INSTALLED or p in _homes(top) for p in Path(file).resolve().parents)


@functools.cache
def _homes(top: str) -> list[Path]:
    """Find the folders of the installed packages that have a module ``top``; the code of an editable
    package lies elsewhere, and may change."""
    names = _distributions().get(top, [])
    return [Path(str(metadata.distribution(name).locate_file(""))).resolve() for name in names]


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


@functools.cache
def _version(module: str | None) -> str:
    """Return ``module`` and the version of its package."""
    top = (module or "builtins").partition(".")[0]
    said = getattr(sys.modules.get(top), "__version__", None)
    return f"{module} {said or ' '.join(map(metadata.version, _distributions().get(top, [])))}"
