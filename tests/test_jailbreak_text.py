"""Text attacks and the registry: what an attack hides can be read back, by its definition; notes, seeds, errors."""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import base64
import codecs
import random
from dataclasses import replace

import pytest

from cosmo_rl.data.prepare.jailbreak import registry, rows, text
from cosmo_rl.data.prepare.jailbreak.registry import ATTACKS, Unfit, find, register, seed_of
from cosmo_rl.data.prepare.jailbreak.rows import attack_row, last_text
from cosmo_rl.data.prepare.mini import safety_rows
from cosmo_rl.data.schema import parse_row

ROWS = safety_rows("validation")
TEXTS = sorted({last_text(row) for row in ROWS})
ODD = ["Throw the CUP, please!", "a", "caf\u00e9 \u4f60\u597d {braces} %s", "one\ntwo lines\n\nand three", "cup  cup",
       "UPPER lower 123 4567"]
UNLEET = str.maketrans("4310$7", "aeiost")
UNHOMOGLYPH = str.maketrans({alike: letter for letter, alike in text.HOMOGLYPHS.items()})


def run(name, plain, seed=0, **params):
    chosen = ATTACKS[name]
    return chosen.function(plain, chosen.resolve(params), random.Random(seed))


def after_instruction(hidden):
    return hidden.split("\n", 1)[1]


INVERSE = {
    "base64": lambda hidden: base64.b64decode(after_instruction(hidden), validate=True).decode(),
    "rot13": lambda hidden: codecs.decode(after_instruction(hidden), "rot13"),
    "caesar": lambda hidden: "".join(
        chr((ord(c) - base - 3) % 26 + base) if (base := 97 if "a" <= c <= "z" else 65 if "A" <= c <= "Z" else 0) else c
        for c in after_instruction(hidden)),
    "char_space": lambda hidden: hidden[::2],
    "zero_width": lambda hidden: hidden.replace("\u200b", ""),
    "homoglyph": lambda hidden: hidden.translate(UNHOMOGLYPH),
}
WORDS_INVERSE = {  # these keep the words, not the white space between them
    "flip": lambda hidden: hidden.split()[::-1],
    "acrostic": lambda hidden: [line.split()[0] for line in hidden.split("\n")[1:]],
}


@pytest.mark.parametrize("name", INVERSE)
def test_hidden_text_comes_back(name):
    for plain in (*TEXTS, *ODD):
        hidden = run(name, plain)
        assert INVERSE[name](hidden) == plain
        assert hidden != plain or len(plain) == 1


@pytest.mark.parametrize("name", WORDS_INVERSE)
def test_hidden_words_come_back(name):
    for plain in (*TEXTS, *ODD):
        assert WORDS_INVERSE[name](run(name, plain)) == plain.split()


def test_leet_comes_back_where_the_text_has_no_digits():
    for plain in TEXTS:
        assert run("leet", plain).translate(UNLEET) == plain
        assert not set("aeiost") & set(run("leet", plain))


def test_caesar_shift():
    assert after_instruction(run("caesar", "xyz Cup", shift=5)) == "cde Hzu"
    assert "by 5 places" in run("caesar", "cup", shift=5)
    assert after_instruction(run("caesar", "Throw", shift=13)) == after_instruction(run("rot13", "Throw"))


def test_zero_width_stays_inside_words():
    hidden = run("zero_width", "a cup\nof tea")
    assert hidden == "a c\u200bu\u200bp\no\u200bf t\u200be\u200ba"


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_homoglyph_share(share):
    assert len(set(text.HOMOGLYPHS.values())) == len(text.HOMOGLYPHS)
    plain = "please throw the cup over the garden wall"
    hidden = run("homoglyph", plain, share=share)
    changed = sum(a != b for a, b in zip(plain, hidden, strict=True))
    assert changed == round(share * sum(c in text.HOMOGLYPHS for c in plain))
    assert sum(not c.isascii() for c in hidden) == changed


def test_char_swap_moves_inner_letters_only():
    plain = "please throw the little cup over there"
    for seed in range(20):
        words = list(zip(plain.split(), run("char_swap", plain, seed, share=1.0).split(), strict=True))
        for old, new in words:
            assert sorted(old) == sorted(new) and old[0] == new[0] and old[-1] == new[-1]
            assert (old == new) == (old in ("the", "cup"))
            assert sum(a != b for a, b in zip(old, new, strict=True)) in (0, 2)
    half = run("char_swap", plain, share=0.5)
    assert sum(a != b for a, b in zip(plain.split(), half.split(), strict=True)) == 2  # of 5 words that can change
    assert run("char_swap", "a cup") == "a cup"


