import base64
import re
from html.parser import HTMLParser

import pytest

from lut_ds.analysis import page
from lut_ds.analysis.curves import draw_curves, run_metrics
from lut_ds.analysis.report import environment_section, recipe_section, summarise, training_section, write_report
from lut_ds.transfer.load import find_checkpoint

VOID = {"meta", "img", "source"}


class Strict(HTMLParser):
    """Fails on tags that do not match; collects what the page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.ids, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def parse(html):
    parser = Strict()
    parser.feed(html)
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def report(lut_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    recipe = find_checkpoint(lut_run).recipe
    sections = [training_section(lut_run, recipe), recipe_section(recipe), environment_section(lut_run)]
    write_report(path, "A title", "One sentence.", "", sections, eyebrow="x", footer="y")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text()


def test_the_page_is_well_formed_and_refers_to_nothing_outside(report):
    parser = parse(report)
    assert {f"#{i}" for i in parser.ids} == {r for r in parser.references if r.startswith("#")}
    images = [r for r in parser.references if not r.startswith("#")]
    assert len(images) == 2
    for image in images:
        assert base64.b64decode(image.removeprefix("data:image/png;base64,"))[:4] == b"\x89PNG"
    assert not re.search(r"https?:|@import|url\(|<script", report)


def test_the_page_tells_recipe_environment_and_losses(report, lut_run):
    text = " ".join(parse(report).text)
    for expected in ("global_batch", "144", "torch", "Reconstruction loss (mae)", "30 steps of 144 images, 3 epochs"):
        assert expected in text, expected
    summary = summarise(run_metrics(lut_run), 144)
    assert f"{summary.last['mae']:.4g}" in text


def test_both_colour_schemes_are_served(report):
    assert report.count("prefers-color-scheme: dark") >= 2
    assert "color-scheme: light dark" in report


def test_the_summary_counts_every_image_once():
    records = [
        {"step": s, "epoch": s / 4, "lr": 0.1, "loss": 10.0 - s, "mae": 10.0 - s, "feature_spread": 0.5}
        for s in range(1, 9)
    ]
    records[3]["images_per_s"] = 20.0
    records[7]["images_per_s"] = 40.0
    summary = summarise(records, 10)
    assert summary.seconds == pytest.approx(2.0 + 1.0)
    assert summary.images_per_second == pytest.approx(80 / 3)
    assert summary.first["loss"] == pytest.approx(7.5)
    assert summary.last["loss"] == pytest.approx(3.5)


def test_text_from_outside_is_escaped():
    nasty = '<script>alert("x")</script>&'
    html = page.page(
        nasty,
        nasty,
        nasty,
        page.tiles([page.Tile(nasty, nasty, nasty, nasty, nasty)]),
        [
            page.Section(
                nasty, page.text(nasty) + page.facts({nasty: nasty}) + page.table([nasty], [[nasty, nasty]], nasty)
            ),
            page.Section(
                "more", page.folded(nasty, page.picture(draw_curves([{"epoch": 1, "lr": 1.0}]), nasty, nasty))
            ),
        ],
        nasty,
    )
    assert "<script" not in html
    parse(html)


def test_text_from_runs_is_escaped():
    nasty = '<script>alert("x")</script>&'
    body = page.part(nasty, page.note(nasty)) + page.columns([nasty, nasty], {nasty: [nasty, 1]}, mark=True)
    body += page.log([(nasty, nasty, nasty)]) + page.stored_picture(b"0" * 24, b"", nasty, nasty)
    html = page.page("", "", "", "", [page.Section("x", body)], "")
    assert "<script" not in html
    assert parse(html).text.count(nasty) == 10
