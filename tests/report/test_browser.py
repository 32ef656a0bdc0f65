"""The page as a browser shows it: headless Chromium runs its scripts and tells what it sees."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import synthetic

from penjing.report import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium"
)

PROBE = """
<script>
const seen = { violations: 0, loads: Number(sessionStorage.loads ?? 0) + 1 };
sessionStorage.loads = seen.loads;
const real = setInterval, renewals = [];
window.setInterval = (act, ms) => (ms === 10000 ? renewals.push(act) : real(act, ms));
addEventListener("securitypolicyviolation", () => { seen.violations += 1; });
addEventListener("load", () => setTimeout(() => {
  if (seen.loads === 1 && renewals.length) return renewals[0]();
  const column = (index) => [...document.querySelectorAll("#points > tbody")].map(
    (body) => body.rows[0].cells[index].dataset.value);
  const click = (index) => {
    document.querySelectorAll("#points thead button")[index].click();
    return column(index);
  };
  seen.ascending = click(1);
  seen.descending = click(1);
  seen.byName = click(0);
  const best = document.querySelector("#points tbody.best");
  seen.hidden = best.rows[1].hidden;
  best.querySelector(".more").click();
  seen.shown = !best.rows[1].hidden;
  seen.recipe = best.querySelector("pre").textContent;
  seen.plots = document.querySelectorAll(".js-plotly-plot .main-svg").length;
  seen.pictures = [...document.querySelectorAll(".pictures img")].map((image) => image.naturalWidth);
  seen.fetched = performance.getEntriesByType("resource")
    .map((entry) => entry.name).filter((name) => !name.startsWith("data:"));
  renewals.forEach((renew) => renew());  // Somebody is reading the details now.
  seen.wider = document.documentElement.scrollWidth - innerWidth;
  const told = document.createElement("pre");
  told.id = "seen";
  told.textContent = JSON.stringify(seen);
  document.body.append(told);
}, 500));
</script>
"""


def opened(file: Path, *options: str) -> tuple[Any, str]:
    """What the probe saw on the page in ``file``, and what Chromium wrote to its log."""
    html = file.read_text(encoding="utf-8")
    file.write_text(html.replace("<head>", f"<head>{PROBE}", 1), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={file.parent / 'browser'}", "--virtual-time-budget=5000"]
    done = subprocess.run([*command, *options, file.as_uri()], capture_output=True, text=True)
    told = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told, done.stderr
    plain = told[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&")
    return json.loads(plain), done.stderr


@pytest.fixture
def file(tmp_path: Path, study: dict[str, Any]) -> Path:
    folder = synthetic.write(study, tmp_path / "study")
    page.write(folder, folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_works_and_fetches_nothing(file: Path, study: dict[str, Any], width: int) -> None:
    seen, log = opened(file, f"--window-size={width},900")
    assert "CONSOLE" not in log and not seen["violations"]
    assert not seen["fetched"]
    sizes = sorted(point["packed_bytes"] for point in study["points"])
    assert [float(size) for size in seen["ascending"]] == sizes
    assert [float(size) for size in seen["descending"]] == sizes[::-1]
    assert set(seen["byName"]) == {point["name"] for point in study["points"]}
    assert seen["hidden"] and seen["shown"]
    assert "prune_channels:" in seen["recipe"] and "weight_bits: 4" in seen["recipe"]
    assert seen["plots"] >= 3 and seen["pictures"] == [32, 32]
    assert seen["wider"] <= 0, "the page itself must not scroll sideways"


def test_an_error_in_a_script_would_be_seen(file: Path) -> None:
    html = file.read_text(encoding="utf-8")
    file.write_text(html.replace("</main>", "</main><script>broken()</script>"), encoding="utf-8")
    assert "CONSOLE" in opened(file)[1]


def test_a_page_is_read_again_while_the_study_runs(tmp_path: Path, study: dict[str, Any]) -> None:
    folder = synthetic.write(study, tmp_path / "study")
    loads = {}
    for renews in (True, False):
        page.write(folder, folder / "report.html", renews=renews)
        loads[renews] = opened(folder / "report.html")[0]["loads"]
    assert loads == {True: 2, False: 1}
