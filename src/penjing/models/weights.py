"""Load weights from a file into a model; nothing but tensors and plain values is unpickled.

Trainers wrap the state dict: in a checkpoint beside other things, under the names of the modules
around the model. Which tensors to take, and which prefixes to remove, follows from the model's names.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from penjing.errors import PenjingError, invalid
from penjing.progress import say
from penjing.tasks.preprocessing import Preprocessing

State = dict[str, Tensor]

PREPROCESSING = "preprocessing"
"""Key of a safetensors file's metadata: JSON of the preprocessing in training."""

CONTAINERS = (
    *("state_dict", "model", "model_state_dict", "params"),
    *("ema", "state_dict_ema", "model_ema", "params_ema"),
)
"""Keys under which trainers keep state dicts; others are searched after these."""
AVERAGED = re.compile(r"(^|[._])ema([._]|$)")
"""Pattern of the keys of weights that are a moving average over the training (EMA)."""
DEEPEST = 3
"""Largest depth of nested dicts that are searched."""
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Names that DataParallel, ``torch.compile``, FSDP and checkpointing give to the model inside."""
FORMER = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)
"""Patterns of outdated names in torchvision's published files, and their replacements."""
WITHOUT_EFFECT = ("num_batches_tracked", "n_averaged")
"""Names of counters, which are not in all files and have no effect on the output."""


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    optional: Sequence[str] = (),
    new_classes: int | None = None,
) -> None:
    """Copy the state dict in ``path`` into ``model``, in place.

    The file is .safetensors, or what ``torch.save`` wrote: a state dict or a training checkpoint with
    one, in which prefixes such as "module." or "_orig_mod." may stand before all names. Averaged
    (EMA) weights are preferred to plain ones, and a line on standard error says so. Values are cast
    to the model's types.

    Args:
        optional: prefixes of tensors that the file may have and the model lacks.
        new_classes: the model's number of classes. If the file differs in nothing else, the last
            layer keeps the model's values, and a line on standard error says so.

    Raises:
        PenjingError: an unreadable or rejected file, or tensors that do not fit the model.
    """
    path = Path(path)
    wanted = _tensors_of(model)
    state, place = _chosen(_read(path), wanted, optional, path)
    source = f"{path} (under {place!r})" if place else str(path)
    misfit = _misfit(state, wanted)
    head = _head(misfit, state, wanted, new_classes)
    if head is not None:
        say(f"{source}: {head.sentence}")
    elif misfit:
        raise PenjingError(f"{source}: {_explanation(misfit, state, wanted)}")
    _check_shared(state, wanted, source)
    kept = head.names if head is not None else ()
    with torch.no_grad():
        for name, value in wanted.items():
            if name in state and name not in kept:
                value.copy_(state[name])


def stored_preprocessing(path: str | Path) -> Preprocessing | None:
    """Read the preprocessing with which the weights in ``path`` were trained, as ``penjing train``
    writes it; None if the file has none.

    Raises:
        PenjingError: the stored preprocessing is damaged.
    """
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            stored = (file.metadata() or {}).get(PREPROCESSING)
        return Preprocessing.model_validate_json(stored) if stored is not None else None
    except SafetensorError:
        return None  # Reading the weights raises the error.
    except ValidationError as error:
        raise PenjingError(
            f"{path}: its metadata {PREPROCESSING!r} is damaged ({': '.join(invalid(error))}); train "
            "the weights again."
        ) from error


