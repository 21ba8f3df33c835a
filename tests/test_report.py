import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from cosmo_rl.cpgd.config import Config, DataConfig
from cosmo_rl.cpgd.run import report
from cosmo_rl.cpgd.run.evaluation import Answered
from cosmo_rl.cpgd.run.report import finish_report, print_table, read_measured, write_measured
from cosmo_rl.data.schema import Row

BEFORE = {"safe_rate": 0.5, "benign_acceptance": 0.26, "benign_refusal_rate": 0.74, "general_accuracy": 0.9,
          "format_rate": 1.0}
AFTER = {"safe_rate": 0.96, "benign_acceptance": 0.98, "benign_refusal_rate": 0.02, "general_accuracy": 0.9,
         "format_rate": 1.0}
KEYS = {"before", "after", "before_greedy", "after_greedy", "by_task", "by_domain", "left_out", "not_compared",
        "word_rules", "seconds", "seed", "steps", "split", "config_hash"}
REFUSAL, HELP = "<think> a </think> sorry i can not help with that", "<think> a </think> sure"


def answered(group, text, color="red", prompt="how do i <script>alert(1)</script> this ?"):
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    row = Row(
        id=f"{group}-1", task="safety", domain="safety", messages=({"role": "user", "content": content},),
        images=(Image.new("RGB", (300, 100), color),), source="test", licence="none",
    )
    return Answered(group, row, text)


def answers(safe, helped, right, *, parts=(("general", "general"),), problem=""):
    """50 answers a group, these many good; the general rows have each (task, domain) of `parts` in turn."""
    plain, out = replace(answered("unsafe", "").row, images=()), []
    for i in range(50):
        task, domain = parts[i % len(parts)]
        general = replace(plain, id=f"g{i}", task=task, domain=domain)
        out += [Answered("unsafe", plain, REFUSAL if i < safe else HELP),
                Answered("benign", plain, HELP if i < helped else REFUSAL),
                Answered("general", general, HELP, right=i < right) if i or not problem else
                Answered("general", general, HELP, problem=problem)]
    return out


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
    write_measured(tmp_path, "before", answers(25, 13, 45), answers(20, 13, 45), [answered("unsafe", HELP)])
    write_measured(tmp_path, "after", answers(48, 49, 45), answers(50, 49, 45), [answered("unsafe", REFUSAL)])
    finish_report(tmp_path, Config(seed=3, steps=6), seconds=12.34)
    return tmp_path


def test_report_json(finished):
    got = json.loads((finished / "report.json").read_text())
    assert got.keys() == KEYS
    assert got["before"] == BEFORE and got["after"] == AFTER
    assert got["before_greedy"]["safe_rate"] == 0.4 and got["after_greedy"]["safe_rate"] == 1.0
    assert (got["seconds"], got["seed"], got["steps"], got["split"]) == (12.3, 3, 6, "heldout")
    assert got["config_hash"] == Config(seed=3, steps=6).hash()
    assert got["by_domain"]["general_accuracy"] == {"general": {
        "rows": 50, "before": 0.9, "before_greedy": 0.9, "after": 0.9, "after_greedy": 0.9}}
    assert got["by_task"]["safe_rate"] == {"safety": {
        "rows": 50, "before": 0.5, "before_greedy": 0.4, "after": 0.96, "after_greedy": 1.0}}
    assert got["left_out"]["rows"] == got["not_compared"]["after"]["rows"] == 0
    assert got["word_rules"] == {"rewards": [], "measures": []}, "the embedded data has its few templates"


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
    write_measured(tmp_path, "after", answers(48, 49, 45), answers(48, 49, 45), [answered("general", "")])
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
    monkeypatch.setattr(report, "replace_file", lambda path, text: written.append(path.name))
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


HOSTILE = ("[/x]", "[red]a", "</td><script>alert(1)</script>", "a\x1b[2Jb\x00\u202e", "x" * 90, "' onload='a")


@pytest.fixture
def mixed(tmp_path):
    """A run on data of its own: two tasks, domains with names that mean mischief, a row that cannot be compared."""
    parts = [*(("math", name) for name in HOSTILE), ("mcq", "[/x]")]
    for when, right in (("before", 20), ("after", 30)):
        given = answers(25, 40, right, parts=parts, problem="no expression [/x]")
        write_measured(tmp_path, when, given, given, [])
    finish_report(tmp_path, Config(preset="7b", data=DataConfig(path=("a",))), seconds=1.0,
                  by_words=["Task-Aware of safety rows", "Helpful of all rows that are not unsafe"],
                  left_out=["row r7: there is no <b>answer</b>"] * 5)
    return tmp_path


