"""Endpoint attacks on many rows through a server with faults: what is asked, kept, dropped, balanced, and written."""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import json
import re
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from fault_server import FaultServer, text_of
from PIL import Image

from cosmo_rl.cpgd.judges.client import Endpoint, EndpointDown, EndpointError
from cosmo_rl.cpgd.judges.spec import parse_server
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.index import load_rows
from cosmo_rl.data.prepare.__main__ import main as prepare
from cosmo_rl.data.prepare.jailbreak import asking
from cosmo_rl.data.prepare.jailbreak.asking import Model, open_model, settle
from cosmo_rl.data.prepare.jailbreak.registry import find
from cosmo_rl.data.prepare.jailbreak.rows import assign, attack_row, augment, last_text, twin_keys
from cosmo_rl.data.prepare.mini import safety_rows

ROWS = safety_rows("validation")[:30]
TWINS = r"^(.*)-[abc]$"
ENDPOINT = find(["endpoint"])
SECRET = "sk-swordfish-1234567890"
LIMIT = 2_000_000
main = lambda args: prepare(["augment", *args])


def rewriter(body):
    """A model that does as each prompt asks."""
    text = text_of(body)
    request = text.rpartition("<request>\n")[2].rpartition("\n</request>")[0]
    if "other words" in text:
        return f"<result>In other words, seed {body['seed'] % 7}: {request}</result>"
    if "Translate it into" in text:
        language = re.search(r"Translate it into (\w+)", text).group(1)
        letters = {"Arabic": "\u0643", "Bengali": "\u0995", "Chinese": "\u5200", "Hindi": "\u0915", "Korean": "\uce7c",
                   "Russian": "\u043a", "Thai": "\u0e01"}
        return f"<result>{letters.get(language, 'x') * len(request)}</result>"
    if "[REQUEST]" in text:
        return "<result>Once upon a time somebody had this on her mind: [REQUEST] And so it went on.</result>"
    shown = any(part["type"] == "image_url" for part in body["messages"][0]["content"] if not isinstance(part, str))
    element = max(re.findall("[a-z]+", request.replace("object", "").replace("thing", "")), key=len)
    return (f"<element>{element}</element><kind>thing</kind><shown>{'yes' if shown else 'no'}</shown>"
            "<seen>table</seen>")


def declining(when):
    return lambda body: "<declined>" if when(text_of(body)) else rewriter(body)


def dying_after(server, calls):
    def oracle(body):
        if server.calls >= calls:
            server.dead_until = float("inf")
        return rewriter(body)

    return oracle


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr("cosmo_rl.cpgd.judges.client.BACKOFF_S", 0.01)


@pytest.fixture
def served():
    with FaultServer(oracle=rewriter, model="m") as server:
        yield server


def model_of(server, folder, **options):
    return Model(Endpoint(server.url, "m", cache_dir=folder, **{
        "timeout_s": 10.0, "verify_first": True, "max_in_flight": 4, "patience_s": 0.5, **options}))


def made(server, folder, rows=ROWS, twin_by="", *, per_row=1, attacks=ENDPOINT, seed=0, **options):
    """Done of every unit, by attack and key."""
    keys = twin_keys(rows, twin_by)
    units = assign(rows, keys, attacks, per_row=per_row, seed=seed)
    with model_of(server, folder, **options) as model:
        settled = settle(rows, units, model, seed=seed)
    return {(done.assignment.attack.name, done.assignment.key): done
            for done in augment(rows, units, seed=seed, settled=settled)}


def kept(folder):
    """Replies in a cache."""
    return len(list(folder.rglob("*.json")))


def words(result):
    return {place: {row.id: (row.messages, row.attack) for row in done.rows} for place, done in result.items()}


