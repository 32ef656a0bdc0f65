"""Canonical Huffman coding of a plane of byte symbols, with runs of zeros written as numbers.

A run of the plane's centre symbol becomes its length in bijective base 2 (the digits RUN_A and
RUN_B of bzip2), so that a pruned layer costs less than one bit a weight. Code lengths come from
Huffman's construction (1952), limited to 15 bits.
"""

from __future__ import annotations

import heapq

import numpy as np

from penjing.container.damage import DamageError

LONGEST = 15
_DIGIT = 256
"""Tokens 0..255 are symbols, 256 and 257 the digits of a run."""
_TOKENS = 258
_CHUNK = 1 << 16


def code_lengths(counts: np.ndarray) -> np.ndarray:
    """uint8 code length in bits of each token, 0 where its count is 0; optimal if none exceeds 15.

    Counts are halved until the longest code fits.
    """
    counts = np.asarray(counts, np.int64)
    while (lengths := _unlimited_lengths(counts)).max(initial=0) > LONGEST:
        counts = (counts + 1) >> 1
    return lengths


def encode(symbols: np.ndarray, centre: int) -> bytes:
    """Code the uint8 ``symbols``; ``centre`` is the one whose runs are shortened."""
    tokens = _to_tokens(symbols, centre)
    lengths = code_lengths(np.bincount(tokens, minlength=_TOKENS))
    low, high = int(symbols.min()), int(symbols.max())
    codes = _canonical(lengths)
    bits = [_bits(codes, lengths, tokens[i : i + _CHUNK]) for i in range(0, len(tokens), _CHUNK)]
    header = bytes((low, high, centre)) + len(tokens).to_bytes(4, "little")
    return header + _nibbles(lengths, low, high) + np.packbits(np.concatenate(bits)).tobytes()


def decode(data: bytes, number: int) -> np.ndarray:
    """The ``number`` uint8 symbols that ``encode`` coded.

    Raises:
        DamageError: ``data`` cannot be the output of ``encode`` for so many symbols.
    """
    if len(data) < 7 or data[0] > data[1]:
        raise DamageError("a Huffman-coded plane has no valid range of symbols")
    low, high, centre = data[:3]
    tokens = int.from_bytes(data[3:7], "little")
    table = (high - low + 4) // 2
    lengths = _from_nibbles(data[7 : 7 + table], low, high)
    body = np.frombuffer(data, np.uint8, offset=min(len(data), 7 + table))
    if tokens > 8 * len(body):
        raise DamageError("a Huffman-coded plane is cut short")
    return _from_tokens(_read(body, lengths, tokens), centre, number)