def _read(path: Path) -> object:
    """Read the tensors in ``path``, with the plain values around them."""
    if not path.is_file():
        raise PenjingError(f"{path}: no such weights file.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise PenjingError(f"{path}: not a readable safetensors file ({error}).") from error
    try:
        # A Namespace only keeps attributes; timm's trainer writes its options as one.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PenjingError(f"{path}: {_why_not_unpickled(str(error))}") from error
    except Exception as error:  # of any kind where bytes are damaged
        raise PenjingError(f"{path}: {_why_not_read(error)}") from error


def _why_not_unpickled(message: str) -> str:
    foreign = re.search(
        r"GLOBAL (\S+)|allowed globals.*?\[(\S+)\]|Unsupported class (\S+)", message
    )
    if foreign is None:
        reason = message.strip().splitlines()[0].removeprefix("Weights only load failed. ")
        found = re.search(r"WeightsUnpickler error: (.*)", message)
        return (
            f"is not a file of weights that can be read ({found.group(1) if found else reason}); "
            "give .safetensors, or what torch.save made of model.state_dict()."
        )
    name = next(group for group in foreign.groups() if group)
    return (
        f"holds Python objects beside tensors ({name}) and is not opened, because that may run code "
        "hidden in it; where it was made, write model.state_dict() alone with torch.save."
    )


def _why_not_read(error: Exception) -> str:
    if "TorchScript" in str(error):
        return (
            "is a TorchScript program and not a file of weights; write the state_dict() of the "
            "model it was made from with torch.save."
        )
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return f"cannot be read as PyTorch weights ({reason})."


@dataclass(frozen=True)
class _Found:
    """A state dict in a file; ``place`` holds the dotted keys that lead to it, empty at the top."""

    place: str
    state: State

    @property
    def rank(self) -> int:
        """Order of preference: 0 for averaged weights, 1 for those in a usual place, 2 for others."""
        if AVERAGED.search(self.place):
            return 0
        return 1 if not self.place or self.place.split(".")[-1] in CONTAINERS else 2


def _found(content: object, place: str = "", depth: int = 0) -> Iterator[_Found]:
    """Yield the state dicts in ``content``: at its top, in nested dicts, and behind a prefix."""
    if not isinstance(content, Mapping) or depth > DEEPEST:
        return
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    inside = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Mapping)}
    if tensors:
        yield _Found(place, tensors)
    for name in CONTAINERS:
        prefix = name + "."
        behind = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if behind and len(behind) < len(tensors):
            yield _Found(_joined(place, name), behind)
    for name, part in inside.items():
        yield from _found(part, _joined(place, name), depth + 1)


def _joined(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _chosen(
    content: object, wanted: State, optional: Sequence[str], path: Path
) -> tuple[State, str]:
    """Choose the state dict in ``content`` that fits the model best, in the model's names, and its
    place."""
    found = [
        _Found(one.place, _without_ballast(_renamed(one.state, wanted), wanted, optional))
        for one in _found(content)
    ]
    if not found:
        raise PenjingError(
            f"{path}: holds {_described(content)}, expected a state dict of named tensors."
        )
    ranks = [_nearness(one.state, wanted) for one in found]
    best = [one for one, rank in zip(found, ranks, strict=True) if rank == max(ranks)]
    best.sort(key=lambda one: one.rank)
    misfit = _misfit(best[0].state, wanted)
    if misfit.missing or misfit.unexpected:
        return best[0].state, best[0].place
    first, others = best[0], [one for one in best[1:] if not _equal(one.state, best[0].state)]
    unclear = [one.place for one in others if one.rank == first.rank]
    if unclear:
        names = " and ".join(repr(place or "its top") for place in (first.place, *unclear))
        raise PenjingError(
            f"{path}: holds several sets of weights that fit the model alike, under {names}; write "
            "the one to load to a file of its own."
        )
    # Averages of the parameters alone lack the norms' statistics.
    others += [
        one
        for one, rank in zip(found, ranks, strict=True)
        if rank < max(ranks) and one.rank == 0 and one.state.keys() & wanted.keys()
    ]
    if others:
        left = ", ".join(repr(one.place or "its top") for one in others)
        say(f"{path}: took the weights under {first.place!r}, not those under {left}")
    return first.state, first.place


def _nearness(state: State, wanted: State) -> tuple[int, int]:
    """Return how well ``state`` fits, higher is better; where nothing fits, its size."""
    fitting = sum(name in wanted and _fits(state[name], wanted[name]) for name in state)
    return fitting, -len(_misfit(state, wanted)) if fitting else len(state)


def _described(content: object) -> str:
    kind = f"a {type(content).__name__}"
    if isinstance(content, Mapping) and content:
        return f"{kind} of {', '.join(repr(key) for key in list(content)[:3])}"
    return kind


def _equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        value.shape == other[name].shape and torch.equal(value, other[name])
        for name, value in one.items()
    )


