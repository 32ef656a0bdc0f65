from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from penjing.devices import measurement
from penjing.devices.local import Local
from penjing.errors import PenjingError
from penjing.targets.onnxruntime import runtime
from penjing.targets.onnxruntime.export import export
from penjing.tasks import Task, evaluate, outputs, outputs_of


@pytest.fixture(scope="module")
def file(net: nn.Module, task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    export(net, task.example, path)
    return path


def test_more_work_takes_longer(file: Path, task: Task, tmp_path: Path) -> None:
    torch.manual_seed(0)
    heavy = nn.Sequential(
        nn.Conv2d(3, 256, 3), nn.Conv2d(256, 256, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    export(heavy, task.example, tmp_path / "heavy.onnx")
    light, heavy_time = Local().latency([file, tmp_path / "heavy.onnx"], runs=20, warmup=3)
    assert 0 < light.p10_ms <= light.median_ms <= light.p90_ms
    assert light.runs == 20
    assert heavy_time.median_ms > light.median_ms


def test_memory_counts_the_weights_and_not_this_process(
    task: Task, file: Path, tmp_path: Path
) -> None:
    ballast = torch.ones(100_000_000)  # 400 MB, which a child must not inherit
    small = Local().peak_rss(file)
    assert small < ballast.nbytes
    wide = nn.Sequential(nn.Flatten(), nn.Linear(768, 40_000), nn.Linear(40_000, 200))
    export(wide, task.example, tmp_path / "wide.onnx")
    weights = 4 * sum(p.numel() for p in wide.parameters())
    assert Local().peak_rss(tmp_path / "wide.onnx") > small + 0.9 * weights


def test_memory_of_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(PenjingError, match=r"broken\.onnx"):
        Local().peak_rss(tmp_path / "broken.onnx")
    with pytest.raises(PenjingError, match="cannot load"):
        runtime.session(tmp_path / "broken.onnx")


def test_the_score_is_that_of_pytorch(net: nn.Module, task: Task, file: Path) -> None:
    assert measurement.score(file, task, "validation") == evaluate(net, task, "validation")


class Forms(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.linear = form, nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.linear(x.mean((2, 3)))
        return {"dict": {"z": y, "a": x.mean()}, "list": [y], "logit": y[:, 0]}[self.form]


@pytest.mark.parametrize("form", ["dict", "list", "logit"])
def test_a_file_is_scored_in_the_form_of_its_model(form: str, task: Task, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, forms = Forms(form).eval(), []

    def score(output: Any, target: torch.Tensor) -> float:
        forms.append(type(output))
        return float(outputs.logits(output).sum())

    own = replace(task, custom_loss=lambda o, y: y.sum(), custom_score=score)
    export(net, task.example, tmp_path / "net.onnx")
    form_of = outputs_of(net, task.batches("train", 1, limit=1))[0]
    found = measurement.score(tmp_path / "net.onnx", own, "validation", form=form_of)
    assert found == pytest.approx(evaluate(net, own, "validation"), rel=1e-4)
    assert forms[0] is forms[1] is type(form_of)
    agreed = measurement.agreement(net, tmp_path / "net.onnx", task.calibration(32))
    assert agreed.top1 == 1.0 and agreed.max_error < 1e-5


def test_agreement(net: nn.Module, task: Task, file: Path) -> None:
    same = measurement.agreement(net, file, task.calibration(32))
    assert same.top1 == 1.0 and same.max_error < 1e-5
    torch.manual_seed(1)
    other = type(net)().eval()
    assert measurement.agreement(other, file, task.calibration(32)).max_error > 1e-3


def test_bench_takes_packed_files_too(file: Path, tmp_path: Path) -> None:
    from penjing import container

    packed = tmp_path / "net.penjing"
    container.pack(file, packed)
    rows = measurement.bench([file, packed], runs=3, threads=1)
    assert [row["bytes"] for row in rows] == [file.stat().st_size, packed.stat().st_size]
    assert measurement.table(rows).row_count == 2
