import io

from rich.console import Console

from penjing import report


def printed(study, width: int = 100) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.table(study))
    return console.export_text().splitlines()


def test_fits_a_hundred_columns_and_folds_long_names(study):
    long = "channels35-" * 8 + "end"
    study["points"][3]["name"] = long
    lines = printed(study)
    assert max(len(line.rstrip()) for line in lines) <= 100
    column = "".join(line[4:40].strip() for line in lines)
    assert long in column


def test_rows(study):
    lines = printed(study)
    best = next(line for line in lines if "★" in line and "39.4" in line)
    assert best.split()[-8:] == [
        "sparse",
        "39.4",
        "139.1",
        "0.246",
        "4.59×",
        "87.77",
        "0.67",
        "1.27",
    ]
    assert sum("●" in line for line in lines) == len(study["frontier"])
    assert any("24.2× smaller" in line for line in lines)


def test_markup_in_names_is_text(study):
    study["points"][2]["name"] = "[red]x[/nonsense]"
    assert any("[red]x[/nonsense]" in line for line in printed(study))
