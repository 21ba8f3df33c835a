"""What a stage shows at its end: a table before -> after, report.json, and report.html in one self-contained file.

    write_measured   before.json / after.json: held-out numbers and some sampled responses, as soon as they are known
    finish_report    report.html, then report.json (last: its presence says that the stage is finished), and the table

The page holds no script and may load nothing: responses come from a model and are shown as text only.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cosmo_rl.data.disk import replace_file
from cosmo_rl.data.schema import ImageSource, Row, open_image
from cosmo_rl.data.terminal import printable, shortened

from ..config import Config
from ..rewards.word_rules import CAUTION, on_free_text
from .evaluation import GROUPS, MEASURES, Answered, divided, not_compared, numbers
from .metrics import read_metrics

CURVES = {
    "loss": "Loss",
    "grad_norm": "Gradient norm before clipping",
    "lr": "Learning rate",
    "clip_fraction": "Clipped tokens, share",
    "drift": "Policy drift, nats",
    "entropy": "Entropy, nats",
    "response_length": "Response length, tokens",
    "degenerate_groups": "Groups without a signal, share",
}
WHENS = ("before", "after")
SHARES = (*WHENS, "before_greedy", "after_greedy")
THUMBNAIL_PIXELS = 192
MAX_POINTS = 400
MAX_PARTS = 12
"""Tasks or domains of one number on the console; report.html and report.json have all."""
MAX_SHOWN = 90
"""Characters of a domain's name there."""


def write_measured(stage_dir: Path, when: str, sampled: Sequence[Answered], greedy: Sequence[Answered],
                   shown: Sequence[Answered]) -> None:
    """Keep a measurement of the held-out rows for the report.

    Args:
        when: "before" or "after" training.
        sampled, greedy: an answer to every row.
        shown: sampled responses for the page's table; their rows have images.
    """
    rows = [{"group": a.group, "id": a.row.id, "prompt": _prompt(a.row), "text": a.text, "good": _good(a),
             "images": [_data_uri(source, a.row.id) for source in a.row.images]} for a in shown]
    replace_file(stage_dir / f"{when}.json", json.dumps({
        "sampled": numbers(sampled), "greedy": numbers(greedy),
        **{f"by_{part}": divided(sampled, greedy, part) for part in ("task", "domain")},
        "not_compared": told(not_compared(sampled)), "shown": rows,
    }))


def read_measured(stage_dir: Path, when: str) -> dict | None:
    """What `write_measured` has kept, or None."""
    path = stage_dir / f"{when}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def finish_report(stage_dir: Path, config: Config, *, seconds: float | None, by_words: Sequence[str] = (),
                  left_out: Sequence[str] = ()) -> dict:
    """Write report.html and report.json of a stage and print its table; returns what report.json holds.

    Args:
        seconds: time spent in training steps; None: the stage was finished before, only print.
        by_words: rewards of the run that rest on word rules, see `word_rules.by_words`.
        left_out: "row ID: why" of each held-out row that no rule can use.
    """
    path = stage_dir / "report.json"
    if seconds is None:
        report = json.loads(path.read_text(encoding="utf-8"))
    else:
        before, after = read_measured(stage_dir, "before"), read_measured(stage_dir, "after")
        report = {
            **{when: found and found["sampled"] for when, found in zip(WHENS, (before, after), strict=True)},
            **{f"{when}_greedy": found and found["greedy"] for when, found in zip(WHENS, (before, after), strict=True)},
            **{part: _parts(part, before, after) for part in ("by_task", "by_domain")},
            "left_out": told(left_out),
            "not_compared": {when: measured.get("not_compared", told([]))
                             for when, measured in zip(WHENS, (before, after), strict=True) if measured},
            "word_rules": {"rewards": list(by_words), "measures": _by_words(config, before, after)},
            "seconds": round(seconds, 1), "seed": config.seed, "steps": config.steps, "split": config.eval.split,
            "config_hash": config.hash(),
        }
        lines = read_metrics(stage_dir / "metrics.jsonl")
        replace_file(stage_dir / "report.html", render(report, config, lines, before, after))
        replace_file(path, json.dumps(report, indent=2) + "\n")
    print_table(report, title=f"stage {config.stage}, seed {report['seed']}, {report['steps']} steps")
    return report


