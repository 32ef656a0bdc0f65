"""Knowledge distillation: train a model (student) on the outputs of another (teacher)."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penjing.errors import PenjingError
from penjing.tasks import Task, divergence, outputs_of
from penjing.tasks.outputs import evaluating
from penjing.training.settings import Distill

SPREAD_IMAGES = 64
"""Number of training images from which the variance of a teacher's outputs is computed."""


class DistillationLoss(nn.Module):
    """Loss of a student against its teacher and the labels.

    Its parameters are the regressors that bring the student's features to the teacher's width
    (Romero et al. 2015, FitNets, arXiv:1412.6550): trained with the student, then discarded.

    Raises:
        PenjingError: the outputs of the two models, or the layers named in ``settings``, do not fit.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, task: Task, settings: Distill
    ) -> None:
        super().__init__()
        self.settings = settings
        if teacher is student:
            teacher = copy.deepcopy(student)  # A copy, because the student will change.
        self._teacher_training = teacher.training
        self._task = task
        self._models = (student, teacher.eval())  # In a tuple, so that they are not its children.
        device = next(student.parameters()).device
        example = task.example.to(device)
        self._check(example)
        self._spreads = [spread.to(device) for spread in _spreads(teacher, task)]
        self.pairs = _pairs(student, teacher, example, settings.features)
        self.regressors = nn.ModuleList(_regressors(student, teacher, example, self.pairs))
        self._student_features = _Recorder(student, [pair[0] for pair in self.pairs])
        self._teacher_features = _Recorder(teacher, [pair[1] for pair in self.pairs])

    def forward(self, batch: Tensor, output: Any, hard: Tensor) -> Tensor:
        """Compute the loss, a scalar.

        Args:
            batch: the student's last input, ``[N, C, H, W]``.
            output: the student's output for it, in training mode.
            hard: scalar loss against the labels.
        """
        with torch.no_grad():
            expected = self._models[1](batch)
        weight = self.settings.weight
        loss = (1 - weight) * hard + weight * self._soft_loss(output, expected)
        if self.pairs:
            loss = loss + self.settings.feature_weight * self._feature_loss()
        return loss

    def close(self) -> None:
        """Remove the hooks from both models, and restore the teacher's mode."""
        self._student_features.close()
        self._teacher_features.close()
        self._models[1].train(self._teacher_training)

    def _feature_loss(self) -> Tensor:
        pairs = zip(
            self.regressors,
            self._student_features.take(),
            self._teacher_features.take(),
            strict=True,
        )
        losses = [feature_loss(regressor(mine), theirs) for regressor, mine, theirs in pairs]
        return torch.stack(losses).mean()

    def _soft_loss(self, output: Any, expected: Any) -> Tensor:
        """Sum the losses of the tensors that the task compares; auxiliary heads, which only the
        student has in training mode, come after them and have no teacher."""
        wanted = self._task.compared(expected)
        pairs = zip(self._task.compared(output), wanted, self._spreads, strict=False)
        losses = [
            soft_loss(mine.tensor, theirs.tensor, self.settings.temperature)
            if theirs.scores
            else divergence.of_values(mine.tensor, theirs.tensor, spread).mean()
            for mine, theirs, spread in pairs
        ]
        return torch.stack(losses).sum()

    def _check(self, example: Tensor) -> None:
        mine, theirs = (
            [list(one.tensor.shape) for one in self._task.compared(_in_eval(model, example))]
            for model in self._models
        )
        if mine != theirs:
            raise PenjingError(
                f"The teacher's output for one image has shape {_listed(theirs)}, the student's "
                f"{_listed(mine)}; give a teacher for the same classes."
            )


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute the Kullback-Leibler divergence of the softened outputs, times the temperature squared.

    The square keeps the gradient's size the same at every temperature (Hinton et al. 2015,
    arXiv:1503.02531, section 2). Both tensors are logits ``[N, classes, ...]``, or one logit ``[N]``
    or ``[N, 1, ...]`` of a Bernoulli variable; the result is the mean over N and all positions.
    """
    return divergence.of_scores(student, teacher, temperature).mean() * temperature**2


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference of two feature maps of one shape, relative to the mean
    square of the teacher's: a scalar."""
    return F.mse_loss(student, teacher) / teacher.pow(2).mean().clamp(min=1e-12)