def _unlimited_lengths(counts: np.ndarray) -> np.ndarray:
    lengths = np.zeros(len(counts), np.uint8)
    used = np.flatnonzero(counts)
    if len(used) == 1:
        lengths[used] = 1
    heap = [(int(counts[token]), int(token), [int(token)]) for token in used]
    heapq.heapify(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        merged = first[2] + second[2]
        lengths[merged] += 1
        heapq.heappush(heap, (first[0] + second[0], min(first[1], second[1]), merged))
    return lengths


def _canonical(lengths: np.ndarray) -> np.ndarray:
    """Codes in order of length, then token, as in RFC 1951.

    Raises:
        DamageError: there are more codes than such lengths allow.
    """
    codes = np.zeros(len(lengths), np.int64)
    code = previous = 0
    for token in np.lexsort((np.arange(len(lengths)), lengths)).tolist():
        length = int(lengths[token])
        if length:
            code <<= length - previous
            if code >> length:
                raise DamageError("the code lengths of a Huffman-coded plane do not form a code")
            codes[token], code, previous = code, code + 1, length
    return codes


def _bits(codes: np.ndarray, lengths: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The bits (uint8 0 or 1) of the codes of ``tokens``, most significant first."""
    widths = lengths[tokens].astype(np.int64)
    ends = np.cumsum(widths)
    shifts = np.repeat(ends, widths) - 1 - np.arange(ends[-1])
    return ((np.repeat(codes[tokens], widths) >> shifts) & 1).astype(np.uint8)


def _read(body: np.ndarray, lengths: np.ndarray, number: int) -> np.ndarray:
    """``number`` tokens from the packed bits ``body``.

    All bit positions of a chunk are looked up at once; a plain loop then hops from code to code.
    """
    symbol_of, length_of = _lookup(lengths)
    padded = np.concatenate([body, np.zeros(3, np.uint8)]).astype(np.int32)
    tokens = np.empty(number, np.int64)
    done = start = 0
    for first in range(0, len(body), _CHUNK):
        window = _windows(padded[first : first + _CHUNK + 2])
        at, start = _hop(length_of[window].tolist(), start, number - done)
        tokens[done : done + len(at)] = symbol_of[window[at]]
        done += len(at)
    if done < number or (tokens < 0).any():
        raise DamageError("a Huffman-coded plane holds an invalid code")
    return tokens


def _lookup(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token (-1: none) and code length for each value of the next 15 bits."""
    symbol_of = np.full(1 << LONGEST, -1, np.int64)
    length_of = np.full(1 << LONGEST, LONGEST, np.int64)
    codes = _canonical(lengths)
    for token in np.flatnonzero(lengths).tolist():
        free = LONGEST - int(lengths[token])
        window = slice(int(codes[token]) << free, int(codes[token]) + 1 << free)
        symbol_of[window], length_of[window] = token, lengths[token]
    return symbol_of, length_of


def _windows(data: np.ndarray) -> np.ndarray:
    """The 15 bits that start at each bit of ``data``, except its last two bytes."""
    three = (data[:-2] << 16) | (data[1:-1] << 8) | data[2:]
    return ((three[:, None] >> np.arange(9, 1, -1)) & 0x7FFF).ravel()


def _hop(lengths: list[int], start: int, most: int) -> tuple[list[int], int]:
    """The places where at most ``most`` codes start, and where the next one does in the next chunk."""
    starts: list[int] = []
    while start < len(lengths) and len(starts) < most:
        starts.append(start)
        start += lengths[start]
    return starts, start - len(lengths)


def _to_tokens(symbols: np.ndarray, centre: int) -> np.ndarray:
    zero = symbols == centre
    first = np.flatnonzero(zero & ~np.r_[False, zero[:-1]])
    last = np.flatnonzero(zero & ~np.r_[zero[1:], False])
    kept = ~zero
    kept[first] = True
    tokens = symbols[kept].astype(np.int64)
    run = np.zeros(len(symbols), np.int64)
    run[first] = last - first + 1
    runs = run[kept]
    digits = np.where(runs > 0, np.frexp(runs + 1.0)[1] - 1, 1)
    place = np.arange(digits.sum()) - np.repeat(np.cumsum(digits) - digits, digits)
    runs = np.repeat(runs, digits)
    return np.where(runs > 0, _DIGIT + (((runs + 1) >> place) & 1), np.repeat(tokens, digits))


def _from_tokens(tokens: np.ndarray, centre: int, number: int) -> np.ndarray:
    digit = tokens >= _DIGIT
    index = np.arange(len(tokens))
    place = index - np.maximum.accumulate(np.where(digit, -1, index)) - 1
    if len(place) and place[digit].max(initial=0) > 31:
        raise DamageError("a run of a Huffman-coded plane is longer than the plane")
    repeats = np.where(digit, (tokens - _DIGIT + 1) << np.where(digit, place, 0), 1)
    if int(repeats.sum()) != number:
        raise DamageError("a Huffman-coded plane holds another number of symbols than its tensor")
    return np.repeat(np.where(digit, centre, tokens).astype(np.uint8), repeats)


def _nibbles(lengths: np.ndarray, low: int, high: int) -> bytes:
    """The lengths of the symbols low..high and of the two digits, two a byte."""
    used = np.r_[lengths[low : high + 1], lengths[_DIGIT:]]
    used = np.r_[used, np.zeros(len(used) % 2, np.uint8)]
    return (used[::2] | used[1::2] << 4).astype(np.uint8).tobytes()


def _from_nibbles(data: bytes, low: int, high: int) -> np.ndarray:
    pairs = np.frombuffer(data, np.uint8)
    used = np.stack([pairs & 15, pairs >> 4], axis=1).ravel()[: high - low + 3]
    if len(used) < high - low + 3:
        raise DamageError("the code lengths of a Huffman-coded plane are cut short")
    lengths = np.zeros(_TOKENS, np.uint8)
    lengths[low : high + 1], lengths[_DIGIT:] = used[:-2], used[-2:]
    return lengths
