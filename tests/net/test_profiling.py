import csv
import io

import pytest
import torch
import torchvision
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from penjing.errors import PenjingError
from penjing.net.layers import CodebookWeights, IntegerWeights
from penjing.net.profiling import layer_table, profile, profile_spec, table, to_csv

FAST = [
    "alexnet",
    "convnext_tiny",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "swin_t",
    "vgg11_bn",
    "vit_b_16",
]
SLOW = sorted(set(torchvision.models.list_models(module=torchvision.models)) - set(FAST))


@pytest.mark.parametrize("name", FAST + [pytest.param(n, marks=pytest.mark.slow) for n in SLOW])
def test_counts_are_torchvisions(name):
    weights = next(
        w
        for w in torchvision.models.get_model_weights(name)
        # The net as built without weights takes 224 px, which vit_h_14's default weights do not.
        if not name.startswith("vit") or w.transforms().crop_size[0] == 224
    )
    auxiliary = {"googlenet": {"aux_logits": False, "init_weights": False}}
    # RegNets compute their widths with tensors; attention on the CPU has an operator of its own.
    with torch.device("cpu" if name.startswith(("regnet", "vit_b_16")) else "meta"):
        model = torchvision.models.get_model(name, weights=None, **auxiliary.get(name, {}))
    side = weights.transforms().crop_size[0]
    found = profile(model, torch.zeros(1, 3, side, side))
    assert found.params == weights.meta["num_params"]
    # torchvision gives 10^9 operations to three decimals.
    assert found.macs / 1e9 == pytest.approx(weights.meta["_ops"], rel=0.01, abs=0.0006)


def chain(inplace: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace), nn.Flatten(), nn.Linear(8 * 16, 5)
    )


IMAGE = torch.zeros(1, 3, 4, 4)


def test_chain_by_hand():
    found = profile(chain(), IMAGE)
    conv, relu, flatten, linear = found.layers
    assert [layer.kind for layer in found.layers] == ["conv", "other", "other", "linear"]
    assert [layer.name for layer in found.layers] == ["0", "1", "2", "3"]
    assert (conv.params, conv.macs, conv.shape) == (8 * 27 + 8, 8 * 27 * 16, [1, 8, 4, 4])
    assert (linear.params, linear.macs, linear.shape) == (128 * 5 + 5, 128 * 5, [1, 5])
    assert relu.params == relu.macs == flatten.params == flatten.macs == 0
    assert conv.activation_bytes == relu.activation_bytes == 4 * 128
    assert found.params == conv.params + linear.params
    assert found.weight_bytes == 4 * found.params
    assert found.macs == conv.macs + linear.macs
    # The input is 4 * 48 bytes, the convolution's output 4 * 128, the model's 4 * 5. Most is held
    # while ReLU reads one tensor of 512 and writes another; in place, while the convolution runs.
    assert found.peak_activation_bytes == 512 + 512
    assert profile(chain(inplace=True), IMAGE).peak_activation_bytes == 192 + 512


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.second = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return x + self.second(self.first(x))


def test_residual_block_by_hand():
    # The input of 192 bytes lives until the sum: 192 + 512 + 192 while the second layer runs.
    assert profile(Residual(), IMAGE).peak_activation_bytes == 192 + 512 + 192
    # Without the sum, the input is free by then: 512 + 192.
    model = Residual()
    assert profile(nn.Sequential(model.first, model.second), IMAGE).peak_activation_bytes == 704


def test_freed_inputs_do_not_count_although_a_python_frame_holds_them():
    layers = [nn.Conv2d(3, 3, 1) for _ in range(3)]
    nested = nn.Sequential(nn.Sequential(nn.Sequential(*layers)))
    assert profile(nested, IMAGE).peak_activation_bytes == 2 * 192


def test_indices_of_max_pooling_are_nothing_that_is_held():
    assert profile(nn.MaxPool2d(2), IMAGE).peak_activation_bytes == 192 + 192 // 4


