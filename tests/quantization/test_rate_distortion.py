import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from penjing.net.layers import compressible
from penjing.quantization import rate_distortion, rate_distortion_sensitivity
from penjing.quantization.error_compensation import eliminate
from penjing.quantization.rate_distortion_sensitivity import Sensitivity, refined, sensitivities


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.Flatten(), nn.Linear(200, 4),
    ).eval()  # fmt: skip


@pytest.fixture
def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(64, 3, 15, 15) for _ in range(2)]


def divergence(output: torch.Tensor, expected: torch.Tensor) -> float:
    found, wanted = output.log_softmax(1), expected.log_softmax(1)
    return float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))


def test_the_last_layers_sensitivity_is_its_fisher_information(net, batches) -> None:
    found = compressible(net)
    known = sensitivities(net, found, batches * 8, classifies=True)["5"]
    x = torch.cat(batches)
    with torch.no_grad():
        features, p = net[:5](x), net(x).softmax(1)
    exact = ((p * (1 - p)).sum(1) * features.square().sum(1)).mean()  # of the trace
    columns = features.shape[1]
    damping = 1 + max(0.01, 0.3 * columns / (len(x) * 8))
    trace = known.gain[0] * known.moments[0].trace() / damping * 4
    assert float(trace) == pytest.approx(float(exact), rel=0.1)


def test_sensitivity_leaves_the_model_as_it_was(net, batches) -> None:
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    net.train()
    known = sensitivities(net, compressible(net), batches, classifies=False)
    assert known["2"].moments.shape == (8, 9, 9)
    assert known["2"].gain.shape == (8,)
    assert net.training
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("dependent", [False, True])
def test_distortion_is_the_divergence_it_costs_a_weight(net, batches, dependent) -> None:
    """Half a square form for each weight: the prediction that sets all steps."""
    found = compressible(net)
    known = sensitivities(net, found, batches, classifies=True)
    weights = {name: layer.weight.detach().clone() for name, layer in found.items()}
    original = nn.Sequential(*net)
    torch.manual_seed(0)
    costs = []
    for name in ("0", "5"):
        chosen = rate_distortion.choose(found, known, 1e-5, dependent=dependent)[name]
        with torch.no_grad():
            expected = torch.cat([original(x) for x in batches])
            found[name].weight.copy_(chosen.weight)
            output = torch.cat([net(x) for x in batches])
            found[name].weight.copy_(weights[name])
        cost = divergence(output, expected)
        costs.append(cost / (weights[name].numel() * 1e-5 / 2))
    assert all(0.1 < cost < 3 for cost in costs), costs


@pytest.mark.parametrize("dependent", [False, True])
def test_less_distortion_costs_more_bytes_and_less_divergence(net, batches, dependent) -> None:
    found = compressible(net)
    known = sensitivities(net, found, batches, classifies=True)
    weights = {name: layer.weight.detach().clone() for name, layer in found.items()}
    sizes, losses = [], []
    with torch.no_grad():
        expected = torch.cat([net(x) for x in batches])
        for distortion in (1e-6, 1e-5, 1e-4):
            for name in found:
                found[name].weight.copy_(weights[name])
            chosen = rate_distortion.choose(found, known, distortion, dependent=dependent)
            sizes.append(rate_distortion.coded_bytes(chosen.values()))
            for name, one in chosen.items():
                assert torch.equal(one.codes, one.codes.round())
                found[name].weight.copy_(one.weight)
            output = torch.cat([net(x) for x in batches])
            losses.append(divergence(output, expected))
    assert sizes == sorted(sizes, reverse=True)
    assert losses == sorted(losses)


@pytest.mark.parametrize("dependent", [False, True])
def test_zeros_stay_and_layers_that_never_ran_are_fine(net, batches, dependent) -> None:
    found = compressible(net)
    known = sensitivities(net, found, batches, classifies=True)
    with torch.no_grad():
        net[0].weight[:, 1] = 0
    del known["5"]
    chosen = rate_distortion.choose(found, known, 1e-5, dependent=dependent)
    assert (chosen["0"].codes[:, 1] == 0).all()
    error = (chosen["5"].weight - net[5].weight.detach()).abs().max()
    assert float(error) <= 0.51 * chosen["5"].step


def test_a_layer_without_influence_does_no_harm() -> None:
    layer = nn.Conv2d(2, 3, 1)
    moments = 1e-38 * torch.eye(2)[None]
    known = Sensitivity(moments, eliminate(moments), torch.zeros(1), 0.0)
    chosen = rate_distortion.choose({"a": layer}, {"a": known}, 1e-5, dependent=True)["a"]
    assert torch.isfinite(chosen.codes).all()


