"""Every family of nets through the techniques: does each file do what its model does?

The torchvision classifiers and nets of all of timm's families, with random weights and re-estimated
norms, are quantized (8-bit weights and activations; 4-bit weights alone), pruned, factorized, and left
as they are. Each result is exported, compared with its model as ``artifact.build`` does, and looked into
as cards are. What cannot be done has to be one sentence.

    python benchmarks/zoo.py                 # hours; what is there already is not run again
    python benchmarks/zoo.py --only repvgg   # nets with this in their name, again

Every net runs in a process of its own. Lines go to ``results/zoo.jsonl`` as they come, the summary to
``results/zoo.json``, the table to ``docs/zoo.md``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

import results

HERE = Path(__file__).parent
LINES, SUMMARY = results.FOLDER / "zoo.jsonl", results.FOLDER / "zoo.json"
TABLE = HERE.parent / "docs" / "zoo.md"
COMMAND = "python benchmarks/zoo.py"
CLASSES, IMAGES = 10, 48
SIZES = (64, 96, 128, 160, 192, 224, 240, 256)
TECHNIQUES: dict[str, dict[str, dict]] = {
    "export": {},
    "W8A8": {"quantize": {"calibration": 16}},
    "W4": {"quantize": {"weight_bits": 4, "activation_bits": None, "calibration": 16}},
    "channels": {"prune_channels": {"ratio": 0.3}},
    "ranks": {"factorize": {"ratio": 0.3}},
}
TIMM = """
test_resnet test_convnext test_efficientnet test_vit test_mambaout test_nfnet test_byobnet
test_vit_relpos repvgg_a0 mobileone_s0 gernet_s resnet10t resnet18 resnet18d seresnet18 resnet26t
resnext26ts ecaresnet26t resnetaa34d legacy_seresnet18 skresnet18 resnest14d res2net50_48w_2s
resnetv2_18 resnetv2_50x1_bit nf_regnet_b0 nf_resnet26 eca_nfnet_l0 dm_nfnet_f0 regnetx_002
regnety_002 regnetz_005 mobilenetv2_035 mobilenetv2_050 mobilenetv3_small_050 mobilenetv3_small_100
mobilenetv3_large_075 mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium_075 mnasnet_small
mnasnet_050 semnasnet_050 spnasnet_100 fbnetc_100 fbnetv3_b lcnet_035 lcnet_050 lcnetv2_small
tinynet_e tinynet_d tf_efficientnet_lite0 efficientnet_b0 efficientnetv2_rw_t efficientnet_es
mixnet_s tf_mixnet_s hardcorenas_a ghostnet_050 ghostnetv2_100 repghostnet_050 rexnet_100
rexnetr_200 cs3darknet_focus_s cs3darknet_s cspresnet50 cspdarknet53 darknet17 cspnext_tiny
densenet121 dla46_c dla60x_c dpn48b hrnet_w18_small selecsls42 hgnet_tiny hgnetv2_b0 vgg11_bn
vovnet39a ese_vovnet19b_slim_dw ese_vovnet19b_dw xception41 inception_v3 inception_v4
inception_next_atto convnext_atto convnext_femto_ols convnextv2_atto convmixer_768_32
edgenext_xx_small fasternet_t0 starnet_s1 shvit_s1 lowformer_b0 mambaout_femto poolformerv2_s12
poolformer_s12 convformer_s18 caformer_s18 rdnet_tiny focalnet_tiny_srf repvit_m0_9 fastvit_t8
efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_m0 swiftformer_xs mobilevit_xxs
mobilevitv2_050 levit_128s levit_conv_128s visformer_tiny tiny_vit_5m_224 nextvit_small
botnet26t_256 eca_halonext26ts lambda_resnet26t bat_resnext26ts sebotnet33ts_256 coat_tiny
coatnet_nano_rw_224 coatnext_nano_rw_224 maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256 convit_tiny
crossvit_9_240 cait_xxs24_224 davit_tiny deit_tiny_patch16_224 deit3_small_patch16_224
vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224 beit_base_patch16_224
eva02_tiny_patch14_224 flexivit_small gcvit_xxtiny mvitv2_tiny nest_tiny pit_ti_224 pvt_v2_b0
swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224 swinv2_tiny_window8_256 tnt_s_patch16_224
twins_svt_small twins_pcpvt_small volo_d1_224 xcit_nano_12_p16_224 sequencer2d_s mixer_s32_224
gmlp_ti16_224 resmlp_12_224 hiera_tiny_224 iformer_s csatv2 cpubone_b0_bfrobust efficientvim_m1
"""


def main() -> None:
    """Run what is missing, then write the summary and the table."""
    options = _options()
    done = _done(_lines()) if options.only is None else set()
    names = [name for name in _names() if name not in done and (options.only or "") in name]
    _import()
    _run(sorted(names, key=_parameters), options.jobs, options.limit)
    _write()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", help="run only nets with this in their name, again")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one net")
    parser.add_argument("--jobs", type=int, default=1, help="nets at a time")
    return parser.parse_args()


def _import() -> None:
    """Import once what every net's process needs."""
    import torch

    for module in ("timm", "torch.onnx", "penjing.recipe", "penjing.devices.artifact"):
        importlib.import_module(module)
    torch.set_num_threads(1)  # threads do not survive a fork


