"""Settings of the training loop and of knowledge distillation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Distill(BaseModel):
    """Settings of knowledge distillation: ``TrainSettings.distill``, used with a teacher.

    Class scores are compared by the divergence of their softmax, averaged over the positions of maps;
    one logit by that of its sigmoid; other outputs by their mean squared difference in units of their
    variance. ``Task.compared`` tells them apart. The losses of several outputs are added.

    Attributes:
        temperature: divides the logits of both models before they are compared.
        weight: weight of the loss against the teacher's outputs, in [0, 1]; the labels have the rest.
        features: compare feature maps, too: pairs (student's layer, teacher's layer), or ``auto`` for
            the last layers of each resolution that both models have.
        feature_weight: weight of the loss of feature maps, which is added.
    """

    model_config = ConfigDict(extra="forbid")

    temperature: float = Field(default=4.0, gt=0)
    weight: float = Field(default=0.9, ge=0, le=1)
    features: Literal["auto"] | list[tuple[str, str]] | None = None
    feature_weight: float = Field(default=1.0, gt=0)


class TrainSettings(BaseModel):
    """Settings of the training loop.

    Attributes:
        epochs: passes over the training images; may be a fraction, such as 0.25.
        batch_size: images a step.
        optimizer: ``sgd`` (with Nesterov momentum) or ``adamw``.
        lr: highest learning rate.
        momentum: momentum of SGD; under ``one_cycle`` it runs between 0.85 and 0.95 instead.
        weight_decay: weight decay, except of biases, norms and other parameters of one value a channel.
        schedule: ``cosine`` (linear warmup, then half a cosine to 0; Loshchilov and Hutter 2017) or
            ``one_cycle`` (from lr/25 up to lr, then down; Smith and Topin 2018).
        warmup: share of the training in which the learning rate rises.
        label_smoothing: label smoothing of the cross entropy, in [0, 1).
        ema: decay of a running average of the weights (EMA), which is then the result; None for none.
        augment: shift and mirror the training images at random; a number is the largest shift, as
            a share of the side (true: an eighth).
        distill: settings of knowledge distillation; None trains on labels alone.
        seed: seed of the order of the images, augmentation and dropout, beside the task's own seed.
        time_budget: seconds after which training ends. Learning rate and techniques then follow
            the time, so that their schedules are complete. The last validation comes on top.
    """

    model_config = ConfigDict(extra="forbid")

    epochs: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    batch_size: int = Field(default=128, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    schedule: Literal["cosine", "one_cycle"] = "cosine"
    warmup: float = Field(default=0.1, ge=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    ema: float | None = Field(default=None, gt=0, lt=1)
    augment: bool | Annotated[float, Field(gt=0, le=0.5)] = True
    distill: Distill | None = None
    seed: int = 0
    time_budget: float | None = Field(default=None, gt=0)