def test_only_one_image_is_counted_and_the_model_is_left_alone():
    model = chain().train()
    model[1].eval()
    one, many = (profile(model, torch.zeros(n, 3, 4, 4)) for n in (1, 7))
    assert one == many
    assert model.training and not model[1].training
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 3))
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        rows = x.flatten(2).transpose(1, 2) @ self.weight.t()
        scores = rows @ rows.transpose(1, 2)
        return self.inner(F.scaled_dot_product_attention(rows, rows, rows)) + scores.sum()


def test_products_outside_layers_belong_to_the_module_that_makes_them():
    found = {layer.name: layer for layer in profile(Functional(), IMAGE).layers}
    assert found["inner"].macs == 16 * 6 * 6
    assert found[""].params == 18
    assert found[""].macs == 16 * 3 * 6 + 16 * 6 * 16 + 2 * (16 * 6 * 16)


def test_attention_counts_the_same_with_and_without_the_fast_path():
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tokens = torch.zeros(1, 5, 8)
    # Projections 4 * 8 * 8, two products with 5 others, feed forward 2 * 8 * 16: for 5 tokens.
    assert profile(attention, tokens).macs == 5 * (4 * 64 + 2 * 5 * 8 + 2 * 128)
    assert torch.backends.mha.get_fastpath_enabled()


def test_shared_parameters_count_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    found = profile(nn.Sequential(first, second), torch.zeros(1, 4))
    assert found.params == 16 + 4 + 4
    assert found.macs == 2 * 16
    twice = profile(nn.Sequential(first, nn.ReLU(), first), torch.zeros(1, 4))
    assert twice.params == 20 and twice.macs == 2 * 16
    assert twice.layers[0].activation_bytes == 2 * 16


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_parametrized_weights_belong_to_their_layer_and_are_no_activations():
    plain = profile(chain(), IMAGE)
    model = chain()
    parametrize.register_parametrization(model[0], "weight", Halved())
    assert profile(model, IMAGE) == plain


def test_weight_bytes_follow_the_weight_format():
    model = chain()
    model[0].weight_format = IntegerWeights(bits=4, scale=torch.ones(8))
    model[3].weight_format = CodebookWeights(bits=3, values=torch.zeros(8))
    conv, _, _, linear = profile(model, IMAGE).layers
    assert conv.weight_bytes == 216 // 2 + 4 * 8 + 4 * 8
    assert linear.weight_bytes == 640 * 3 // 8 + 4 * 8 + 4 * 5


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) if x.sum().item() < 1 else x


def test_a_model_that_looks_at_values_is_run():
    assert profile(DataDependent(), torch.zeros(1, 4)).macs == 16


def test_tables_and_csv():
    found = profile(chain(), IMAGE, name="small")
    console = Console(width=120, file=io.StringIO())
    console.print(table([found]))
    console.print(layer_table(found))
    text = console.file.getvalue()
    assert "small" in text and "869" in text and "8x4x4" in text
    rows = list(csv.DictReader(io.StringIO(to_csv([found]))))
    assert [int(row["macs"]) for row in rows] == [layer.macs for layer in found.layers]
    assert (rows[0]["model"], rows[0]["shape"]) == ("small", "1x8x4x4")
    assert found.to_dict()["layers"][0]["params"] == 224


def test_named_models():
    found = profile_spec("penjing:lenet5")
    assert (found.name, found.params) == ("penjing:lenet5", 431_080)
    # Convolutions of 24 x 24 and 8 x 8 pixels, then the linear layers.
    assert found.macs == 24 * 24 * 20 * 25 + 8 * 8 * 50 * 500 + 800 * 500 + 500 * 10
    at = {side: profile_spec("penjing:resnet8", side).macs for side in (32, 64)}
    assert at[64] == pytest.approx(4 * at[32], rel=0.001)


def test_says_that_the_image_size_does_not_fit_or_is_not_known(tmp_path):
    with pytest.raises(PenjingError, match="does not take images of 1x20x20"):
        profile_spec("penjing:lenet5", 20)
    (tmp_path / "net.py").write_text("from torch import nn\nnet = nn.Flatten\n")
    with pytest.raises(PenjingError, match="give image_size"):
        profile_spec(f"{tmp_path / 'net.py'}:net")
