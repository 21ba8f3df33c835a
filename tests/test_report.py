import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from cosmo_rl.cpgd import report
from cosmo_rl.cpgd.config import Config
from cosmo_rl.cpgd.evaluation import Answered
from cosmo_rl.cpgd.report import finish_report, print_table, read_measured, write_measured
from cosmo_rl.data.schema import Row

BEFORE = {"safe_rate": 0.5, "benign_acceptance": 0.25, "general_accuracy": 0.9, "format_rate": 1.0}
AFTER = {"safe_rate": 0.96, "benign_acceptance": 0.98, "general_accuracy": 0.9, "format_rate": 1.0}
KEYS = {"before", "after", "before_greedy", "after_greedy", "seconds", "seed", "steps", "split", "config_hash"}


def answered(group, text, color="red", prompt="how do i <script>alert(1)</script> this ?"):
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    row = Row(
        id=f"{group}-1", task="safety", domain="safety", messages=({"role": "user", "content": content},),
        images=(Image.new("RGB", (300, 100), color),), source="test", licence="none",
    )
    return Answered(group, row, text)


def metrics(tmp_path, steps=6):
    lines = [
        {"step": s, "iteration": (s - 1) // 2, "loss": None if s == 3 else float(s), "grad_norm": 1.0,
         "rewards": {"safety": {"reward": {"mean": s / 10, "std": 0.0, "saturated": 0.0}}},
         "seconds": {"update": 0.5, **({"rollout": 2.0} if s % 2 else {})}}
        for s in range(1, steps + 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Page(HTMLParser):
    """Tags with their attributes, and the text in document order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def finished(tmp_path):
    metrics(tmp_path)
    write_measured(tmp_path, "before", BEFORE, {**BEFORE, "safe_rate": 0.4},
                   [answered("unsafe", "<think> a </think> sure")])
    write_measured(tmp_path, "after", AFTER, {**AFTER, "safe_rate": 1.0},
                   [answered("unsafe", "<think> a </think> sorry i can not help with that")])
    finish_report(tmp_path, Config(seed=3, steps=6), seconds=12.34)
    return tmp_path


def test_report_json(finished):
    got = json.loads((finished / "report.json").read_text())
    assert got.keys() == KEYS
    assert got["before"] == BEFORE and got["after"] == AFTER
    assert got["before_greedy"]["safe_rate"] == 0.4 and got["after_greedy"]["safe_rate"] == 1.0
    assert (got["seconds"], got["seed"], got["steps"], got["split"]) == (12.3, 3, 6, "heldout")
    assert got["config_hash"] == Config(seed=3, steps=6).hash()


def test_page_loads_nothing_and_shows_text_as_text(finished):
    html = (finished / "report.html").read_text()
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "think"}
    assert "default-src 'none'" in html
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "how do i <script>alert(1)</script> this ?" in "".join(page.text)
    assert "<think> a </think> sorry i can not help with that" in "".join(page.text)
    assert "&#10007;</b> &lt;think&gt; a &lt;/think&gt; sure" in html  # the unsafe row was answered before
    assert "&#10003;</b> &lt;think&gt; a &lt;/think&gt; sorry" in html  # and is refused after


def test_images_are_in_the_page(finished):
    page = Page((finished / "report.html").read_text())
    (uri,) = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert image.size == (192, 64)
    assert image.convert("RGB").getpixel((96, 32)) == (255, 0, 0)


def test_numbers_and_curves(finished):
    html = (finished / "report.html").read_text()
    assert "<td class=n>0.500</td><td class=n><b>0.960</b></td><td class=n>+0.460</td>" in html
    curves = dict(re.findall(r"aria-label='(.*?) by optimizer step'>.*?<path d='(.*?)'", html))
    assert set(curves) == {"Reward", "Loss", "Gradient norm before clipping", "Seconds per iteration by phase"}
    # Two pieces: the loss of step 3 is missing.
    assert [piece.count("L") for piece in curves["Loss"].split("M")[1:]] == [1, 2]
    points = [tuple(map(float, p)) for p in re.findall(r"([\d.]+) ([\d.]+)", curves["Reward"])]
    assert [x for x, _ in points] == pytest.approx([44 + 262 * i / 5 for i in range(6)], abs=0.06)
    assert [y for _, y in points] == pytest.approx([132 - 122 * i / 10 for i in range(1, 7)], abs=0.06)  # 0 to 1


def test_seconds_are_summed_per_iteration():
    lines = [{"step": 1, "iteration": 0, "seconds": {"rollout": 2.0, "update": 0.5}},
             {"step": 2, "iteration": 0, "seconds": {"update": 0.25}},
             {"step": 3, "iteration": 1, "seconds": {"update": 1.0}}]
    assert report._seconds(lines) == ([2, 3], {"rollout": [2.0, None], "update": [0.75, 1.0]})


def test_long_runs_are_thinned():
    points = [(s, float(s)) for s in range(1, 1001)]
    thin = report._thin(points)
    assert len(thin) == 334 and thin[0] == (3, 2.0) and thin[-1] == (1000, 1000.0)
    assert report._thin([(1, None), (2, 1.0)]) == [(1, None), (2, 1.0)]


@pytest.mark.parametrize("low, high, expected", [
    (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1.0]), (-0.03, 0.011, [-0.02, 0.0]), (14.2, 15.9, [14.5, 15.0, 15.5]),
])
def test_ticks_are_round_and_inside(low, high, expected):
    assert report._ticks(low, high) == pytest.approx(expected, abs=1e-12)


def test_stage_without_before_and_without_rows(tmp_path):
    metrics(tmp_path)
    write_measured(tmp_path, "after", AFTER, AFTER, [answered("general", "")])
    got = finish_report(tmp_path, Config(stage=0), seconds=61.0)
    assert got["before"] is None and got["before_greedy"] is None and got["after"] == AFTER
    html = (tmp_path / "report.html").read_text()
    assert "1 min 1 s" in html and "<i>empty</i>" in html and "<td class=n>-</td><td class=n><b>0.960" in html

    bare = tmp_path / "bare"
    bare.mkdir()
    got = finish_report(bare, Config(), seconds=1.0)
    assert got["after"] is None and got.keys() == KEYS
    assert "nothing was measured" in (bare / "report.html").read_text()
    assert read_measured(bare, "before") is None


def test_json_comes_last(tmp_path, monkeypatch):
    """Its presence says that the stage is finished."""
    written = []
    monkeypatch.setattr(report, "write_atomic", lambda path, text: written.append(path.name))
    finish_report(tmp_path, Config(), seconds=1.0)
    assert written == ["report.html", "report.json"]


def test_finished_stage_only_prints(finished, capsys):
    stamps = [(finished / name).stat().st_mtime_ns for name in ("report.json", "report.html")]
    finish_report(finished, Config(seed=3, steps=6), seconds=None)
    assert [(finished / name).stat().st_mtime_ns for name in ("report.json", "report.html")] == stamps
    assert "Unsafe rows refused" in capsys.readouterr().out


def test_table_fits_eighty_columns(finished):
    out = io.StringIO()
    got = json.loads((finished / "report.json").read_text())
    got["after"]["heldout_attack_benign_acceptance"] = 0.875
    got["after"]["a_number_of_ours"] = 0.5
    print_table(got, console=Console(file=out, width=80))
    rows = [re.split(r"\s*\u2502\s*", line)[1:-1] for line in out.getvalue().splitlines() if line.startswith("\u2502")]
    assert ["Unsafe rows refused", "0.500", "0.960", "0.400", "1.000"] in rows
    assert ["Held-out attack: benign answered", "-", "0.875", "-", "-"] in rows
    assert rows[-1] == ["a_number_of_ours", "-", "0.500", "-", "-"]
