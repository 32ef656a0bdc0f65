"""An exploration whose page is written anew after each candidate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from penjing.exploration import search
from penjing.exploration.study import Study
from penjing.report import page


@functools.wraps(search.explore)
def explore(
    *arguments: Any, on_change: Callable[[Study], None] = lambda study: None, **options: Any
) -> Study:
    """``penjing.exploration.explore``, with ``report.html`` in the study's folder."""

    def changed(study: Study) -> None:
        page.write(study.folder, study.folder / "report.html", renews=study.running)
        on_change(study)

    return search.explore(*arguments, on_change=changed, **options)
