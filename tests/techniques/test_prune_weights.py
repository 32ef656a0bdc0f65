import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from penjing import recipe
from penjing.errors import PenjingError
from penjing.net.layers import compressible
from penjing.tasks import from_arrays
from penjing.techniques.prune_weights import PruneWeights, lamp, prune_weights
from penjing.training.schedule import cubic


@pytest.fixture(scope="module")
def task():
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), dtype=np.uint8)
    return from_arrays(images, np.arange(32) % 4, test=4, validation=4)


def net(scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(256, 4)
    )
    with torch.no_grad():
        model[2].weight *= scale
    return model


def zeros(model: nn.Module) -> dict[str, float]:
    return {n: float((m.weight == 0).float().mean()) for n, m in compressible(model).items()}


def total_sparsity(model: nn.Module) -> float:
    weights = torch.cat([m.weight.flatten() for m in compressible(model).values()])
    return float((weights == 0).float().mean())


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=30))
def test_lamp_is_the_papers_definition(values):
    """Equation 4 of Lee et al. 2021 by brute force, ties by their place in the sorted order."""
    weight = torch.tensor(values, dtype=torch.float64) / 8
    order = sorted(range(len(values)), key=lambda i: (abs(values[i]), i))
    score = lamp(weight)
    for place, index in enumerate(order):
        denominator = sum(float(weight[other]) ** 2 for other in order[place:])
        expected = float(weight[index]) ** 2 / denominator if denominator else 0.0
        assert float(score[index]) == pytest.approx(expected, rel=1e-9)


def test_lamp_does_not_see_the_scale_of_a_layer(task):
    plain = zeros(prune_weights(net(), task, sparsity=0.7))
    scaled = zeros(prune_weights(net(64.0), task, sparsity=0.7))
    assert plain == scaled
    magnitude = zeros(prune_weights(net(64.0), task, sparsity=0.7, importance="magnitude"))
    assert magnitude["0"] > 0.95 > scaled["0"]


@given(sparsity=st.floats(0.05, 0.95), scope=st.sampled_from(["global", "layer"]))
@settings(max_examples=15, deadline=None)
def test_sparsity_is_exact(task, sparsity, scope):
    model = prune_weights(net(), task, sparsity=sparsity, scope=scope)
    sizes = [m.weight.numel() for m in compressible(model).values()]
    assert total_sparsity(model) == pytest.approx(sparsity, abs=len(sizes) / sum(sizes))
    if scope == "layer":
        for size, share in zip(sizes, zeros(model).values(), strict=True):
            assert share == pytest.approx(sparsity, abs=0.5 / size + 1e-6)


def test_the_smallest_weights_go_and_the_rest_is_untouched(task):
    model = net()
    small = prune_weights(model, task, sparsity=0.6, scope="layer")
    for name, layer in compressible(small).items():
        before = model.get_submodule(name).weight
        kept = layer.weight != 0
        assert torch.equal(layer.weight[kept], before[kept])
        assert before[~kept].abs().max() <= before[kept].abs().min()
        assert layer.sparse


@given(
    n=st.integers(1, 7),
    m=st.integers(2, 8),
    channels=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_n_of_m(task, n, m, channels, seed):
    if n >= m:
        with pytest.raises(ValueError, match="N:M"):
            PruneWeights(pattern=f"{n}:{m}")
        return
    torch.manual_seed(seed)
    layer = nn.Conv2d(m * channels, 3, 3)
    before = layer.weight.detach().clone()
    model, technique = nn.Sequential(layer), PruneWeights(pattern=f"{n}:{m}")
    technique.attach(model, task).bake(model)  # the task has images of other channels
    blocks = model[0].weight.movedim(1, -1).unflatten(-1, (channels, m))
    assert ((blocks != 0).sum(-1) == n).all()
    largest = before.movedim(1, -1).unflatten(-1, (channels, m)).abs().topk(n).values.sum(-1)
    torch.testing.assert_close(blocks.abs().sum(-1), largest)


def test_layers_that_do_not_fit_the_pattern_stay_dense(task):
    model = prune_weights(net(), task, pattern="2:4")
    assert zeros(model) == {"0": 0.0, "2": 0.5, "4": 0.5}
    assert not hasattr(model[0], "sparse")


def test_cubic_is_zhu_and_guptas_schedule():
    """Equation 1 with s_i = 0, s_f = 0.9, t_0 = 0 and n Δt = 100 steps."""
    for step in range(0, 101, 10):
        paper = 0.9 + (0.0 - 0.9) * (1 - step / 100) ** 3
        assert 0.9 * cubic(step / 100, end=1.0) == pytest.approx(paper)
    assert cubic(0.0) == 0.0 and cubic(1.0) == 1.0


@pytest.mark.parametrize("goal", [{"sparsity": 0.8}, {"pattern": "1:4"}])
def test_step_follows_the_schedule(task, goal):
    model = net()
    attached = PruneWeights(**goal).attach(model, task)
    final = total_sparsity(model)
    for progress in (0.0, 0.2, 0.5, 1.0):
        attached.step(model, progress)
        assert total_sparsity(model) == pytest.approx(final * cubic(progress), abs=2e-3)


def test_one_goal():
    for wrong in ({}, {"sparsity": 0.5, "pattern": "2:4"}, {"pattern": "4:2"}):
        with pytest.raises(ValueError):
            PruneWeights(**wrong)


def test_a_share_for_each_layer(task):
    model = net()
    small = prune_weights(model, task, sparsity={"0": 0.25, "[24]": 0.5, "*": 0.9})
    assert zeros(small) == {"0": 0.25, "2": 0.5, "4": 0.5}
    for name, layer in compressible(small).items():
        before = model.get_submodule(name).weight.detach()
        kept = layer.weight != 0
        assert before[~kept].abs().max() <= before[kept].abs().min()


def test_layers_without_a_share_stay_dense(task):
    small = prune_weights(net(), task, sparsity={"2": 0.75})
    assert zeros(small) == {"0": 0.0, "2": 0.75, "4": 0.0}
    assert small[2].sparse and not hasattr(small[0], "sparse")


def test_shares_by_layer_follow_the_schedule(task):
    model = net()
    technique = PruneWeights(sparsity={"2": 0.8, "4": 0.5})
    technique.attach(model, task).step(model, 0.14)  # a fifth of the ramp: 1 - 0.8 ** 3
    found = zeros(model)
    assert found["2"] == pytest.approx(0.8 * 0.488, abs=1e-3)
    assert found["4"] == pytest.approx(0.5 * 0.488, abs=1e-3)
    assert recipe.parse({"stages": [{"techniques": [technique]}]}).to_dict()["stages"] == [
        {"techniques": [{"prune_weights": {"sparsity": {"2": 0.8, "4": 0.5}}}]}
    ]


def test_a_share_for_no_layer_is_told(task):
    with pytest.raises(PenjingError, match=r"'conv1', which none .* they are 0, 2, 4\."):
        prune_weights(net(), task, sparsity={"conv1": 0.5})