def _renamed(state: State, wanted: State) -> State:
    """Rename ``state`` to the model's names, as far as removing prefixes gives them."""
    given, known = list(state), set(wanted)
    best = {name: name for name in given}
    for names in _renamings(given, list(wanted)):
        if _hits(names, known) > _hits(best, known):
            best = names
    return {best[name]: value for name, value in state.items()}


def _hits(names: dict[str, str], known: set[str]) -> int:
    return sum(new in known for new in names.values())


def _renamings(given: list[str], wanted: list[str]) -> Iterator[dict[str, str]]:
    """Yield maps from names in the file to names in the model, nearest first.

    1. Outdated names of torchvision are replaced.
    2. Names of wrappers are removed on both sides: ``backbone._orig_mod.stem.weight``.
    3. First components that all names of one side share are removed too: ``net.stem.weight``.
    """
    modern = [_modern(name) for name in given]
    theirs, ours = [_bare(name) for name in modern], [_bare(name) for name in wanted]
    if len(set(theirs)) < len(theirs) or len(set(ours)) < len(ours):
        theirs, ours = modern, wanted
    cuts = [(cut, 0) for cut in range(_shared(theirs) + 1)]
    cuts += [(0, cut) for cut in range(1, _shared(ours) + 1)]
    for mine, cut in cuts:
        known = {_cut(bare, cut): name for bare, name in zip(ours, wanted, strict=True)}
        pairs = zip(given, (_cut(bare, mine) for bare in theirs), strict=True)
        yield {name: known.get(bare, name if bare in given else bare) for name, bare in pairs}


def _modern(name: str) -> str:
    for former, new in FORMER:
        name = former.sub(new, name)
    return name


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _shared(names: list[str]) -> int:
    """Count the first components that all ``names`` share, except names of counters."""
    split = [name.split(".")[:-1] for name in names if not name.endswith(WITHOUT_EFFECT)]
    shared = 0
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    return shared


def _cut(name: str, components: int) -> str:
    return ".".join(name.split(".")[components:])


def _without_ballast(state: State, wanted: State, optional: Sequence[str]) -> State:
    """Remove the tensors that the model lacks and need not have."""
    return {
        name: value
        for name, value in state.items()
        if name in wanted or not (name.startswith(tuple(optional)) or name.endswith(WITHOUT_EFFECT))
    }


def _tensors_of(model: nn.Module) -> State:
    """Return the parameters and buffers of ``model`` that its state dict has, under all names."""
    lying: State = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    lazy = next((name for name, value in lying.items() if is_lazy(value)), None)
    if lazy is not None:
        raise PenjingError(
            f"The model's {lazy!r} has no shape yet (a lazy layer); run one input through the model "
            "before it is returned."
        )
    return {name: lying[name] for name in model.state_dict() if name in lying}


@dataclass(frozen=True)
class _Misfit:
    """Names of tensors that the file lacks, has in excess, or has in another shape or type."""

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)


def _misfit(state: State, wanted: State) -> _Misfit:
    there = {_place(value) for name, value in wanted.items() if name in state}
    return _Misfit(
        # A tensor with two names may be written under one of them.
        [
            name
            for name, value in wanted.items()
            if not (name in state or name.endswith(WITHOUT_EFFECT) or _place(value) in there)
        ],
        [name for name in state if name not in wanted],
        [name for name in wanted if name in state and not _fits(state[name], wanted[name])],
    )


def _place(value: Tensor) -> tuple[object, ...]:
    """Return the place of ``value`` in memory, which tells a tensor that has two names."""
    if value.numel() == 0:
        return (id(value),)
    return value.data_ptr(), value.shape, value.stride()


