"""Labelled images of one split, decoded on demand."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor

from penjing.progress import shown
from penjing.tasks import augment
from penjing.tasks.image_files import read
from penjing.tasks.preprocessing import Preprocessing

# Image decoding releases Python's lock, so threads are enough and errors arrive unchanged.
THREADS = min(8, os.cpu_count() or 1)
LONG_DECODE = 5000


class Images:
    """Images of one split with their labels, a ``penjing.tasks.task.Split``.

    Args:
        sources: image files, or uint8 pixels ``[N, H, W]`` (grey) or ``[N, H, W, C]``.
        labels: int64 ``[N]``.
        preprocessing: resizing and cropping of each image.
        keep: whether decoded images stay in memory.
        root: folder that file names are relative to in the fingerprint.
        mirrored: whether augmentation may mirror an image, since its class stays.
    """

    def __init__(
        self,
        sources: Sequence[Path] | NDArray[np.uint8],
        labels: Tensor,
        preprocessing: Preprocessing,
        *,
        keep: bool = True,
        root: Path | None = None,
        mirrored: bool = True,
    ):
        self.sources = sources
        self.labels = labels
        self.preprocessing = preprocessing
        self.keep = keep
        self.root = root
        self.mirrored = mirrored
        self._pixels: Tensor | None = None
        self._decoded = torch.zeros(len(labels), dtype=torch.bool)
        if isinstance(sources, np.ndarray) and self._is_input(sources):
            planes = sources if sources.ndim == 4 else sources[..., None]
            self._pixels = torch.from_numpy(planes.transpose(0, 3, 1, 2).copy())
            self._decoded.fill_(True)
            self.keep = True

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        order: Tensor,
        batch_size: int,
        generator: Generator | None = None,
        shift: float = augment.SHIFT,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels uint8 ``[n, C, H, W]`` and labels int64 ``[n]`` of the images at ``order``;
        with a generator, shifted at random by up to ``shift`` of the side and, if ``mirrored``,
        mirrored at random."""
        for pixels, labels in self._plain_batches(order, batch_size):
            if generator is not None:
                pixels = augment.shift(pixels, generator, shift)
                if self.mirrored:
                    pixels = augment.flip(pixels, generator)
            yield pixels, labels

    def _plain_batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        if self.keep:
            self._decode_into_memory(order)
            assert self._pixels is not None
            for part in order.split(batch_size):
                yield self._pixels[part], self.labels[part]
        else:
            yield from self._decode_ahead(order.split(batch_size))

    def digest(self) -> bytes:
        """Return the SHA-256 of the labels and of the files' names and sizes, or of the pixels."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        if isinstance(self.sources, np.ndarray):
            digest.update(str(self.sources.shape).encode())
            digest.update(np.ascontiguousarray(self.sources).data)
        else:
            for path in self.sources:
                name = path.relative_to(self.root) if self.root else path
                digest.update(os.fsencode(name.as_posix()) + f"\0{path.stat().st_size}\0".encode())
        return digest.digest()

    def _is_input(self, pixels: NDArray[np.uint8]) -> bool:
        known = self.preprocessing
        channels = pixels.shape[3] if pixels.ndim == 4 else 1
        same = (*pixels.shape[1:3], channels) == (known.height, known.width, known.channels)
        return same and known.resize in (None, min(known.height, known.width))

    def _decode(self, index: int) -> Tensor:
        source = self.sources[index]
        if not isinstance(source, Path):
            pixels = source[..., 0] if source.ndim == 3 and source.shape[2] == 1 else source
            return self.preprocessing.pixels(Image.fromarray(pixels))
        return self.preprocessing.pixels(read(source), str(source))

    def _decode_into_memory(self, order: Tensor) -> None:
        if self._pixels is None:
            known = self.preprocessing
            shape = (len(self), known.channels, known.height, known.width)
            self._pixels = torch.empty(shape, dtype=torch.uint8)
        missing = order[~self._decoded[order]]
        if not len(missing):
            return
        parts = missing.split(64)
        with ThreadPoolExecutor(THREADS) as pool:
            decoded = pool.map(self._decode_many, parts)
            many = len(missing) >= LONG_DECODE
            bar = shown(decoded, f"reading {len(missing)} images", len(parts), long=many)
            for part, pixels in zip(parts, bar, strict=True):
                self._pixels[part] = pixels
                self._decoded[part] = True

    def _decode_many(self, indices: Tensor) -> Tensor:
        return torch.stack([self._decode(index) for index in indices.tolist()])

    def _decode_ahead(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        waiting: deque[tuple[Tensor, Iterator[Tensor]]] = deque()

        def next_batch() -> tuple[Tensor, Tensor]:
            part, decoded = waiting.popleft()
            return torch.stack(list(decoded)), self.labels[part]

        with ThreadPoolExecutor(THREADS) as pool:
            for part in parts:
                waiting.append((part, pool.map(self._decode, part.tolist())))
                if len(waiting) > 2:
                    yield next_batch()
            while waiting:
                yield next_batch()