def print_table(report: dict, title: str = "", console: Console | None = None) -> None:
    """The before -> after table of report.json on the console."""
    names = _names(report)
    if not names:
        return
    table = Table(title=title)
    table.add_column(_rows_of(report))
    for key in SHARES:
        table.add_column("\n".join(reversed(key.split("_"))), justify="right")
    for name in names:
        table.add_row(Text(_label(name)), *_shares(_whole(report, name)))
        parts = _divisions(report, name)
        for label, part in parts[:MAX_PARTS]:
            table.add_row(Text(f"  {shortened(printable(label), MAX_SHOWN)}", overflow="fold"), *_shares(part))
        if len(parts) > MAX_PARTS:
            table.add_row(Text(f"  and {len(parts) - MAX_PARTS} more in report.json"))
    console = console or Console()
    console.print(table)
    for note in _notes(report):
        console.print(Text(shortened(printable(note), 10 * MAX_SHOWN)))


def _rows_of(report: dict) -> str:
    return "validation rows" if report["split"] == "validation" else "held-out rows"


def _names(report: dict) -> list[str]:
    present = {**(report["before"] or {}), **(report["after"] or {})}
    return [name for name in MEASURES if name in present] + [name for name in present if name not in MEASURES]


def _label(name: str) -> str:
    return MEASURES[name].label if name in MEASURES else name


def _whole(report: dict, name: str) -> dict[str, float | None]:
    return {key: (report[key] or {}).get(name) for key in SHARES}


def _shares(found: Mapping[str, float | None]) -> list[str]:
    return ["-" if (value := found.get(key)) is None else f"{value:.3f}" for key in SHARES]


def told(problems: Sequence[str]) -> dict:
    """How many, and the first few."""
    return {"rows": len(problems), "first": list(problems[:3])}


def _parts(division: str, before: dict | None, after: dict | None) -> dict:
    """{number: {task or domain: {"rows", "before", "after", "before_greedy", "after_greedy"}}}, what was measured."""
    out: dict[str, dict[str, dict]] = {}
    for when, measured in zip(WHENS, (before, after), strict=True):
        for name, parts in (measured or {}).get(division, {}).items():  # one of an earlier version has none
            for part, found in parts.items():
                row = out.setdefault(name, {}).setdefault(part, {})
                row |= {"rows": found["rows"], when: found["sampled"], f"{when}_greedy": found["greedy"]}
    return out


def _divisions(report: dict, name: str) -> list[tuple[str, dict]]:
    """(label, numbers) of the tasks, then of the domains of a number that has several; once where they are the same."""
    by_task, by_domain = (report.get(division, {}).get(name, {}) for division in ("by_task", "by_domain"))
    shown = [("task", by_task), ("domain", {} if by_domain == by_task else by_domain)]
    return [(f"{division} {part}, {found['rows']:,} rows", found)
            for division, parts in shown if len(parts) > 1 for part, found in parts.items()]


def _by_words(config: Config, *measured: dict | None) -> list[str]:
    present = {name for found in measured if found for name in found["sampled"]}
    ruled = [name for name, measure in MEASURES.items() if measure.by_words and name in present]
    return ruled if on_free_text(config) else []


def _notes(report: dict) -> list[str]:
    """What a reader of the numbers must know; reports of an earlier version have none."""
    ruled = report.get("word_rules", {"rewards": [], "measures": []})
    out = []
    if ruled["rewards"]:
        out.append(f"Rewarded by word rules: {', '.join(ruled['rewards'])}: {CAUTION}.")
    if ruled["measures"]:
        out.append("Measured by word rules, which miss refusals in other words: "
                   f"{', '.join(map(_label, ruled['measures']))}.")
    uncompared = {f"{when} training": found for when, found in report.get("not_compared", {}).items()}
    for what, found in {"left out, as no rule can use them": report.get("left_out", told([])), **{
            f"neither right nor wrong {when}, as their answers could not be compared": found
            for when, found in uncompared.items()}}.items():
        if found["rows"]:
            out.append(f"{found['rows']:,} rows {what}; the first: {found['first'][0]}")
    return out