def _names() -> list[str]:
    """timm's families first, so that a run that is cut short has met them all."""
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    return [f"timm:{name}" for name in TIMM.split()] + [f"torchvision:{name}" for name in known]


def _done(lines: list[dict]) -> set[str]:
    """The nets that met all techniques, or that cannot be run."""
    last = list(TECHNIQUES)[-1]
    return {
        line["net"] for line in lines if line["technique"] == last or line["result"] == "not run"
    }


def _parameters(name: str) -> int:
    """Parameters of the net, so that small ones come first; last where only real memory holds it."""
    import torch

    try:
        with torch.device("meta"):
            return sum(p.numel() for p in _made(name, 224).parameters())
    except Exception:
        return 10**9


def _run(names: list[str], jobs: int, limit: float) -> None:
    """Every net in a process of its own, ``jobs`` at a time."""
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            process = multiprocessing.get_context("fork").Process(target=_measure, args=(name,))
            process.start()
            running[name] = process, time.monotonic() + limit
        time.sleep(0.2)
        for name, (process, deadline) in list(running.items()):
            late = time.monotonic() > deadline
            if late or not process.is_alive():
                _end(name, process, limit if late else None)
                del running[name]
                print(f"{name} done, {len(waiting)} to come", file=sys.stderr, flush=True)


def _end(name: str, process: multiprocessing.process.BaseProcess, late: float | None) -> None:
    """What ended the net's process, if it was not done, is a line, too."""
    process.kill()
    process.join()
    if late is None and not process.exitcode:
        return
    there = {line["technique"] for line in _lines() if line["net"] == name}
    missing = next((technique for technique in TECHNIQUES if technique not in there), None)
    if missing is not None:
        said = f"not done after {late:.0f} s" if late else f"exit code {process.exitcode}"
        _add({"net": name, "technique": missing, "result": "not run", "said": said})


def _add(line: dict) -> None:
    with LINES.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _measure(name: str) -> None:
    """Add one line for each technique on the net ``name``."""
    import torch

    from penjing import tasks
    from penjing.errors import PenjingError

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    found = _net(name)
    if isinstance(found, str):
        _add({"net": name, "technique": "export", "result": "not run", "said": found})
        return
    model, size = found
    images = _images(size)
    task = tasks.from_arrays(images, np.arange(len(images)) % CLASSES, validation=10, test=10)
    model = _with_statistics(model, task)
    parameters = sum(p.numel() for p in model.parameters())
    for technique, step in TECHNIQUES.items():
        start, line = time.process_time(), {"net": name, "technique": technique}
        line |= {"size": size, "parameters": parameters}
        try:
            line |= _judged(model, task, step)
        except PenjingError as error:
            line |= {"result": "rejected", "said": str(error)}
        except Exception as error:  # a fault is what this looks for
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            line |= {"result": "fault", "said": said[:300]}
        line["seconds"] = round(time.process_time() - start, 1)
        _add(line)