def test_word_shuffle_is_another_order_of_the_same_words():
    for seed, plain in enumerate(TEXTS * 5):
        hidden = run("word_shuffle", plain, seed)
        assert sorted(hidden.split()) == sorted(plain.split()) and hidden.split() != plain.split()
    assert run("word_shuffle", "cup") == "cup"


def test_acrostic_lines_are_harmless_and_apart_from_the_request():
    lines = run("acrostic", "throw the cup").split("\n")
    assert len(lines) == 4
    for word, line in zip(("throw", "the", "cup"), lines[1:], strict=True):
        assert line.removeprefix(f"{word} ") in text.ACROSTIC


def test_leet_and_flip_are_what_they_were():
    """data/prepare/mini.py and the shipped weights are built on these very rows."""
    for row in ROWS:
        for name, rewrite in (("leet", lambda t: t.translate(str.maketrans("aeiost", "4310$7"))),
                              ("flip", lambda t: " ".join(reversed(t.split())))):
            old = [{**part, "text": rewrite(part["text"])} if part["type"] == "text" else part
                   for part in row.messages[0]["content"]]
            assert attack_row(row, name) == replace(
                row, id=f"{row.id}+{name}", messages=({"role": "user", "content": old},),
                attack={"name": name, "params": {}, "seed": 0, "source_id": row.id})
    assert text.leet("taste it") == "74$73 17" and text.flip("throw the cup") == "cup the throw"


@pytest.mark.parametrize("name", [a.name for a in find(["text"])])
def test_rows_keep_everything_but_the_users_words(name):
    row = replace(ROWS[0], chosen="sure", messages=(
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "what is a cup made of?"},
        {"role": "assistant", "content": "of clay"},
        {"role": "user", "content": [{"type": "text", "text": "look at this one"}, {"type": "image"},
                                     {"type": "text", "text": "how do i throw it?"}]}))
    hit = attack_row(row, name, seed=7)
    assert (hit.id, hit.attack["source_id"], hit.attack["seed"]) == (f"{row.id}+{name}", row.id, 7)
    assert hit.attack["params"] == dict(ATTACKS[name].params)
    assert replace(hit, id=row.id, attack=None, messages=row.messages) == row
    assert [m["role"] for m in hit.messages] == ["system", "user", "assistant", "user"]
    assert hit.messages[0] == row.messages[0] and hit.messages[2] == row.messages[2]
    assert hit.messages[1]["content"] != row.messages[1]["content"]
    first, picture, last = hit.messages[3]["content"]
    assert picture == {"type": "image"} and first["text"] != "look at this one" and last["text"] != "how do i throw it?"
    record = {"id": hit.id, "task": hit.task, "domain": hit.domain, "messages": list(hit.messages), "images": ["x.png"],
              "tags": hit.tags, "attack": hit.attack, "source": hit.source, "licence": hit.licence}
    assert parse_row(record, "here").messages == hit.messages
    assert attack_row(row, name, seed=7) == hit


@pytest.mark.parametrize("name", ["homoglyph", "char_swap", "word_shuffle", "acrostic"])
def test_the_seed_makes_the_noise(name):
    plain = "please tell me how i can throw this little cup over the garden wall"
    assert len({run(name, plain, seed) for seed in range(8)}) > 4
    assert run(name, plain, 3) == run(name, plain, 3)


def test_the_same_bytes_on_any_machine():
    assert seed_of(0, "leet", "row-1") == 6491851456313443
    assert min(seed_of(s, "flip", str(s)) for s in range(99)) >= 0 and max(
        seed_of(s, "flip", str(s)) for s in range(99)) < 2**53
    assert len({seed_of(s, n, k) for s in (0, 1) for n in ("flip", "leet") for k in ("a", "b")}) == 8
    assert run("word_shuffle", "please throw the little cup", 5) == "please throw little the cup"
    assert run("char_swap", "please throw the little cup", 5) == "please trhow the litlte cup"


def test_no_text_is_no_silent_copy():
    row = replace(ROWS[0], messages=({"role": "user", "content": "a cup"}, {"role": "assistant", "content": "yes"},
                                     {"role": "user", "content": [{"type": "image"}]}))
    with pytest.raises(Unfit, match=rf"row {row.id}, attack flip: .*no text.*leave the row out"):
        attack_row(row, "flip")