def _prompt(row: Row) -> str:
    """The text of the row's messages, without images."""
    texts = []
    for message in row.messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts += [part["text"] for part in parts if part["type"] == "text"]
    return "\n".join(texts)


def _good(answered: Answered) -> bool | None:
    """Whether the response counts for its group's measure; None: the group has none, or it could not be compared."""
    return next((measure.holds(answered) for measure in MEASURES.values() if answered.group in measure.groups), None)


def _data_uri(source: ImageSource, where: str) -> str:
    image = open_image(source, 1 << 40, where)  # its size was checked when the row was loaded
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# -- report.html --------------------------------------------------------------------------------------------------


def render(report: dict, config: Config, lines: Sequence[dict], before: dict | None, after: dict | None) -> str:
    """The page's HTML; all text is escaped."""
    minutes, rest = divmod(round(report["seconds"]), 60)
    facts = {"preset": config.preset, "objective": config.objective.name.upper() if config.stage else "SFT",
             "seed": report["seed"], "steps": report["steps"],
             "training": f"{minutes} min {rest} s" if minutes else f"{rest} s", "settings": report["config_hash"]}
    head = "".join(f"<span>{key} <b>{escape(str(value))}</b></span>" for key, value in facts.items())
    nothing = "<p>No held-out rows were given, so nothing was measured (--data.eval-path).</p>"
    parts = [f"<h1>Stage {config.stage}</h1><p class=facts>{head}</p>",
             _measures(report) if _names(report) else nothing]
    parts += [f"<p class=note>{escape(note)}</p>" for note in _notes(report)]
    if lines:
        parts.append("<h2>Training</h2>" + _curves(lines))
    if after:
        parts.append(_samples(before, after))
    settings = escape(json.dumps(config.to_dict(), indent=2))
    parts.append(f"<h2>Settings</h2><details><summary>All fields</summary><pre>{settings}</pre></details>")
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta http-equiv=Content-Security-Policy "
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<meta name=viewport content='width=device-width'><title>Stage {config.stage}, {escape(config.preset)}, "
        f"seed {report['seed']}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _measures(report: dict) -> str:
    rows = []
    for name in _names(report):
        rows.append(_measure(_label(name), _whole(report, name)))
        rows += [_measure(label, part, "part") for label, part in _divisions(report, name)]
    return (
        f"<h2>{_rows_of(report).capitalize()}</h2><table class=measures><tr><th>share of rows<th class=n>before"
        "<th class=n>after<th class=n>change<th>0 to 1: <i class=ring></i> before <i class=dot></i> after"
        f"<th class=n>greedy before<th class=n>greedy after</tr>{''.join(rows)}</table>"
        "<p class=dim>Sampled at the rollout's temperature, one response a row; greedy beside it. The same noise "
        "before and after.</p>"
    )


def _measure(label: str, found: Mapping[str, float | None], style: str = "whole") -> str:
    old, new = found.get("before"), found.get("after")
    change = "" if old is None or new is None else f"{new - old:+.3f}"
    before, after, *greedy = _shares(found)
    return (f"<tr class={style}><td>{escape(label)}</td><td class=n>{before}</td><td class=n><b>{after}</b></td>"
            f"<td class=n>{change}</td><td>{_dumbbell(old, new)}</td>"
            + "".join(f"<td class='n dim'>{share}</td>" for share in greedy) + "</tr>")


def _dumbbell(old: float | None, new: float | None) -> str:
    """Two points on a line from 0 to 1."""
    at = lambda value: 8 + 184 * value
    marks = "<line x1=8 x2=192 y1=9 y2=9 class=axis />"
    if old is not None and new is not None:
        marks += f"<line x1={at(old):.1f} x2={at(new):.1f} y1=9 y2=9 class=move />"
    if old is not None:
        marks += f"<circle cx={at(old):.1f} cy=9 r=4.5 class=before />"
    if new is not None:
        marks += f"<circle cx={at(new):.1f} cy=9 r=5 class=after />"
    return f"<svg width=200 height=18 viewBox='0 0 200 18'>{marks}</svg>"