def _net(name: str):
    """The net with random weights and the smallest size of image that it takes, or why there is none."""
    import torch

    for size in SIZES:
        try:
            model = _made(name, size).eval()
            with torch.no_grad():
                model(torch.zeros(2, 3, size, size))
            return model, size
        except Exception as error:  # wants another size
            last = error
    return f"takes none of {SIZES}: {' '.join(str(last).split())[:200]}"


def _made(name: str, size: int):
    import timm
    import torchvision

    from penjing import models

    kind, _, short = name.partition(":")
    if kind == "timm":
        try:
            return timm.create_model(short, num_classes=CLASSES, img_size=size)
        except TypeError:
            return models.load(name, num_classes=CLASSES)
    if short.startswith("vit_") or short == "maxvit_t":
        option = {"input_size": (size, size)} if short == "maxvit_t" else {"image_size": size}
        return torchvision.models.get_model(short, weights=None, num_classes=CLASSES, **option)
    return models.load(name, num_classes=CLASSES)


def _images(size: int) -> np.ndarray:
    """Smooth noise, uint8 ``[IMAGES, size, size, 3]``, each image with colours of its own."""
    dice = np.random.default_rng(0)
    coarse = dice.integers(0, 256, (IMAGES, 8, 8, 3)).astype(np.float32)
    smooth = coarse.repeat(-(-size // 8), 1).repeat(-(-size // 8), 2)[:, :size, :size]
    noise = dice.normal(0, 12, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def _with_statistics(model, task):
    """``model`` with the means and variances of its norms on the images."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        for batch in task.calibration(IMAGES, batch_size=8):
            if len(batch) > 1:
                model(batch)
    return model.eval()


def _judged(model, task, step: dict) -> dict:
    """What the file of the compressed model is like."""
    from penjing import recipe
    from penjing.devices import artifact, measurement
    from penjing.targets.onnxruntime import runtime
    from penjing.targets.onnxruntime.export import lower
    from penjing.targets.onnxruntime.stored_layers import stored_layers

    stages = [{"techniques": [step]}] if step else []
    small = recipe.compress(model, task, recipe.parse({"stages": stages}))
    with tempfile.TemporaryDirectory() as folder:
        path, batches = Path(folder, "model.onnx"), task.calibration(16, batch_size=8)
        lowered = lower(small, task.example, path, calibration=batches)
        agreement = measurement.agreement(small, path, batches)
        artifact.check_agreement(small, agreement, batches)
        layers = stored_layers(path, lowered.places, runtime.optimized(path)).values()
    floats = sum(not layer.integer for layer in layers)
    partly = "quantize" in step and step["quantize"].get("activation_bits", 8) and floats
    formats = Counter(layer.format for layer in layers)
    if "quantize" in step and formats["float32"]:
        partly = True
    return {
        "result": "partly float" if partly else "passes",
        "said": "; ".join(lowered.notes) if partly else "",
        "distance": agreement.distance,
        "layers": len(layers),
        "float_kernels": floats,
        "formats": dict(formats),
    }


def _lines() -> list[dict]:
    """The last line of each net and technique: of the summary, and of what has come since."""
    found = []
    if SUMMARY.exists():
        found = json.loads(SUMMARY.read_text(encoding="utf-8"))["nets"]
    if LINES.exists():
        text = LINES.read_text(encoding="utf-8")
        found += [json.loads(line) for line in text.splitlines()]
    return list({(line["net"], line["technique"]): line for line in found}.values())


def _write() -> None:
    order = {name: index for index, name in enumerate(_names())}
    lines = [line for line in _lines() if line["net"] in order]
    lines.sort(key=lambda line: order[line["net"]])
    rows = []
    for technique in TECHNIQUES:
        counts = Counter(line["result"] for line in lines if line["technique"] == technique)
        row = dict.fromkeys(results.COLUMNS) | {"work": f"zoo, {technique}", "met": None}
        rows += [row | {"measure": f"nets: {what}", "ours": n} for what, n in counts.items()]
    path = results.write("zoo", rows, COMMAND)
    assert path == SUMMARY
    record = json.loads(path.read_text(encoding="utf-8")) | {"nets": lines}
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    TABLE.write_text(_table(lines, record), encoding="utf-8")
    LINES.unlink(missing_ok=True)


def _table(lines: list[dict], record: dict) -> str:
    by_net: dict[str, dict[str, dict]] = {}
    for line in lines:
        by_net.setdefault(line["net"], {})[line["technique"]] = line
    missing = [name for name in _names() if name not in by_net]
    said: dict[str, int] = {}
    head = f"| net | px | parameters | {' | '.join(TECHNIQUES)} |"
    rows = [head, "| :--- | ---: | ---: |" + " :--- |" * len(TECHNIQUES)]
    for name, found in by_net.items():
        first = next(iter(found.values()))
        cells = [_cell(found.get(technique), said) for technique in TECHNIQUES]
        size, count = first.get("size", ""), first.get("parameters")
        millions = f"{count / 1e6:.1f} M" if count else ""
        rows.append(f"| {name} | {size} | {millions} | {' | '.join(cells)} |")
    notes = [f"{number}. {text}" for text, number in said.items()]
    return TEXT.format(
        nets=len(by_net),
        cpu=record["cpu"],
        torch=record["versions"]["torch"],
        runtime=record["versions"]["onnxruntime"],
        table="\n".join(rows),
        notes="\n".join(notes),
        missing=", ".join(missing) or "none",
    )


def _cell(line: dict | None, said: dict[str, int]) -> str:
    if line is None:
        return "–"
    if line["result"] == "passes":
        return "yes"
    text = _general(line["said"])
    number = said.setdefault(text, len(said) + 1)
    if line["result"] == "partly float" and line.get("float_kernels"):
        return f"{line['float_kernels']} of {line['layers']} float ({number})"
    return f"{line['result']} ({number})"


def _general(text: str) -> str:
    """A sentence without the names and numbers of one net."""
    import re

    text = re.sub(r"the model \w+|of \w+ disagrees", "the model", text)
    text = re.sub(r"\b[\w]+(\.[\w]+)+(, [\w]+(\.[\w]+)*)*", "LAYERS", text)
    text = re.sub(r"\d+(\.\d+)?( ?%)?", "N", text)
    return text.replace("|", "\\|")[:400]


TEXT = """# Zoo

{nets} nets with random weights and re-estimated norms, through post-training quantization to 8 bits
(weights and activations), to 4 bits (weights alone), channel pruning by 30 % of the MACs, factorization
by 30 % of the parameters, and as they are. Each result is exported, its file compared with the model on
images, and its layers' formats and kernels read from the file and from ONNX Runtime's optimized graph.

"yes" is a file that does what its model does. "float" counts the layers that run in float32 though 8-bit
activations were asked for, or are stored so; the note says why. Layers whose weights the model's own
code reads instead of calling them run dequantized, since nothing sees their inputs. "rejected" is one
sentence, below.

Made by `{{command}}` on {cpu}, with PyTorch {torch} and ONNX Runtime {runtime}.

{table}

## What was said

{notes}

## Not run

{missing}
""".replace("{{command}}", COMMAND)


if __name__ == "__main__":
    main()