class _Recorder:
    """Keep the last outputs of the layers ``names``, in that order."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self._names = names
        self._outputs: dict[str, Tensor] = {}
        self._hooks = [
            model.get_submodule(name).register_forward_hook(self._keep(name)) for name in set(names)
        ]

    def _keep(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._outputs[name] = output

        return hook

    def take(self) -> list[Tensor]:
        """Return the outputs, and drop them."""
        kept, self._outputs = self._outputs, {}
        return [kept[name] for name in self._names]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _spreads(teacher: nn.Module, task: Task) -> list[Tensor]:
    """Return the variances of the teacher's tensors that the task compares, each a scalar."""
    images = task.batches("train", SPREAD_IMAGES, limit=SPREAD_IMAGES)
    wanted = task.compared(outputs_of(teacher, images)[0])
    return [divergence.spread_of(one.tensor) for one in wanted]


def _listed(shapes: list[list[int]]) -> str:
    return ", ".join(map(str, shapes)) or "no tensor of floats"


def _in_eval(model: nn.Module, example: Tensor) -> Any:
    with evaluating(model):
        return model(example)


def _maps(model: nn.Module, example: Tensor) -> dict[str, torch.Size]:
    """Return the shapes of outputs that are feature maps ``[1, C, H, W]`` by layer, in running
    order."""
    shapes: dict[str, torch.Size] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and output.shape[-1] > 1:
                shapes.pop(name, None)
                shapes[name] = output.shape

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.enter_context(module.register_forward_hook(keep(name)))
        _in_eval(model, example)
    return shapes


def _pairs(
    student: nn.Module,
    teacher: nn.Module,
    example: Tensor,
    features: Literal["auto"] | list[tuple[str, str]] | None,
) -> list[tuple[str, str]]:
    if features is None:
        return []
    mine, theirs = _maps(student, example), _maps(teacher, example)
    pairs = _auto(mine, theirs) if features == "auto" else features
    for pair in pairs:
        for name, shapes, owner in zip(pair, (mine, theirs), ("student", "teacher"), strict=True):
            if name not in shapes:
                raise PenjingError(
                    f"distill: the {owner} has no layer {name!r} whose output is a feature map "
                    f"[N, C, H, W]; it has {', '.join(list(shapes)[:20])}."
                )
        if mine[pair[0]][2:] != theirs[pair[1]][2:]:
            raise PenjingError(
                f"distill: the student's {pair[0]} gives {list(mine[pair[0]][2:])} positions, the "
                f"teacher's {pair[1]} {list(theirs[pair[1]][2:])}; name layers of one resolution."
            )
    if not pairs:
        raise PenjingError(
            "distill: the two models have no feature maps of one resolution; leave features out."
        )
    return pairs


def _auto(mine: dict[str, torch.Size], theirs: dict[str, torch.Size]) -> list[tuple[str, str]]:
    """Pair the last layers of one name for each resolution, or else its last layers."""
    pairs: dict[torch.Size, tuple[str, str]] = {}
    for name, shape in mine.items():
        others = [other for other, size in theirs.items() if size[2:] == shape[2:]]
        if others:
            named = name in others
            known = pairs.get(shape[2:])
            # A pair of one name is preferred to a later one of different names.
            if named or known is None or known[0] != known[1]:
                pairs[shape[2:]] = (name, name if named else others[-1])
    return list(pairs.values())


def _regressors(
    student: nn.Module, teacher: nn.Module, example: Tensor, pairs: list[tuple[str, str]]
) -> list[nn.Module]:
    if not pairs:
        return []
    mine, theirs = _maps(student, example), _maps(teacher, example)
    made: list[nn.Module] = []
    for ours, other in pairs:
        widths = mine[ours][1], theirs[other][1]
        same = widths[0] == widths[1]
        made.append(nn.Identity() if same else nn.Conv2d(*widths, 1, device=example.device))
    return made
