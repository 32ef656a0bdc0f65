"""``python -m penjing.cli`` is ``penjing``."""

from penjing.cli.main import main

main()
