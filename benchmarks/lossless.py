"""Bits that the same integers cost in penjing's coders, in nncodec's CABAC, zstd and xz.

    pip install --no-deps nncodec==2.1.3    # builds its encoder; it declares numpy below 2
    python benchmarks/lossless.py [WORDS]   # only nets and forms whose name has all of WORDS

The integers are those of container.py. nncodec codes them as it does weights that are already
integers: one stream a tensor, no dependent quantization, its parameter optimization on, without the
headers of its units. zstd -19 and xz -9 get all weights of a net as one file, a byte each. Speed is
that of decoding, in weights a second of one thread's processor time, the median of five runs; for ours
that of unpacking the whole file, nncodec's is of its decoder alone. Where Huffman coding would not pay,
the file is one LZMA block, and its figures are of that.
"""

from __future__ import annotations

import lzma
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import results
from container import RUNS, Layers, bits_per_weight, onnx_file, order0, row, timed, works
from penjing.container import pack, unpack

try:
    from nncodec.extensions import deepCABAC
except ImportError:
    deepCABAC = None  # noqa: N816
NNCODEC = "nncodec's CABAC"
UNARY_LENGTH = 11
"""nncodec's default: absolute values up to this are coded in unary."""


def nncodec_bits_and_speed(layers: Layers) -> tuple[float, float]:
    """Bits a weight, and weights decoded a second; checks that they come back."""
    all_weights = [weights for weights, _ in layers]
    streams = [_nncodec_encode(weights.astype(np.int32)) for weights in all_weights]
    pairs = list(zip(streams, all_weights, strict=True))
    decoded, seconds = timed(lambda: [_nncodec_decode(s, w.shape) for s, w in pairs], RUNS)
    if not all(map(np.array_equal, decoded, all_weights)):
        raise SystemExit("nncodec did not give the weights back")
    count = sum(weights.size for weights in all_weights)
    return 8 * sum(map(len, streams)) / count, count / seconds


def _unused() -> list:
    """Its tools for histories, off, as its own HDSP_OPTS_OFF."""
    return [deepCABAC.HdspMode.AlwaysOff, np.zeros(2, np.int8)]


def _nncodec_encode(weights: np.ndarray) -> np.ndarray:
    encoder = deepCABAC.Encoder()
    encoder.initCtxModels(UNARY_LENGTH, 1)
    # Plain quantization, scan order 0, the first profile: nncodec's defaults for weights.
    skipped = np.zeros(len(weights), np.int32)
    encoder.encodeLayer(weights, 0, 0, 0, 0, 0, skipped, *_unused(), 0, 0)
    return encoder.finish()


def _nncodec_decode(stream: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    weights = np.zeros(shape, np.int32)
    decoder = deepCABAC.Decoder()
    decoder.setStream(stream)
    decoder.initCtxModels(UNARY_LENGTH)
    decoder.decodeLayer(weights, 0, 0, 0, 0, *_unused(), 0, 0)
    decoder.finish()
    return weights


def ours(layers: Layers, coder: str, folder: Path) -> tuple[float, float]:
    """Bits a weight in penjing's ``coder``, and weights unpacked a second."""
    source, packed, back = (folder / name for name in ("m.onnx", "m.penjing", "b.onnx"))
    source.write_bytes(onnx_file(layers))
    pack(source, packed, coder)
    _, seconds = timed(lambda: unpack(packed, back), RUNS)
    if back.read_bytes() != source.read_bytes():
        raise SystemExit("the file did not come back bit for bit")
    return bits_per_weight(packed), sum(weights.size for weights, _ in layers) / seconds


def general(layers: Layers) -> dict[str, float]:
    """Bits a weight of compressors that know nothing of weights."""
    data = b"".join(weights.tobytes() for weights, _ in layers)
    zstd = subprocess.run(["zstd", "-19", "-c"], input=data, capture_output=True, check=True)
    xz = lzma.compress(data, preset=9)
    return {"zstd -19": 8 * len(zstd.stdout) / len(data), "xz -9": 8 * len(xz) / len(data)}


def measure(work: str, layers: Layers, folder: Path) -> list[dict]:
    """All rows of one net."""
    bits, speed = ours(layers, "arithmetic", folder)
    huffman, huffman_speed = ours(layers, "huffman", folder)
    peers = {"order-0 entropy": order0(layers)} | general(layers)
    peer_speed = None
    if deepCABAC:
        peers[NNCODEC], peer_speed = nncodec_bits_and_speed(layers)
    free: dict[str, None] = {"goal": None, "met": None}
    rows = [row(work, "arithmetic, bits a weight", bits, peers[peer], peer) for peer in peers]
    rows += [
        row(work, "huffman, bits a weight", huffman, peers[peer], peer) | free for peer in peers
    ]
    for coder, own in (("arithmetic", speed), ("huffman", huffman_speed)):
        name = f"{coder}, M weights decoded a second"
        peer = peer_speed / 1e6 if peer_speed else None
        asked = coder == "arithmetic" and peer is not None
        wanted = {"goal": f"at least {NNCODEC}", "met": own / 1e6 >= peer} if asked else free
        rows.append(row(work, name, own / 1e6, peer, NNCODEC) | wanted)
    return rows


def main() -> None:
    """Measure every net in every form and write results/lossless.json."""
    words = sys.argv[1:]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for work, layers in works():
            if all(word in work for word in words):
                rows += measure(work, layers, Path(folder))
                print(work, *(f"\n  {r['measure']}: {r['ours']} {r['peer']}" for r in rows[-10:]))
    if not words:
        results.write("lossless", rows, "python benchmarks/lossless.py")


if __name__ == "__main__":
    main()