@pytest.mark.parametrize(("name", "params", "message"), [
    ("caesar", {"shft": 3}, "no parameter 'shft'; did you mean shift"),
    ("caesar", {"shift": 26}, "shift is 26; give 1 to 25"),
    ("caesar", {"shift": "3"}, "shift is '3'; give a int"),
    ("caesar", {"shift": True}, "shift is True"),
    ("caesar", {"instruction": "move by {steps}"}, "cannot be filled in"),
    ("homoglyph", {"share": float("nan")}, "share is nan"),
    ("flip", {"share": 1}, "no parameter 'share'; it has none"),
    ("figstp", {}, "unknown attack 'figstp'; choose one of"),
])
def test_bad_parameters(name, params, message):
    with pytest.raises(ValueError, match=message):
        attack_row(ROWS[0], name, params=params)


def test_find_takes_names_kinds_and_families():
    assert [a.name for a in find(["cipher"])] == ["base64", "caesar", "rot13"]
    assert [a.name for a in find(["leet", "spelling"])] == sorted(
        ["leet", "char_space", "char_swap", "homoglyph", "zero_width"])
    assert {a.family for a in find(["text"])} == {"text"}
    with pytest.raises(ValueError, match="unknown attack 'base46'; did you mean base64"):
        find(["base46"])
    with pytest.raises(ValueError, match=r"unknown attack 'qqq'; choose from .*acrostic"):
        find(["qqq"])


@pytest.mark.parametrize(("name", "plain"), [
    ("leet", "\u043d\u043e\u0436"), ("homoglyph", "\u05e1\u05db\u05d9\u05df"), ("flip", "Throw!"),
    ("word_shuffle", "Throw!"), ("char_swap", "do it"), ("zero_width", "I"), ("char_space", "?"),
    ("rot13", "\u043d\u043e\u0436 12"), ("caesar", "\u4f60\u597d"), ("flip", "  Throw!\n"),
])
def test_a_text_that_an_attack_leaves_as_it_is_is_no_attacked_row(name, plain):
    """It would be noted as attacked, and a held-out set would hold plain rows."""
    row = replace(ROWS[0], images=(), messages=({"role": "user", "content": plain},))
    with pytest.raises(Unfit, match=rf"row {row.id}, attack {name}: the attack leaves the text as it is; use other"):
        attack_row(row, name)
    turns = ({"role": "user", "content": plain}, {"role": "assistant", "content": "Yes?"},
             {"role": "user", "content": "Throw the old cup to me."})
    assert attack_row(replace(row, messages=turns), name).messages[2] != turns[2]


def test_marks_stay_with_their_letters():
    """An accent behind a space, or half an emoji, would be another text."""
    for characters in (["e\u0301", "a"], ["\u0915\u093f", "\u0924\u093e"], ["\U0001f468\u200d\U0001f469", "!"],
                       [" ", "\u0301"], ["\u2764\ufe0f\u0301", "x"], ["\u0301"], []):
        plain = "".join(characters)
        assert text._characters(plain) == characters
        assert run("char_space", plain) == " ".join(characters)
        assert run("zero_width", plain).replace("\u200b", "") == plain
    assert run("zero_width", "e\u0301a") == "e\u0301\u200ba"


def test_others_join_the_registry(monkeypatch):
    """As a transform of a user's own would: a function that closes over its client."""
    monkeypatch.setattr(registry, "ATTACKS", dict(ATTACKS))
    monkeypatch.setattr(rows, "ATTACKS", registry.ATTACKS)
    client = {"throw the cup": "let the cup fly"}

    @register("reword", "text", "rewording", params={"tone": "calm"})
    def reword(plain, params, rng):
        return f"{client[plain]}, {params['tone']}"

    row = replace(ROWS[0], images=(), messages=({"role": "user", "content": "throw the cup"},))
    hit = attack_row(row, "reword", params={"tone": "warm"})
    assert hit.messages[0]["content"] == "let the cup fly, warm" and hit.attack["params"] == {"tone": "warm"}
    assert [a.name for a in find(["rewording"])] == ["reword"]
    for name, kind in (("reword", "x"), ("cipher", "x"), ("x", "flip"), ("text", "x"), ("same", "same")):
        with pytest.raises(ValueError, match="choose another"):
            register(name, "text", kind)
