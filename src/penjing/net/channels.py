"""Find the channels of a model that can only be removed together, and remove them.

Removing an output channel of a layer takes the same channel out of everything that is added to it,
concatenated with it or reads it (Fang et al. 2023, arXiv:2301.12900). Torch-Pruning finds these
groups; here each is checked by a trial on the model itself, and the channels are cut.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch_pruning.dependency import index_mapping

from penjing.errors import PenjingError
from penjing.net import layers
from penjing.tasks.outputs import evaluating, same, tensors

LARGEST_TRIAL = 0.3
"""Largest share of a group's units that is removed on trial."""

Side = Literal["in", "out"]


@dataclass
class Slice:
    """Channels of one layer: ``channels[i]`` (int64) goes when unit ``units[i]`` (int64) goes.

    ``side`` is ``in`` for the channels a convolution or linear layer reads; ``out`` for those it
    makes, and for layers that treat each channel alone (batch norm, depthwise convolution).
    """

    layer: str
    side: Side
    channels: Tensor
    units: Tensor


@dataclass
class Group:
    """Coupled channels: ``units`` sets of channels; each set can be removed, but only as a whole."""

    units: int
    slices: list[Slice]

    @property
    def root(self) -> Slice:
        """Slice of the layer that computes the channels."""
        return self.slices[0]

    @property
    def channels_per_unit(self) -> int:
        return len(self.root.channels) // self.units

    def rounded(self, left: int, round_to: int) -> int:
        """Return the fewest units, at least ``left``, whose channels are a multiple of ``round_to``;
        all units if there are none."""
        multiple = round_to // math.gcd(round_to, self.channels_per_unit)
        return min(math.ceil(left / multiple) * multiple, self.units)

    def removed(self, piece: Slice, units: Tensor) -> Tensor:
        """Return the channels of ``piece``, int64, that go with ``units`` (bool ``[self.units]``)."""
        return piece.channels[units[piece.units]]


Removal = Sequence[tuple[Group, Tensor]]
"""Groups with the units to remove, bool ``[group.units]``."""


def groups(model: nn.Module, example: Tensor) -> list[Group]:
    """Find the groups of channels of ``model`` that can be removed without other changes.

    A group is left out when its channels reach the output (the classifier), pass through a layer
    that mixes them otherwise (layer norm, attention), or when a trial shows that removing them
    differs from zeroing them (shortcuts padded with zeros, fixed channel counts in the code).

    Args:
        example: one input, float32 ``[1, C, H, W]``, on the model's device.
    """
    plain = _plain_copy(model)
    found = _traced(plain, example)
    return _sound(*_precise(plain, example), [], found)


def silence(model: nn.Module, removal: Removal) -> None:
    """Zero the weights that read the channels of ``removal``, in place: the net computes what it will
    once they are removed."""
    for name, channels in reading(removal).items():
        layer = model.get_submodule(name)
        weight = layers.original(layer).detach()
        layers.set_original(layer, "weight", weight * column_mask(layer, channels))


def reading(removal: Removal) -> dict[str, Tensor]:
    """Return the inputs, int64, of each layer that reads channels of ``removal``, by its name."""
    columns: dict[str, list[Tensor]] = {}
    for group, units in removal:
        for piece in group.slices:
            if piece.side == "in":
                columns.setdefault(piece.layer, []).append(group.removed(piece, units))
    return {name: torch.cat(parts) for name, parts in columns.items()}


