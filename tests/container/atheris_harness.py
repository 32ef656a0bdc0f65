"""Damage led by the decoder's own branches, with Google's atheris; no test, as it never ends.

    pip install atheris
    python tests/container/atheris_harness.py [CORPUS] -max_total_time=600

The corpus starts with the seeds of ``mutations``. Each input is tried as it is and with checksums
that fit; the first that gives anything but the bytes or one PenjingError is kept as ``crash-...``.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["penjing.container"]):
    from mutations import check, sealed, seeds, small_streams


def main() -> None:
    with small_streams(), tempfile.TemporaryDirectory() as folder:
        known = seeds()
        places = [word for word in sys.argv[1:] if not word.startswith("-")]
        corpus = Path(places[0] if places else f"{folder}/corpus")
        corpus.mkdir(exist_ok=True)
        for index, seed in enumerate(known):
            (corpus / f"seed{index}").write_bytes(seed.data)

        def try_input(data: bytes) -> None:
            check(data, Path(folder), known, resealed=True)
            if (fitting := sealed(data)) != data:
                check(fitting, Path(folder), known, resealed=True)

        words = [word for word in sys.argv if word.startswith("-")]
        atheris.Setup([sys.argv[0], *words, str(corpus)], try_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