@pytest.mark.parametrize("wanted", [300_000, 1_500_000, 3_000_000])
def test_the_search_ends_just_below_the_size(wanted: int) -> None:
    calls = []

    def bytes_at(distortion: float) -> int:
        calls.append(distortion)
        bits = 6.5 - 0.5 * math.log2(distortion * 2**30)
        return int(4e6 / 8 * (math.log1p(math.exp(bits))))

    found = rate_distortion.for_size(bytes_at, wanted, 4_000_000)
    assert found is not None
    assert 0.99 * wanted <= bytes_at(found) <= wanted
    assert len(calls) <= 10
    assert rate_distortion.for_size(lambda _: 10, 5, 100) is None


def test_the_search_for_a_score_ends_at_its_edge() -> None:
    edge = 3e-6
    found = rate_distortion.for_score(lambda distortion: distortion < edge)
    assert 0.9 * edge < found < edge
    assert rate_distortion.for_score(lambda _: False) == 2.0**rate_distortion.FINEST


def test_biases_keep_only_the_bits_that_matter() -> None:
    bias = torch.randn(1000)
    rounded = rate_distortion.rounded_bias(bias, 2.0, 1e-4)
    step = 2.0**-6  # the power of two below sqrt(12 * 1e-4 / 2)
    assert torch.equal(rounded / step, (rounded / step).round())
    assert float((rounded - bias).abs().max()) <= step / 2
    assert torch.equal(rate_distortion.rounded_bias(bias, 0.0, 1e-4), bias)


def test_training_starts_inside_the_cell_of_the_integer() -> None:
    weight, codes = torch.tensor([[0.0, 0.31, -2.0, 0.9]]), torch.tensor([[0.0, 1.0, 1.0, 3.0]])
    found = rate_distortion.start(weight, rate_distortion.GridWeights(codes, 0.3, 8))
    assert torch.equal((found / 0.3).round(), codes)
    torch.testing.assert_close(found[0, 1], weight[0, 1])
    torch.testing.assert_close(found[0, 2], torch.tensor(0.3 * (1 - rate_distortion.INSIDE)))


@pytest.mark.parametrize("dependent", [False, True])
def test_measuring_mends_a_wrong_sensitivity(net, batches, monkeypatch, dependent) -> None:
    """Whatever the gains were, they end in the proportion of the divergences that were measured."""
    monkeypatch.setattr(rate_distortion_sensitivity, "MOST_REFINED", 10.0)
    found = compressible(net)
    known = sensitivities(net, found, batches, classifies=True)
    chosen = rate_distortion.choose(found, known, 1e-5, dependent=dependent)
    rounded = {name: one.weight for name, one in chosen.items()}
    wrong = dict(known, **{"5": replace(known["5"], gain=known["5"].gain * 3)})
    images = torch.cat(batches)
    before, ratios = net(images), []
    for start in (known, wrong):
        predicted = {n: rate_distortion.predicted(found[n], start[n], chosen[n]) for n in start}
        mended = refined(net, found, start, rounded, predicted, images, classifies=True)
        ratios.append(float(mended["5"].gain / mended["0"].gain))
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-3)
    assert ratios[0] != pytest.approx(float(known["5"].gain / known["0"].gain), rel=1e-3)
    assert torch.equal(net(images), before)  # the weights are back


def test_layers_with_a_few_large_weights_get_integers_of_16_bits() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 6, 3)
    with torch.no_grad():
        layer.weight[2] *= 200
    moments = torch.eye(9)[None]
    known = Sensitivity(moments, eliminate(moments), torch.tensor([1.0]), 0.0)
    fine = rate_distortion.choose({"a": layer}, {"a": known}, 1e-4, dependent=True)["a"]
    coarse = rate_distortion.choose({"a": layer}, {"a": known}, 1.0, dependent=True)["a"]
    assert (fine.bits, coarse.bits) == (16, 8)
    assert fine.step == pytest.approx(math.sqrt(12 * 1e-4)) and fine.codes.abs().max() > 127
    difference = (fine.weight - layer.weight.detach()).abs().max()
    assert float(difference) <= fine.step / 2 * 1.001
    data = np.int16(fine.codes).tobytes()
    assert len(data) / 4 < rate_distortion.coded_bytes([fine]) < len(data) + 16