def _fits(value: Tensor, wanted: Tensor) -> bool:
    plain = value.layout == torch.strided and not (value.is_quantized or value.is_meta)
    same_kind = value.is_floating_point() == wanted.is_floating_point()
    same_kind = same_kind and value.is_complex() == wanted.is_complex()
    return plain and same_kind and value.shape == wanted.shape


def _check_shared(state: State, wanted: State, source: str) -> None:
    """Raise PenjingError when the file has two values for a tensor that has two names."""
    first: dict[tuple[object, ...], str] = {}
    for name in (name for name in wanted if name in state):
        other = first.setdefault(_place(wanted[name]), name)
        if not torch.equal(state[other], state[name]):
            raise PenjingError(
                f"{source}: {other!r} and {name!r} are one tensor in the model and two different "
                "ones in the file; build the model without tied weights, or save it with them."
            )


@dataclass(frozen=True)
class _Head:
    """Names of the last layer's tensors, and the sentence about them for the user."""

    names: list[str]
    sentence: str


def _head(misfit: _Misfit, state: State, wanted: State, classes: int | None) -> _Head | None:
    """Find the last layer if file and model differ in the number of classes alone, now ``classes``.

    Its tensors have one length along their first axis in the file, and ``classes`` in the model, and
    are alike along all other axes.
    """
    counts = _class_counts(misfit, state, wanted)
    if counts is None or counts[1] != classes:
        return None
    names = list(dict.fromkeys(name.rpartition(".")[0] or name for name in misfit.reshaped))
    layers = ", ".join(names)
    return _Head(
        misfit.reshaped,
        f"made a new last layer ({layers}): {counts[0]} classes before, {classes} now",
    )


def _class_counts(misfit: _Misfit, state: State, wanted: State) -> tuple[int, int] | None:
    """Return the numbers of classes in file and model, if nothing else differs."""
    if misfit.missing or misfit.unexpected or not misfit.reshaped:
        return None
    pairs = [(state[name], wanted[name]) for name in misfit.reshaped]
    if any(not (a.dim() and b.dim()) or a.shape[1:] != b.shape[1:] for a, b in pairs):
        return None
    counts = {(a.shape[0], b.shape[0]) for a, b in pairs}
    layers = {name.rpartition(".")[0] for name in misfit.reshaped}
    whole = all(
        name in misfit.reshaped for name in wanted if name.rpartition(".")[0] in layers - {""}
    )
    return counts.pop() if len(counts) == 1 and whole else None


def _explanation(misfit: _Misfit, state: State, wanted: State) -> str:
    counts = _class_counts(misfit, state, wanted)
    if counts is not None:
        layer = misfit.reshaped[0].rpartition(".")[0] or misfit.reshaped[0]
        return (
            f"has weights for {counts[0]} classes and the data have {counts[1]} (layer {layer}); "
            "train a new last layer first: penjing train MODEL --weights FILE --data DATA."
        )
    key = (misfit.reshaped + misfit.missing + misfit.unexpected)[0]
    of = sum(name in state or not name.endswith(WITHOUT_EFFECT) for name in wanted)
    return (
        f"does not fit the model: {key!r} should be {_shape(wanted, key)} and is "
        f"{_shape(state, key)} ({len(misfit.missing)} of {of} tensors missing, "
        f"{len(misfit.unexpected)} unexpected, {len(misfit.reshaped)} of another shape"
        f"{_examples(misfit, state, wanted)}); check the model's name and num_classes."
    )


def _examples(misfit: _Misfit, state: State, wanted: State) -> str:
    """Write three names of the file and three of the model, preferring those that differ."""
    if not (misfit.missing or misfit.unexpected):
        return ""
    theirs, ours = misfit.unexpected or list(state), misfit.missing or list(wanted)
    shown = [", ".join(repr(name) for name in names[:3]) for names in (theirs, ours)]
    return f"; the file has {shown[0]}, the model {shown[1]}"


def _shape(state: State, key: str) -> str:
    if key not in state:
        return "absent"
    value = state[key]
    kind = "" if value.is_floating_point() else f" of {str(value.dtype).removeprefix('torch.')}"
    return f"{list(value.shape)}{kind}"