def _curves(lines: Sequence[dict]) -> str:
    steps = [line["step"] for line in lines]
    by_domain = [line.get("rewards") or {} for line in lines]
    domains = sorted({domain for entry in by_domain for domain in entry})
    terms = list(dict.fromkeys(term for entry in by_domain for found in entry.values() for term in found))
    charts = []
    for term in terms:
        series = {domain: [entry.get(domain, {}).get(term, {}).get("mean") for entry in by_domain]
                  for domain in domains}
        charts.append(_chart("Reward" if term == "reward" else f"Reward term {term}", steps, series, (0.0, 1.0)))
    for name, label in CURVES.items():
        charts.append(_chart(label, steps, {"": [line.get(name) for line in lines]}))
    charts.append(_chart("Seconds per iteration by phase", *_seconds(lines)))
    key = f"<p class=key>Rewards by domain: {_key(domains)}</p>" if domains else ""
    return f"{key}<div class=charts>{''.join(charts)}</div>"


def _seconds(lines: Sequence[dict]) -> tuple[list[int], dict[str, list[float | None]]]:
    """The last step of each iteration, and what each phase took in it (a rollout serves several steps)."""
    spent: dict[int, dict[str, float]] = {}
    last = {}
    for line in lines:
        iteration = line.get("iteration", line["step"])
        last[iteration] = line["step"]
        phases = spent.setdefault(iteration, {})
        for phase, value in line.get("seconds", {}).items():
            phases[phase] = phases.get(phase, 0.0) + value
    names = dict.fromkeys(phase for phases in spent.values() for phase in phases)
    return list(last.values()), {name: [phases.get(name) for phases in spent.values()] for name in names}


def _key(names: Sequence[str]) -> str:
    return "".join(f"<span><i class='line c{i % 6}'></i>{escape(name)}</span>" for i, name in enumerate(names))


def _chart(title: str, steps: Sequence[int], series: Mapping[str, Sequence[float | None]],
           limits: tuple[float, float] | None = None) -> str:
    """One small line chart over optimizer steps; a missing value breaks its line. "" when there is nothing to draw."""
    points = {name: _thin(list(zip(steps, values, strict=True))) for name, values in series.items()}
    values = [v for line in points.values() for _, v in line if v is not None]
    if not values:
        return ""
    low, high = limits or (min(values), max(values))
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    x = lambda step: 44 + 262 * (step - first) / (last - first)
    y = lambda value: 132 - 122 * (value - low) / (high - low)
    svg = [f"<line x1=44 x2=306 y1={y(t):.1f} y2={y(t):.1f} class=grid />"
           f"<text x=38 y={y(t) + 3.5:.1f} class=y>{t:.3g}</text>" for t in ticks]
    middle = (first + steps[-1]) // 2
    svg += [f"<text x={x(s):.1f} y=149 class=x>{s}</text>" for s in sorted({first, middle, steps[-1]})]
    for index, line in enumerate(points.values()):
        path, gap = [], True
        for step, value in line:
            if value is not None:
                at = f"{x(step):.1f} {y(value):.1f}"
                path.append(f"M{at}h0" if gap else f"L{at}")  # h0: a lone dot shows
            gap = value is None
        svg.append(f"<path d='{''.join(path)}' class='curve c{index % 6}' />")
    named = [name for name in points if name]
    key = f"<div class=key>{_key(named)}</div>" if named and limits is None else ""
    return (f"<figure><figcaption>{escape(title)}</figcaption>{key}<svg viewBox='0 0 316 154' role=img "
            f"aria-label='{escape(title)} by optimizer step'>{''.join(svg)}</svg></figure>")