def column_mask(layer: nn.Module, channels: Tensor) -> Tensor:
    """Return a mask of the weight of ``layer``: 0 where it reads input ``channels``, else 1. It has
    the weight's number of axes and broadcasts over it, so that large layers are not copied."""
    weight = layers.original(layer)
    count = getattr(layer, "groups", 1)
    columns = weight.shape[1]
    mask = weight.new_ones(count, 1, columns)
    channels = channels.to(weight.device)
    mask[channels // columns, :, channels % columns] = 0
    rows = 1 if count == 1 else len(weight) // count
    return mask.expand(-1, rows, -1).reshape(-1, columns, *[1] * (weight.dim() - 2))


def by_channel(values: Tensor, piece: Slice, groups: int) -> Tensor:
    """Sum a weight's ``values`` over each channel on the side of ``piece``, float64; ``groups`` are
    the convolution's."""
    values = values.double().cpu()
    if piece.side == "out":
        return values.flatten(1).sum(1)
    rows, columns = len(values) // groups, values.shape[1]
    return values.reshape(groups, rows, columns, -1).sum((1, 3)).flatten()


def remove(model: nn.Module, removal: Removal) -> dict[str, tuple[int, int]]:
    """Remove channels from ``model``, in place.

    Layers that have become ``Identity`` are skipped; a layer that has become a ``Sequential`` loses
    inputs of its first part and outputs of its last.

    Returns:
        The number of outputs before and after of each convolution and linear layer that lost some.

    Raises:
        PenjingError: a technique has replaced a layer by one whose channels cannot be removed.
    """
    widths: dict[str, tuple[int, int]] = {}
    for (name, side), channels in _cuts(removal).items():
        layer = entry(model, name) if side == "in" else leaving(model, name)
        layers.unparametrize(layer)
        if isinstance(layer, layers.Layer):
            before = len(layer.weight)
            _cut_layer(layer, side, channels)
            if side == "out":
                widths[name] = (before, len(layer.weight))
        else:
            _cut_other(name, layer, channels)
    return widths


def entry(model: nn.Module, name: str) -> nn.Module:
    """Return the layer that reads the input of ``name``: its first part once it is factorized."""
    layer = model.get_submodule(name)
    while isinstance(layer, nn.Sequential):
        layer = layer[0]
    return layer


def leaving(model: nn.Module, name: str) -> nn.Module:
    """Return the layer that makes the output of ``name``: its last part once it is factorized."""
    layer = model.get_submodule(name)
    while isinstance(layer, nn.Sequential):
        layer = layer[-1]
    return layer


def _cuts(removal: Removal) -> dict[tuple[str, Side], Tensor]:
    cuts: dict[tuple[str, Side], list[Tensor]] = {}
    for group, units in removal:
        for piece in group.slices:
            gone = group.removed(piece, units)
            if len(gone):
                cuts.setdefault((piece.layer, piece.side), []).append(gone)
    return {key: torch.cat(parts).unique() for key, parts in cuts.items()}


def _left(count: int, gone: Tensor, device: torch.device) -> Tensor:
    keep = torch.ones(count, dtype=torch.bool)
    keep[gone.cpu()] = False
    return keep.nonzero().flatten().to(device)


def _cut_layer(layer: Any, side: Side, gone: Tensor) -> None:
    if side == "out":
        _cut_outputs(layer, _left(len(layer.weight), gone, layer.weight.device))
    else:
        inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        _cut_inputs(layer, _left(inputs, gone, layer.weight.device), inputs)


def _cut_outputs(layer: Any, left: Tensor) -> None:
    depthwise = layers.is_depthwise(layer)
    _shrink(layer, "weight", layer.weight[left])
    if layer.bias is not None:
        _shrink(layer, "bias", layer.bias[left])
    weight_format = getattr(layer, "weight_format", None)
    if isinstance(weight_format, layers.IntegerWeights):
        layer.weight_format = layers.IntegerWeights(
            weight_format.bits, weight_format.scale[left.to(weight_format.scale.device)]
        )
    if isinstance(layer, nn.Linear):
        layer.out_features = len(left)
        return
    layer.out_channels = len(left)
    if depthwise:
        layer.groups = layer.in_channels = len(left)


def _cut_inputs(layer: Any, left: Tensor, inputs: int) -> None:
    if isinstance(layer, nn.Linear):
        _shrink(layer, "weight", layer.weight[:, left])
        layer.in_features = len(left)
        return
    # Each of a convolution's groups reads its own columns, and keeps equally many.
    per_group = inputs // layer.groups
    columns = left.view(layer.groups, -1) % per_group
    parts = layer.weight.chunk(layer.groups)
    kept = [part[:, chosen] for part, chosen in zip(parts, columns, strict=True)]
    _shrink(layer, "weight", torch.cat(kept))
    layer.in_channels = len(left)


def _cut_other(name: str, layer: nn.Module, gone: Tensor) -> None:
    if isinstance(layer, nn.Identity):
        return  # A batch norm that a later technique has folded into its layer.
    if isinstance(layer, _BatchNorm):
        left = _left(layer.num_features, gone, _device(layer))
        layer.num_features = len(left)
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            if getattr(layer, tensor) is not None:
                _shrink(layer, tensor, getattr(layer, tensor)[left])
    elif isinstance(layer, nn.PReLU):
        left = _left(layer.num_parameters, gone, _device(layer))
        layer.num_parameters = len(left)
        _shrink(layer, "weight", layer.weight[left])
    else:
        raise PenjingError(
            f"Channels of layer {name} cannot be cut because another technique has made it a "
            f"{type(layer).__name__}; put prune_channels into an earlier stage."
        )


def _device(layer: nn.Module) -> torch.device:
    tensors = [*layer.parameters(), *layer.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _shrink(layer: nn.Module, name: str, value: Tensor) -> None:
    value = value.detach()
    old = getattr(layer, name)
    parameter = isinstance(old, nn.Parameter)
    setattr(
        layer, name, nn.Parameter(value, requires_grad=old.requires_grad) if parameter else value
    )


def _plain_copy(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model).eval()
    for module in list(plain.modules()):
        layers.unparametrize(module)
    return plain.requires_grad_(True)


def _traced(model: nn.Module, example: Tensor, prefix: str = "") -> list[Group]:
    """Trace the groups of ``model``; of its children if it cannot be traced as a whole."""
    try:
        return _followed(model, example, prefix)
    # The library raises whatever its index arithmetic runs into (channel shuffles, for example).
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError):
        inputs = _inputs_of_children(model, example)
        parts = [_traced(model.get_submodule(n), i, f"{prefix}{n}.") for n, i in inputs.items()]
        return [group for part in parts for group in part]


def _followed(model: nn.Module, example: Tensor, prefix: str) -> list[Group]:
    # On a copy, because tracing may leave attributes on the modules.
    model = copy.deepcopy(model)
    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        graph.build_dependency(model, example, verbose=False)
        index_mapping.update_index_mapping(graph)
        found = list(_coupled(graph))
    names = {module: prefix + name for name, module in model.named_modules()}
    made = [_group(graph, coupled, names) for coupled in found]
    return [group for group in made if group is not None]


class _Index(NamedTuple):
    """A channel and its unit, under the names that the library's mappings read."""

    idx: int
    root_idx: int


@dataclass
class _Coupled:
    """Channels that are coupled with the ``units`` outputs of a layer."""

    units: int
    places: dict[tuple[Any, Any], dict[int, int]]
    """Unit of each channel, by node of the library's graph and its pruning function."""
    ties: set[tuple[int, int]]
    """Pairs of units that share a channel."""


def _coupled(graph: Any) -> Iterator[_Coupled]:
    """Yield the channels coupled with the outputs of each convolution and linear layer, unless an
    earlier layer's outputs are among them."""
    visited = set()
    compressible = [module for module in graph.module2node if isinstance(module, layers.Layer)]
    widest = max((max(_widths(layer)) for layer in compressible), default=0)
    for layer in compressible:
        found = _coupled_with(graph, layer, widest) if layer not in visited else None
        if found is not None:
            cut = graph.is_out_channel_pruning_fn
            visited |= {node.module for node, function in found.places if cut(function)}
            yield found


def _widths(layer: layers.Layer) -> tuple[int, int]:
    """Return the numbers of input and output channels."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _coupled_with(graph: Any, layer: nn.Module, widest: int) -> _Coupled | None:
    """Find the channels coupled with the outputs of ``layer``; None if the library cannot tell
    (grouped-query attention), or misreads the order of channels, so that one would have a higher
    number than the ``widest`` layer has channels.

    The library's ``get_pruning_group`` follows all channels along all paths, which never ends for
    attention that splits and joins its heads. Here each channel leaves each place once.
    """
    pruner = graph.get_pruner_of_module(layer)
    place = graph.module2node[layer], pruner.prune_out_channels
    count = pruner.get_out_channels(layer)
    found = _Coupled(count, {place: {i: i for i in range(count)}}, set())
    stack = [(place, [_Index(i, i) for i in range(count)])]
    while stack:
        (node, cut), indices = stack.pop()
        for edge in node.dependencies:
            reached = _mapped(edge, indices) if edge.is_triggered_by(cut) else []
            if not reached:
                continue
            if any(index.root_idx is None or index.idx >= widest for index in reached):
                return None
            place = edge.target, edge.handler
            known, new = found.places.setdefault(place, {}), []
            for index in reached:
                if index.idx not in known:
                    known[index.idx] = index.root_idx
                    new.append(index)
                elif known[index.idx] != index.root_idx:
                    found.ties.add((known[index.idx], index.root_idx))
            if new:
                stack.append((place, new))
    return found


def _mapped(edge: Any, indices: list[Any]) -> list[Any]:
    """Map ``indices`` of the source of an edge of the graph to those of its target."""
    for mapping in edge.index_mapping:
        if mapping is not None:
            indices = mapping(indices)
    return indices


def _inputs_of_children(model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """Record the inputs of the children that hold several layers and take one tensor."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if len(arguments) == 1 and isinstance(arguments[0], Tensor):
                inputs[name] = arguments[0].detach()

        return hook

    several = {n: m for n, m in model.named_children() if len(layers.compressible(m)) > 1}
    with ExitStack() as stack:
        for name, child in several.items():
            stack.enter_context(child.register_forward_pre_hook(keep(name)))
        outputs(model, example)
    return inputs


def _group(graph: Any, coupled: _Coupled, names: dict[nn.Module, str]) -> Group | None:
    pieces = []
    for (node, cut), units in coupled.places.items():
        target = node.module
        if type(target).__module__.startswith("torch_pruning"):
            if isinstance(target, torch_pruning.ops._OutputOp):
                return None
            continue
        if target not in names or not _can_be_cut(target):
            return None
        incoming = graph.is_in_channel_pruning_fn(cut)
        reads = incoming and isinstance(target, layers.Layer) and not layers.is_depthwise(target)
        indices = torch.tensor([list(units), list(units.values())])
        pieces.append(Slice(names[target], "in" if reads else "out", indices[0], indices[1]))
    modules = {name: module for module, name in names.items()}
    ties = torch.tensor([*coupled.ties]).reshape(-1, 2)
    return _tied(pieces, coupled.units, ties.long(), modules)


def _can_be_cut(module: object) -> bool:
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    return isinstance(module, layers.Layer | _BatchNorm)


def _tied(
    pieces: list[Slice], units: int, ties: Tensor, modules: dict[str, nn.Module]
) -> Group | None:
    """Make one group of ``pieces``, in which the ``units`` of each of the ``ties`` (int64
    ``[ties, 2]``) go together, and each convolution group of a layer loses the same channels."""
    tie = torch.arange(units)
    changed = True
    while changed:
        before = tie.clone()
        lowest = tie[ties].amin(1, keepdim=True).expand_as(ties)
        tie.scatter_reduce_(0, ties.flatten(), lowest.flatten(), "amin")
        for piece in pieces:
            _merge(tie, piece, modules[piece.layer])
        changed = not torch.equal(before, tie)
    kept, numbers = tie.unique(return_inverse=True)
    for piece in pieces:
        piece.units = numbers[piece.units]
    return Group(len(kept), pieces) if len(kept) > 1 else None


def _merge(tie: Tensor, piece: Slice, layer: nn.Module) -> None:
    """Give the units whose channels of ``piece`` have to go together the same number."""
    place = piece.channels
    if (
        isinstance(layer, nn.Conv1d | nn.Conv2d)
        and layer.groups > 1
        and not layers.is_depthwise(layer)
    ):
        width = layer.in_channels if piece.side == "in" else layer.out_channels
        place = place % (width // layer.groups)
    lowest = torch.full((int(place.max()) + 1,), len(tie))
    lowest.scatter_reduce_(0, place, tie[piece.units], "amin")
    tie.scatter_reduce_(0, piece.units, lowest[place], "amin")


def _sound(
    model: nn.Module, example: Tensor, accepted: list[Group], found: list[Group]
) -> list[Group]:
    """Return ``accepted`` and those of ``found`` that can be removed with them, by bisection."""
    if not found or _is_exact(model, example, _on_trial(accepted + found)):
        return accepted + found
    if len(found) == 1:
        return accepted
    middle = len(found) // 2
    accepted = _sound(model, example, accepted, found[:middle])
    return _sound(model, example, accepted, found[middle:])


def _on_trial(found: list[Group]) -> Removal:
    """Choose random units of each group, in different shares, so that groups which must lose equally
    many do not look independent."""
    random = torch.Generator().manual_seed(0)
    removal = []
    for group in found:
        share = float(torch.rand((), generator=random)) * LARGEST_TRIAL
        units = torch.zeros(group.units, dtype=torch.bool)
        chosen = torch.randperm(group.units, generator=random)
        units[chosen[: max(1, int(group.units * share))]] = True
        removal.append((group, units))
    return removal


def is_exact(model: nn.Module, example: Tensor, removal: Removal) -> bool:
    """Whether the outputs of ``model`` on ``example`` are equal with the channels removed and with
    the weights that read them zeroed."""
    return _is_exact(*_precise(_plain_copy(model), example), removal)


def _precise(model: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """Convert model and example to double precision, where confused channels stand out from rounding
    even if an untrained net hardly reacts to them; unchanged if the code insists on a type."""
    double = copy.deepcopy(model).double()
    try:
        outputs(double, example.double())
    except RuntimeError:
        return model, example
    return double, example.double()


def _is_exact(model: nn.Module, example: Tensor, removal: Removal) -> bool:
    zeroed, cut = _twin(model), _twin(model)
    try:
        silence(zeroed, removal)
        remove(cut, removal)
        with torch.no_grad():
            return same(outputs(zeroed, example), outputs(cut, example))
    except (RuntimeError, ValueError, IndexError):
        return False  # Shapes or indices that do not fit, which the trial is to find.


def _twin(model: nn.Module) -> nn.Module:
    """Copy ``model`` but share its tensors: replace them, do not write into them."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def outputs(model: nn.Module, example: Tensor) -> list[Tensor]:
    """Return all tensors of the output of ``model`` for ``example``, in evaluation mode."""
    with evaluating(model):
        return tensors(model(example))