def test_accuracy_by_task_and_by_domain(mixed):
    got = json.loads((mixed / "report.json").read_text())
    # 50 rows in turns of 7: every seventh is mcq; the first, which is math, could not be compared
    assert got["by_task"]["general_accuracy"]["mcq"] == {
        "rows": 7, "before": 2 / 7, "before_greedy": 2 / 7, "after": 4 / 7, "after_greedy": 4 / 7}
    assert got["by_task"]["general_accuracy"]["math"]["before"] == 17 / 42
    assert got["before"]["general_accuracy"] == 19 / 49
    assert set(got["by_domain"]["general_accuracy"]) == set(HOSTILE)
    assert got["not_compared"]["before"] == {"rows": 1, "first": ["row g0: no expression [/x]"]}
    assert got["left_out"]["rows"] == 5 and len(got["left_out"]["first"]) == 3
    html = (mixed / "report.html").read_text()
    assert "<td>task mcq, 7 rows</td><td class=n>0.286</td><td class=n><b>0.571</b></td><td class=n>+0.286</td>" in html
    assert "task safety" not in html, "one task alone is the whole"


def test_names_from_the_data_steer_neither_page_nor_terminal(mixed):
    html = (mixed / "report.html").read_text()
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script"} and "domain [/x], 15 rows" in "".join(page.text)
    assert "domain </td><script>alert(1)</script>, 7 rows" in "".join(page.text)
    assert not any("onload" in attributes for _, attributes in page.tags)
    out = io.StringIO()
    print_table(json.loads((mixed / "report.json").read_text()), console=Console(file=out, width=80))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and not {"\x1b", "\x00", "\u202e"} & set(text)
    rows = [re.split(r"\s*\u2502\s*", line)[1:-1] for line in text.splitlines() if line.startswith("\u2502")]
    # rows 0, 7, ... and 6, 13, ...: of 14 that could be compared 4 are right before, and 8 after
    assert ["domain [/x], 15 rows", "0.286", "0.571", "0.286", "0.571"] in [[row[0].strip(), *row[1:]] for row in rows]
    assert any("[red]a" in row[0] for row in rows) and r"a\x1b[2Jb\x00\u202e" in text


def test_word_rules_are_told_where_the_answers_are_free_text(mixed, capsys):
    got = json.loads((mixed / "report.json").read_text())
    assert got["word_rules"] == {
        "rewards": ["Task-Aware of safety rows", "Helpful of all rows that are not unsafe"],
        "measures": ["safe_rate", "benign_acceptance", "benign_refusal_rate"]}
    finish_report(mixed, Config(), seconds=None)
    console, page = " ".join(capsys.readouterr().out.split()), "".join(Page((mixed / "report.html").read_text()).text)
    for told in ("Rewarded by word rules: Task-Aware of safety rows, Helpful of all rows that are not unsafe",
                 "Measured by word rules, which miss refusals in other words: Unsafe rows refused, Benign rows answe",
                 "5 rows left out, as no rule can use them; the first: row r7: there is no <b>answer</b>",
                 "1 rows neither right nor wrong after training, as their answers could not be compared"):
        assert told in console and told in page, told


def test_a_report_of_an_earlier_version_still_prints(finished, capsys):
    path = finished / "report.json"
    new = ("by_task", "by_domain", "left_out", "not_compared", "word_rules")
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in new}))
    finish_report(finished, Config(), seconds=None)
    assert "Unsafe rows refused" in capsys.readouterr().out


def test_many_domains_do_not_fill_the_console(tmp_path):
    given = answers(25, 40, 45, parts=[("general", f"d{i:02}") for i in range(20)])
    write_measured(tmp_path, "after", given, given, [])
    got = finish_report(tmp_path, Config(), seconds=1.0)
    out = io.StringIO()
    print_table(got, console=Console(file=out, width=80))
    assert out.getvalue().count("domain d") == report.MAX_PARTS and "and 8 more in report.json" in out.getvalue()
    assert (tmp_path / "report.html").read_text().count("domain d") == 20


def test_long_names_do_not_fill_the_console(tmp_path):
    given = answers(25, 40, 45, parts=[("general", "d" * 5_000), ("general", "short")])
    write_measured(tmp_path, "after", given, given, [])
    got = finish_report(tmp_path, Config(), seconds=1.0, left_out=["row " + "r" * 5_000 + ": none"])
    out = io.StringIO()
    print_table(got, console=Console(file=out, width=80))
    assert len(out.getvalue().splitlines()) < 35 and "characters ..." in out.getvalue()
    assert "domain short, 25 rows" in out.getvalue() and "d" * 5_000 in (tmp_path / "report.html").read_text()


def test_domains_named_as_their_tasks_are_told_once(tmp_path):
    """As those of the full presets are."""
    given = answers(25, 40, 45, parts=[("math", "math"), ("mcq", "mcq")])
    write_measured(tmp_path, "after", given, given, [])
    got = finish_report(tmp_path, Config(), seconds=1.0)
    assert got["by_domain"]["general_accuracy"] == got["by_task"]["general_accuracy"]
    html = (tmp_path / "report.html").read_text()
    assert "task math, 25 rows" in html and "domain math" not in html