def write(folder: Path, rows):
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for row in rows:
        name = f"pictures/{len(lines)}.png"
        row.images[0].save(folder / name)
        lines.append(json.dumps({"id": row.id, "task": row.task, "domain": row.domain, "messages": list(row.messages),
                                 "images": [name], "tags": row.tags, "source": row.source, "licence": row.licence}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "rows.jsonl")


def test_every_attack_of_every_row_and_a_second_run_without_calls(served, tmp_path):
    served.latency_s = (0.01, 0.02)
    first = made(served, tmp_path, ROWS[:12], TWINS, per_row=5)
    assert len(first) == 4 * 5 and all(len(done.rows) == 3 for done in first.values())
    calls = served.calls
    assert calls == kept(tmp_path) == 4 * 4 * 2 + 12  # two twins of three have one text, and none have one picture
    assert served.most_in_flight > 1
    for done in first.values():
        notes = {json.dumps({**row.attack, "source_id": ""}, sort_keys=True) for row in done.rows}
        assert len(notes) == 1, notes  # twins: one set of parameters, one seed
        for row, source in zip(done.rows, done.assignment.rows, strict=True):
            assert last_text(row) != last_text(ROWS[source]) and row.tags == ROWS[source].tags
            assert row.attack["params"]["model"] == "m" and row.attack["source_id"] == ROWS[source].id
    served.stop()
    assert words(made(served, tmp_path, ROWS[:12], TWINS, per_row=5)) == words(first)
    assert words(made(served, tmp_path, ROWS[:12][::-1], TWINS, per_row=5)) == words(first)
    assert served.calls == calls
    with pytest.raises(EndpointError, match="the 0 replies so far are kept, and the same command goes on from them"):
        made(served, tmp_path / "empty", ROWS[:12], TWINS, attempts=2)


def test_another_seed_asks_otherwise(served, tmp_path):
    paraphrase = find(["paraphrase"])
    made(served, tmp_path, ROWS[:3], TWINS, attacks=paraphrase)
    made(served, tmp_path, ROWS[:3], TWINS, attacks=paraphrase, seed=1)
    seeds = [body["seed"] for body in served.bodies]
    assert len(seeds) == 4 and seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert all(0 < body["temperature"] < 1 and body["max_tokens"] == 2048 for body in served.bodies)


def test_a_row_can_be_made_again_from_its_note(served, tmp_path):
    result = made(served, tmp_path, ROWS[:12], TWINS, per_row=5)
    calls = served.calls
    by_id = {row.id: row for row in ROWS}
    with model_of(served, tmp_path) as model:
        for done in result.values():
            row = done.rows[0]
            params = {key: value for key, value in row.attack["params"].items() if key not in ("model", "prompt")}
            again = attack_row(by_id[row.attack["source_id"]], row.attack["name"], params=params, ask=model,
                               seed=row.attack["seed"])
            assert (again.messages, again.attack) == (row.messages, row.attack)
    assert served.calls == calls


@pytest.mark.parametrize("fault", ["429", "500", "wrong_model", "malformed", "dropped", "cut_off"])
def test_a_fault_that_passes_changes_nothing(fault, served, tmp_path):
    want = words(made(served, tmp_path / "a", ROWS[:6], TWINS))
    served.script = [fault] * 3
    assert words(made(served, tmp_path / "b", ROWS[:6], TWINS)) == want
    assert served.counts[fault] == 3


@pytest.mark.parametrize("fault", ["429", "500", "wrong_model"])
def test_a_fault_that_stays_stops_the_run(fault, tmp_path):
    with FaultServer(oracle=rewriter, model="m", script=[fault] * 10_000) as server:
        with pytest.raises(EndpointError, match="the 0 replies so far are kept"):
            made(server, tmp_path, attempts=2)
        assert server.calls < 60
        with pytest.raises(EndpointError, match="the 0 replies so far are kept"):
            made(server, tmp_path, ROWS[:3], TWINS, attempts=2)  # fewer calls than MAX_FAILED, and none succeeded


def test_a_model_that_is_not_served_is_told_before_any_call(served, tmp_path):
    keys = twin_keys(ROWS)
    with open_model(parse_server(f"{served.url},other", "it"), tmp_path, max_pixels=9999) as model, \
            pytest.raises(EndpointDown, match="does not serve this model but m"):
        settle(ROWS, assign(ROWS, keys, ENDPOINT, per_row=1, seed=0), model, seed=0)
    assert served.calls == 0 and not list(tmp_path.rglob("*.json"))


def test_a_server_that_dies_stops_the_run_and_the_next_goes_on(served, tmp_path):
    want = words(made(served, tmp_path / "whole"))
    total, before = kept(tmp_path / "whole"), served.calls
    served.oracle = dying_after(served, before + 12)
    with pytest.raises(EndpointError, match=r"the (\d+) replies so far are kept"):
        made(served, tmp_path / "cut", attempts=3)
    had = kept(tmp_path / "cut")
    assert 5 <= had <= 12
    served.oracle, served.dead_until = rewriter, 0.0
    count = served.calls
    assert words(made(served, tmp_path / "cut")) == want
    assert served.calls == count + total - had


def test_one_call_that_fails_drops_its_unit_alone(served, tmp_path, monkeypatch):
    odd = last_text(ROWS[0])
    rows = [ROWS[0], *(row for row in ROWS if last_text(row) != odd)]
    served.oracle = lambda body: 1 / 0 if odd in text_of(body) else rewriter(body)
    result = made(served, tmp_path, rows, attacks=find(["paraphrase"]), attempts=2)
    (failed,) = [done for done in result.values() if done.problem == "the call failed"]
    assert failed.assignment.rows == (0,)
    assert "2 attempts failed" in failed.reason and f"row {rows[0].id}" in failed.reason


def test_a_request_that_the_server_refuses_is_a_drop(served, tmp_path, monkeypatch):
    served.refuses = b"other words"
    result = made(served, tmp_path, ROWS, TWINS, per_row=2, attacks=find(["paraphrase", "persuasion"]))
    dropped = [done for (name, _), done in result.items() if name == "paraphrase"]
    assert len(dropped) == 10 and all(done.problem == "the server refuses the request" and not done.rows
                                      and "HTTP 400 'content filter'" in done.reason for done in dropped)
    assert all(done.rows for (name, _), done in result.items() if name == "persuasion")
    assert served.counts["400"] == 10


def test_replies_that_will_not_do_are_asked_again_and_kept(served, tmp_path):
    served.oracle = lambda body: "no" if body["seed"] % 2 else rewriter(body)
    first = made(served, tmp_path, twin_by=TWINS, attacks=find(["paraphrase"]))
    reasons = Counter(done.problem for done in first.values())
    assert reasons[""] >= 5 and served.calls > 30
    assert set(reasons) <= {"", "no reply of 3 will do, the last: it is not in the form asked for"}
    count = served.calls
    assert words(made(served, tmp_path, twin_by=TWINS, attacks=find(["paraphrase"]))) == words(first)
    assert served.calls == count


def test_a_twin_that_is_declined_drops_the_others(served, tmp_path):
    odd = "what is the blue thing for?"
    rows = [*ROWS[:2], replace(ROWS[2], messages=({"role": "user", "content": odd},), images=()), *ROWS[3:]]
    served.oracle = declining(lambda text: odd in text)
    result = made(served, tmp_path, rows, TWINS, per_row=5)
    dropped = {place: done for place, done in result.items() if not done.rows}
    assert {key for _, key in dropped} == {result_key for result_key in twin_keys(ROWS[:3], TWINS)}
    assert len(dropped) == 5 and all(f"row {ROWS[2].id}" in done.reason and "the model declined" in done.problem
                                     for done in dropped.values())


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_model_that_declines_unsafe_requests_leaves_the_shares_of_labels(served, tmp_path, share):
    rows = [replace(row, id=f"r{i}", messages=({"role": "user", "content": f"{last_text(row)} number {i}"},), images=())
            for i, row in enumerate(safety_rows("validation")[:48])]
    unsafe = [i for i, row in enumerate(rows) if row.is_unsafe]
    declined = set(unsafe[:round(share * len(unsafe))])
    served.oracle = declining(lambda text: int(re.search(r"number (\d+)", text).group(1)) in declined)
    result = made(served, tmp_path, rows, per_row=2, attacks=find(["paraphrase", "persuasion"]), max_in_flight=8)
    for name in ("paraphrase", "persuasion"):
        own = {key: done for (attack, key), done in result.items() if attack == name}
        kept = [rows[done.assignment.rows[0]] for done in own.values() if done.rows]
        numbers = Counter(row.is_unsafe for row in kept)
        assert numbers == {True: 8, False: 16} if share == 0.5 else not kept
        reasons = Counter(done.problem[:8] for done in own.values() if not done.rows)
        assert reasons == {"no reply": len(declined), "left out": 16 if share == 0.5 else 32}


def test_twins_have_the_key_element_in_the_same_place(served, tmp_path):
    """Else a page would tell which twin's picture does not show it."""
    odd = "what is the blue cup for?"
    content = [{"type": "image"}, {"type": "text", "text": odd}]
    rows = [*ROWS[:5], replace(ROWS[5], messages=({"role": "user", "content": content},)), *ROWS[6:]]
    served.oracle = lambda body: rewriter(body).replace(">yes<", ">no<" if odd in text_of(body) else ">yes<")
    result = made(served, tmp_path, rows, TWINS, attacks=find(["key_element"]))
    places = {key: {(row.attack["params"]["place"], len(row.images)) for row in done.rows}
              for (_, key), done in result.items()}
    assert places.pop(twin_keys(ROWS, TWINS)[5]) == {("page", 2)}
    assert len(places) == 9 and all(place == {("picture", 1)} for place in places.values())


# -- the command line -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("in") / "in", ROWS)


def args_of(source, out, server, *more):
    return ["--in", source, "--out", str(out), "--twin-by", TWINS,
            "--endpoint", f"{server.url},m,in-flight=4,attempts=2,timeout=10", *more]


def test_the_command_with_a_class_held_out_and_again_without_a_server(served, source, tmp_path, capsys):
    args = args_of(source, tmp_path / "out", served, "--per-row", "all", "--holdout", "framing", "cipher",
                   "--attacks", "endpoint", "cipher", "flip", "figstep", "--param", "size=280")
    assert main(args) == 0
    names = {}
    for file in ("rows", "heldout"):
        result = load_rows([tmp_path / "out" / f"{file}.jsonl"], max_image_pixels=LIMIT)
        names[file] = {row.attack["name"] for row in result}
    assert names["heldout"] == {"nested_scenario", "persuasion", "base64", "caesar", "rot13"}
    assert names["rows"] == {"paraphrase", "translation", "key_element", "flip", "figstep"}
    assert not names["rows"] & names["heldout"]
    shown = capsys.readouterr().out
    table = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    for name in ("paraphrase", "nested_scenario"):
        assert table[name][2] == ("rows" if name == "paraphrase" else "heldout") and table[name][-2:] == ["33.3", "0"]
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    count = served.calls
    served.stop()
    assert main([*args, "--overwrite"]) == 0
    assert served.calls == count
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before
    elements = [row for row in load_rows([tmp_path / "out" / "rows.jsonl"], max_image_pixels=LIMIT)
                if row.attack["name"] == "key_element"]
    assert elements and all("table" in row.key_elements for row in elements)


def test_the_contact_sheet_has_the_endpoint_attacks(served, source, tmp_path):
    assert main(args_of(source, tmp_path / "out", served, "--attacks", "endpoint", "--per-row", "all")) == 0
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        colours = sheet.convert("RGB")
    half = colours.width // 2
    headings = [[colours.getpixel((x, y)) == (232, 236, 242) for y in range(colours.height)]
                for x in (half - 20, 2 * half - 20)]
    assert sum(b and not a for own in headings for a, b in zip([False, *own], own, strict=False)) == 5


def test_the_default_without_an_endpoint_is_offline(source, tmp_path, capsys):
    assert main(["--in", source, "--out", str(tmp_path / "a"), "--param", "size=280", "distractor_grid.size=480"]) == 0
    result = load_rows([tmp_path / "a" / "rows.jsonl"], max_image_pixels=LIMIT)
    assert {row.attack["name"] for row in result} <= {attack.name for attack in find(["text", "image"])}
    for wanted in (["--attacks", "persuasion", "flip"], ["--holdout", "endpoint"]):
        assert main(["--in", source, "--out", str(tmp_path / "b"), *wanted]) == 1
        error = capsys.readouterr().err
        assert "persuasion" in error and "name one with --endpoint URL,MODEL, or leave them out" in error
        assert not (tmp_path / "b").exists()


def test_drops_are_counted_by_reason(served, source, tmp_path, capsys):
    odd, other = last_text(ROWS[2]), last_text(ROWS[5])
    said = {odd: "<declined>", other: "oh"}
    served.oracle = lambda body: next((said[text] for text in said if text in text_of(body)), "") or rewriter(body)
    assert main(args_of(source, tmp_path / "out", served, "--attacks", "paraphrase", "persuasion", "--per-row", "2")
                ) == 0
    shown = capsys.readouterr().out
    table = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert table["paraphrase"][3:] == table["persuasion"][3:] == ["24", "8", "16", "33.3", "6"]
    assert f"dropped 6 of paraphrase, as: row {ROWS[2].id}, attack paraphrase: no reply of 3 will do, the last: the " \
        "model declined" in shown
    assert shown.count("    3: no reply of 3 will do, the last: the model declined\n") == 2
    assert shown.count("    3: no reply of 3 will do, the last: it is not in the form asked for\n") == 2
    served.oracle = lambda body: "<declined>"
    assert main(args_of(source, tmp_path / "x", served, "--attacks", "paraphrase")) == 1
    assert "no row is left" in capsys.readouterr().err and not (tmp_path / "x" / "rows.jsonl").exists()


def test_a_dead_server_leaves_the_replies_and_no_rows(served, source, tmp_path, capsys):
    served.oracle = dying_after(served, 8)
    args = args_of(source, tmp_path / "out", served, "--attacks", "endpoint", "--per-row", "all")
    assert main(args) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the same command goes on from them" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["endpoint_cache"]
    had = kept(tmp_path / "out")
    asked = set()  # no count of calls: one of the first try may arrive late

    def again(body):
        asked.add(json.dumps(body, sort_keys=True))
        return rewriter(body)

    served.oracle, served.dead_until = again, 0.0
    assert had >= 3 and main(args) == 0 and len(asked) == kept(tmp_path / "out") - had
    assert len(load_rows([tmp_path / "out" / "rows.jsonl"], max_image_pixels=LIMIT)) == 150


def test_the_key_comes_from_the_environment_and_goes_nowhere(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REWRITE_KEY", SECRET)
    with FaultServer(oracle=rewriter, model="m", key=SECRET) as server:
        args = args_of(source, tmp_path / "out", server, "--attacks", "paraphrase", "--endpoint-cache",
                       str(tmp_path / "kept"))
        place = args.index("--endpoint") + 1
        args[place] += ",key=REWRITE_KEY"
        assert main(args) == 0 and list((tmp_path / "kept").rglob("*.json"))
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not any(SECRET.encode() in path.read_bytes() for path in files)
        monkeypatch.setenv("REWRITE_KEY", "sk-wrong-key-0123456789")
        args[args.index("--out") + 1] = str(tmp_path / "b")
        args[args.index("--endpoint-cache") + 1] = str(tmp_path / "c")
        assert main(args) == 1
    error = capsys.readouterr().err
    assert "HTTP 401" in error and "sk-wrong" not in error and "name the environment variable" in error


@pytest.mark.parametrize(("endpoint", "message"), [
    ("http://h:1", "--endpoint has no model after its URL; write URL,MODEL"),
    ("http://h:1,key=KEY", "--endpoint has no model after its URL"),
    ("http://h:1,m,sk-swordfish", "--endpoint: part 3 is no NAME=VALUE"),
    ("http://h:1,m,in_flight=3", "--endpoint: there is no option 'in_flight'; write URL,MODEL, and after"),
    ("http://h:1,m,in-flight=x", "--endpoint: in-flight is a whole number of at least 1, and not 'x'; give it as"),
    ("http://h:1,m,timeout=nan", "--endpoint: timeout is a number of seconds above 0"),
    ("http://h:1,m,in-flight=0", "in-flight is a whole number of at least 1"),
    ("http://h:1,m,attempts=2,attempts=3", "--endpoint: attempts is given twice"),
    ("http://h:1,m,key=sk-swordfish", "is the NAME of an environment variable"),
    ("http://h:1,m,key=NO_SUCH_KEY", "the environment variable NO_SUCH_KEY holds no key"),
    ("nowhere,m", "is no URL of a server"),
])
def test_a_wrong_endpoint_is_one_line(source, tmp_path, capsys, endpoint, message):
    assert main(["--in", source, "--out", str(tmp_path / "out"), "--endpoint", endpoint]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "swordfish" not in error
    assert not (tmp_path / "out").exists()


def test_a_full_disk_stops_the_run(served, tmp_path, monkeypatch):
    def full(*args):
        raise UserError("the cache cannot be written (No space left on device); free space")

    with pytest.raises(ValueError, match="No space left"), model_of(served, tmp_path) as model:
        monkeypatch.setattr(model.endpoint.cache, "put", full)
        settle(ROWS, assign(ROWS, twin_keys(ROWS), ENDPOINT, per_row=1, seed=0), model, seed=0)
    assert served.calls < 30


def test_leaving_a_model_frees_its_threads(tmp_path):
    before = set(threading.enumerate())
    with FaultServer(oracle=rewriter, model="m", latency_s=(30.0, 30.0)) as server:
        with pytest.raises(KeyboardInterrupt), open_model(
                parse_server(f"{server.url},m,in-flight=3", "it"), tmp_path, max_pixels=9999) as m:
            def interrupt(*args):
                raise KeyboardInterrupt

            asking.as_completed, was = interrupt, asking.as_completed
            try:
                settle(ROWS, assign(ROWS, twin_keys(ROWS), ENDPOINT, per_row=1, seed=0), m, seed=0)
            finally:
                asking.as_completed = was
        for thread in set(threading.enumerate()) - before:
            if thread.name.startswith(("asking", "endpoint-loop")):
                thread.join(timeout=5)
                assert not thread.is_alive()
