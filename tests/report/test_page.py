import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import synthetic

from penjing import report, units
from penjing.errors import PenjingError


class Page(HTMLParser):
    """Tags with their attributes, the visible text, and the rows of the table of points."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.css, self._inside = "", "", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "style":
            self.css += data
        elif self._inside != "script":
            self.text += data


def words(text: str) -> str:
    return " ".join(text.split())


def body(html: str) -> str:
    """The page without plotly.js itself."""
    return html[html.index("<body>") :]


def test_page_loads_nothing(page, study):
    html = page(study)
    parsed = Page(html)
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not re.match(r"\s*(\w+:)?//", value or ""), (tag, name, value)
            inside = (value or "").startswith("data:image/png;base64,")
            loads = name in ("src", "srcset", "data", "poster", "action")
            assert inside or not loads, (tag, name, value)
    assert "@import" not in parsed.css and "url(" not in parsed.css
    policy = next(a for t, a in parsed.tags if t == "meta" and "http-equiv" in a)["content"]
    assert policy.startswith("default-src 'none';") and "http" not in policy
    assert "http" not in body(html)
    assert 4e6 < len(html) < 6e6


def test_plots_cannot_upload_and_state_their_limits(page, study):
    html = body(page(study))
    assert html.count('"modeBarButtons": [["zoom2d", "pan2d", "resetScale2d", "toImage"]]') == 3
    for text in ("at most 80 KB", "at most 0.4 ms", "at least 86.94 %"):
        assert text in html


def test_headline(page, study):
    """24.2 = 953,502 / 39,382 bytes; the drop and speed-up likewise from the record itself."""
    parsed = Page(body(page(study)))
    best = next(p for p in study["points"] if p["name"] == study["best"])
    smaller = study["baseline"]["packed_bytes"] / best["packed_bytes"]
    faster = best["reference_latency_ms"] / best["latency_ms"]
    lower = 100 * best["drop"]
    expected = f"{smaller:.1f}× smaller, {faster:.2f}× faster, score {lower:.2f} points lower"
    assert expected in parsed.text
    assert "Budget met" in parsed.text


def test_every_figure_of_every_point_is_there(page, study):
    html = body(page(study))
    unit = units.ScoreUnit(percent=True)
    for point in study["points"]:
        row = _row(html, point["name"])
        values = [value for value, _ in row]
        assert point["packed_bytes"] == int(values[0])
        assert point["score"] == float(values[9])
        texts = [text for _, text in row]
        for expected in (
            f"{point['packed_bytes'] / 1000:,.1f}",
            f"{point['onnx_bytes'] / 1000:,.1f}",
            f"{point['params']:,}",
            f"{point['macs'] / 1e6:.2f}",
            f"{point['latency_ms']:.3f}",
            f"{point['latency_p10_ms']:.3f}",
            f"{point['latency_p90_ms']:.3f}",
            f"{point['peak_rss_bytes'] / 1e6:.1f}",
            f"{100 * point['score']:.2f}",
            unit.text(point["drop"]),
        ):
            assert expected in texts, (point["name"], expected, texts)
        assert f'href="{point["folder"]}/"' in html


def _row(html: str, name: str) -> list[tuple[str, str]]:
    start = html.index(f'<th scope="row" data-value="{name}">')
    return re.findall(
        r'<td data-value="([^"]*)">([^<]*)</td>', html[start : html.index("</tr>", start)]
    )


def test_headings_sort(page, study):
    html = body(page(study))
    table = html[html.index('id="points"') :]
    head = table[: table.index("</thead>")]
    headings = re.findall(r'<th scope="col"[^>]*aria-sort="none"><button type="button">', head)
    assert len(headings) == 1 + len(_row(html, "original"))
    assert table.count('<tbody id="point-') == len(study["points"])
    assert "addEventListener" in html


def test_what_users_wrote_is_escaped(page, study):
    evil = "<script>alert('x')</script>&\"</td>"
    scripts = body(page(study)).count("<script")
    text = (
        json.dumps(study).replace("20 % channel pruning + W4A8", "NAME").replace("cifar10", "DATA")
    )
    study = json.loads(text)
    for point in study["points"]:
        point["folder"] = point["folder"].replace("<", "_")
        if point["name"] == "NAME":
            point["name"], point["notes"] = evil, [evil]
    best = next(p for p in study["points"] if p["name"] == study["best"])
    best["name"] = study["best"] = f"best{evil}"
    best["layers"][0]["name"] = study["baseline"]["layers"][0]["name"] = evil
    study["frontier"] = [evil, best["name"]]
    study["model"] = study["data"] = study["cpu"] = evil
    study["failures"] = {evil: evil}
    html = body(page(study))
    assert "<script>alert" not in html and "alert('x')</script>" not in html
    assert html.count("<script") == html.count("</script") == scripts
    assert evil in Page(html).text


def variants() -> dict[str, Any]:
    def only_baseline(study):
        study |= {"points": [study["baseline"]], "frontier": ["original"]}
        study |= {"best": None, "nearest": "original"}

    def baseline_not_among_points(study):
        study |= {"points": [], "frontier": [], "best": None, "budget": {}}

    def no_test_scores(study):
        for point in study["points"]:
            point |= {"test_score": None, "test_drop": None}

    def no_best(study):
        budget = {"size": 10_000.0, "drop": 0.001, "latency": None}
        study |= {"best": None, "nearest": study["frontier"][0], "budget": budget}

    def best_is_baseline(study):
        study |= {"best": "original"}

    def single_point(study):
        study |= {"points": study["points"][:2], "frontier": [], "best": study["points"][1]["name"]}

    def not_measured(study):
        for point in study["points"]:
            for key in ("latency_ms", "latency_p10_ms", "latency_p90_ms", "peak_rss_bytes"):
                point[key] = None

    def no_budget(study):
        study |= {"budget": {"size": None, "latency": None, "drop": None}}

    def scores_beyond_one(study):
        for point in study["points"]:
            point["score"] -= 40
            if point["test_score"] is not None:
                point["test_score"] -= 40

    def few_images(study):
        for point in study["points"][1:]:
            point |= {"drop_low": point["drop"] - 0.05, "drop_high": point["drop"] + 0.05}
        study["doubt"] = (
            "whether it loses at most 1.50% cannot be told: about 900 images would tell"
        )

    def of_an_earlier_version(study):
        for point in study["points"]:
            for key in ("drop_low", "drop_high", "divergence", "test_drop_low", "test_drop_high"):
                point.pop(key, None)

    def no_layers(study):
        for point in study["points"]:
            point["layers"] = []

    return {key: value for key, value in locals().items() if callable(value)}


@pytest.mark.parametrize("variant", variants())
def test_robust(page, study, variant):
    variants()[variant](study)
    parsed = Page(body(page(study)))
    report.table(study)
    assert "None" not in parsed.text
    said = words(parsed.text)
    expected = {  # what the page then says
        "only_baseline": "Nothing but the baseline has been measured yet.",
        "baseline_not_among_points": "Nothing but the baseline has been measured yet.",
        "no_best": "No point meets the budget; the nearest has size",
        "best_is_baseline": "The original is the best point",
        "no_budget": "No budget was given",
        "not_measured": "latency not measured of at most 0.400 ms",
        "scores_beyond_one": "−39.1156",
        "no_layers": "Every point",
        "few_images": "about 900 images would tell.",
        "of_an_earlier_version": "Whether the budget is met cannot be told: drop 0.67 points of",
        "single_point": "Best point: W8A8",
        "no_test_scores": "Budget met",
    }[variant]
    assert expected in said


def test_limits_are_met_missed_or_open(page, study):
    best = next(p for p in study["points"] if p["name"] == study["best"])
    best |= {"drop": 0.01, "drop_low": -0.002, "drop_high": 0.022}
    html = body(page(study))
    said = words(Page(html).text)
    assert "Whether the budget is met cannot be told: drop 1.00 points (−0.20 points to" in said
    assert html.count('class="badge met"') == 2 and html.count('class="badge open"') == 2
    best |= {"drop_low": 0.0151, "drop": 0.016}
    html = body(page(study))
    assert "The best point misses drop 1.60 points" in words(Page(html).text)
    assert 'class="badge open"' not in html and html.count('class="badge missed"') == 2


def test_a_baseline_trained_on_validation_is_told(page, study):
    assert "trained on the validation images" not in Page(body(page(study))).text
    study["baseline"] |= {"score": 0.9984, "test_score": 0.8844}
    text = Page(body(page(study))).text
    assert "probably been trained on the validation images" in words(text)


@pytest.mark.parametrize("faster", [0.96, 1.04])
def test_what_noise_explains_is_as_fast(page, study, faster: float):
    best = next(p for p in study["points"] if p["name"] == study["best"])
    best["latency_ms"] = best["reference_latency_ms"] / faster
    assert "24.2× smaller, as fast, score 0.67 points lower" in Page(body(page(study))).text


def test_classes_given_before_and_after(page, study):
    html = body(page(study))
    text = words(Page(html).text)
    assert "gives 2 of 300 validation images another class" in text
    cells = re.findall(r'<td class="(?:right|wrong)"[^>]*>(\d*)</td>', html)
    before = ["95", "5", "", "6", "94", "", "", "1", "99"]
    assert cells == [*before, "94", "6", "", "5", "95", "", "", "1", "99"]
    assert text.index("catbefore: catafter: dog") < text.index("dogbefore: catafter: dog")
    study["best"] = None
    study["nearest"] = "W8A8"
    assert "Classes given" not in Page(body(page(study))).text, "of this point nothing is known"


def test_links_lead_from_where_the_page_lies(tmp_path: Path, study):
    folder = synthetic.write(study, tmp_path / "a study")
    report.write(folder, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'href="a%20study/trials/W8A8/"' in html


def test_the_command_that_goes_on_is_the_one_that_was_given(page, study):
    study["command"] = "penjing explore penjing:resnet20 --data 'my data' --time 30m"
    assert study["command"] in Page(body(page(study))).text
    study["command"] = None
    assert "the same call" in Page(body(page(study))).text


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("{", "not readable as JSON"), ('{"version": 9}', "version 9")],
)
def test_unreadable_studies(tmp_path: Path, content, message):
    if content is not None:
        (tmp_path / "frontier.json").write_text(content)
    with pytest.raises(PenjingError, match=message):
        report.write(tmp_path, tmp_path / "report.html")