def _thin(points: Sequence[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    """At most MAX_POINTS points: each the mean of its bucket, None for a bucket without a value."""
    size = math.ceil(len(points) / MAX_POINTS)
    out: list[tuple[int, float | None]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        values = [value for _, value in bucket if value is not None]
        out.append((bucket[-1][0], sum(values) / len(values) if values else None))
    return out


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers inside [low, high]."""
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    size = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    return [size * i for i in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def _samples(before: dict | None, after: dict) -> str:
    earlier = {(row["group"], row["id"]): row for row in before["shown"]} if before else {}
    out = ["<h2>Sampled responses</h2>"]
    heading = "<tr><th>image<th>prompt" + ("<th>before" if before else "") + "<th>after</tr>"
    for group in dict.fromkeys(row["group"] for row in after["shown"]):
        body = []
        for row in after["shown"]:
            if row["group"] != group:
                continue
            images = "".join(f"<img src='{escape(uri)}' alt='image of the prompt'>" for uri in row["images"]) or "-"
            old = earlier.get((group, row["id"]))
            cells = ([_response(old) if old else "<td>-"] if before else []) + [_response(row)]
            body.append(f"<tr><td class=image>{images}<td class=text>{escape(row['prompt'])}{''.join(cells)}</tr>")
        out.append(f"<h3>{escape(GROUPS.get(group, group))}</h3>"
                   f"<div class=wide><table class=samples>{heading}{''.join(body)}</table></div>")
    return "".join(out)


def _response(row: dict) -> str:
    mark = {True: "<b class=good>&#10003;</b> ", False: "<b class=bad>&#10007;</b> ", None: ""}[row["good"]]
    return f"<td class=text>{mark}{escape(row['text']) or '<i>empty</i>'}"


STYLE = """
:root{--ink:#1d2329;--dim:#66707a;--rule:#dfe3e7;--page:#fff;--soft:#f6f7f8;--good:#0a7d55;--bad:#b3361b}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7ea;--dim:#98a2ac;--rule:#343b42;--page:#15181b;--soft:#1d2125;
--good:#43c493;--bad:#ff8a6b}}
body{font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;color:var(--ink);
background:var(--page);max-width:1080px;margin:2.5rem auto;padding:0 1.5rem}
h1{font-size:1.7rem;margin:0}h2{font-size:1.15rem;margin:2.4rem 0 .7rem}h3{font-size:.95rem;margin:1.5rem 0 .4rem}
.facts{color:var(--dim);margin:.3rem 0 0}.facts span{margin-right:1.4em}.facts b{color:var(--ink);font-weight:600}
.dim{color:var(--dim)}p.dim{font-size:.87rem;margin:.5rem 0}
table{border-collapse:collapse;width:100%}
td,th{padding:.42rem .7rem;border-bottom:1px solid var(--rule);text-align:left}
th{font-size:.8rem;font-weight:500;color:var(--dim);vertical-align:bottom}
.n{text-align:right;font-variant-numeric:tabular-nums}
.part td{font-size:.87rem;color:var(--dim);padding-block:.15rem}
.part td:first-child{padding-left:2rem;overflow-wrap:anywhere}
.note{background:var(--soft);border-left:3px solid var(--bad);padding:.5rem .8rem;font-size:.9rem}
.measures svg{display:block}.axis,.grid{stroke:var(--rule);stroke-width:1}.move{stroke:#0072b2;stroke-width:2.5}
.before{fill:var(--page);stroke:#0072b2;stroke-width:2}.after{fill:#0072b2}
.ring,.dot{display:inline-block;width:.55em;height:.55em;border-radius:50%;border:2px solid #0072b2}
.dot{background:#0072b2}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:1.3rem 1.6rem}
figure{margin:0}figcaption{font-size:.87rem;font-weight:600}figure svg{width:100%;height:auto;display:block}
text{font-size:10px;fill:var(--dim);font-variant-numeric:tabular-nums}.y{text-anchor:end}.x{text-anchor:middle}
.key{font-size:.8rem;color:var(--dim);margin:.1rem 0 .5rem}.key span{margin-right:1em;white-space:nowrap}
.line{display:inline-block;width:1.1em;height:3px;margin:0 .35em .2em 0;background:currentColor}
.curve{fill:none;stroke:currentColor;stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
.c0{color:#0072b2}.c1{color:#d55e00}.c2{color:#009e73}.c3{color:#cc79a7}.c4{color:#e69f00}.c5{color:#56b4e9}
.wide{overflow-x:auto}.samples td{vertical-align:top}.samples .image{width:100px}
.samples img{width:84px;border:1px solid var(--rule);border-radius:4px;display:block;margin-bottom:4px}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.9rem;width:30%}.good{color:var(--good)}.bad{color:var(--bad)}
pre{background:var(--soft);padding:1rem;overflow-x:auto;font-size:.82rem}summary{cursor:pointer}
"""
