"""Which row meets which attack: twins together, labels in the same shares, no dependence on the order."""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportAttributeAccessIssue=false

from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from cosmo_rl.data.prepare.jailbreak.image import Carriers
from cosmo_rl.data.prepare.jailbreak.registry import Unfit, find, seed_of
from cosmo_rl.data.prepare.jailbreak.rows import assign, attack_row, augment, twin_keys
from cosmo_rl.data.prepare.mini import general_rows, safety_rows

ROWS = safety_rows("validation")
TWINS = r"^(.*)-[abc]$"
KEYS = twin_keys(ROWS, TWINS)
ALL = find(["text", "image"])
SMALL = {attack.name: {"size": 480 if attack.name == "distractor_grid" else 280} for attack in find(["image"])}
"""Sizes that make the tests quick."""


def labels(assigned, rows):
    """attack -> (unsafe, all)."""
    out = {}
    for attack in {one.attack.name for one in assigned}:
        hit = [rows[i].is_unsafe for one in assigned if one.attack.name == attack for i in one.rows]
        out[attack] = (sum(hit), len(hit))
    return out


@pytest.mark.parametrize("per_row", [1, 3, len(ALL)])
def test_triplets_meet_each_attack_in_exactly_the_inputs_share(per_row):
    assigned = assign(ROWS, KEYS, ALL, per_row=per_row, seed=0)
    share = sum(row.is_unsafe for row in ROWS) / len(ROWS)
    counts = labels(assigned, ROWS)
    assert len(counts) == len(ALL) == 22
    assert all(unsafe / number == share for unsafe, number in counts.values())
    sizes = [number for _, number in counts.values()]
    assert max(sizes) - min(sizes) <= 3  # one triplet
    met = Counter(i for one in assigned for i in one.rows)
    assert set(met.values()) == {per_row} and len(met) == len(ROWS)
    assert len({(i, one.attack.name) for one in assigned for i in one.rows}) == per_row * len(ROWS)


@pytest.mark.parametrize("seed", range(4))
def test_rows_without_twins_meet_each_attack_in_the_inputs_share_but_for_one(seed):
    rows = [*ROWS, *general_rows("validation")[:101]]
    counts = labels(assign(rows, twin_keys(rows), ALL, per_row=1, seed=seed), rows)
    unsafe, number = sum(row.is_unsafe for row in rows), len(rows)
    for hit, met in counts.values():
        assert abs(hit - unsafe / len(ALL)) < 1 and abs(met - number / len(ALL)) < 2


def test_pictures_and_domains_are_spread_too():
    rows = [row if i % 2 else replace(row, images=(), messages=({"role": "user", "content": "throw the cup"},))
            for i, row in enumerate(ROWS)]
    assigned = assign(rows, twin_keys(rows), ALL, per_row=1, seed=0)
    for kind in (lambda row: bool(row.images), lambda row: row.domain):
        met = Counter((one.attack.name, kind(rows[i])) for one in assigned for i in one.rows)
        for value in {kind(row) for row in rows}:
            numbers = [met[attack.name, value] for attack in ALL]
            assert max(numbers) - min(numbers) <= 4, value


def test_twins_meet_the_same_attack_with_the_same_parameters_and_seed():
    done = list(augment(ROWS[:66], assign(ROWS[:66], KEYS[:66], ALL, per_row=2, seed=1), seed=1, params=SMALL,
                        carriers=Carriers(ROWS[:66], KEYS[:66])))
    by_twins = defaultdict(set)
    for item in done:
        assert len(item.rows) == 3 and len({row.id.split("+")[0].rsplit("-", 1)[0] for row in item.rows}) == 1
        for row in item.rows:
            note = {**row.attack, "source_id": None}
            by_twins[item.assignment.key, item.assignment.attack.name].add(repr(note))
            key = row.attack["source_id"].rsplit("-", 1)[0]
            assert row.attack["seed"] == seed_of(1, row.attack["name"], key)
    assert len(by_twins) == 44 and all(len(notes) == 1 for notes in by_twins.values())


def test_any_order_of_rows_gives_the_same_rows():
    def made(rows):
        keys = twin_keys(rows, TWINS)
        assigned = assign(rows, keys, ALL, per_row=1, seed=3)
        out = {}
        for item in augment(rows, assigned, seed=3, params=SMALL, carriers=Carriers(rows, keys)):
            for row in item.rows:
                out[row.id] = (row.messages, row.attack, [image.tobytes() for image in row.images])
        return out

    rows = ROWS[:66]
    assert made(rows) == made(rows[::-1]) == made(rows[30:] + rows[:30])


def test_another_seed_deals_otherwise():
    dealt = [[(one.key, one.attack.name) for one in assign(ROWS, KEYS, ALL, per_row=1, seed=seed)]
             for seed in (0, 0, 1)]
    assert dealt[0] == dealt[1] != dealt[2]


def test_a_row_can_be_made_again_from_its_note():
    for item in augment(ROWS[:66], assign(ROWS[:66], KEYS[:66], ALL, per_row=1, seed=4), seed=4, params=SMALL):
        row = item.rows[0]
        note, source = row.attack, ROWS[item.assignment.rows[0]]
        again = attack_row(source, note["name"], seed=note["seed"],
                           params={k: v for k, v in note["params"].items() if k != "carriers"})
        assert (again.messages, again.attack) == (row.messages, note)


def test_an_illegible_row_drops_its_twins_too():
    """Else the longer, mostly unsafe, texts would go, and the attack would tell the label."""
    rows = list(ROWS[:6])
    rows[1] = replace(rows[1], messages=({"role": "user", "content": [
        {"type": "image"}, {"type": "text", "text": "throw the cup " * 900}]},))
    assigned = assign(rows, twin_keys(rows, TWINS), find(["figstep", "flip"]), per_row=2, seed=0)
    with pytest.raises(Unfit, match=rf"row {rows[1].id}, attack figstep: 12608 characters do not fit"):
        list(augment(rows, assigned, seed=0))
    done = {(item.assignment.key[1:], item.assignment.attack.name): item
            for item in augment(rows, assigned, seed=0, drop=True)}
    assert {key: len(item.rows) for key, item in done.items()} == {
        ("safety-validation-0", "flip"): 3, ("safety-validation-0", "figstep"): 0,
        ("safety-validation-1", "flip"): 3, ("safety-validation-1", "figstep"): 3}
    assert "do not fit" in done["safety-validation-0", "figstep"].reason


def test_twin_keys():
    assert twin_keys(ROWS[:3]) == [row.id for row in ROWS[:3]]
    assert len(set(KEYS)) == len(ROWS) // 3 and KEYS[0] == KEYS[1] == KEYS[2] != KEYS[3]
    assert twin_keys(ROWS[:6], r"safety-validation-\d+") == KEYS[:6]
    mixed = [*ROWS[:3], replace(ROWS[3], id="alone"), replace(ROWS[4], id="safety-validation-0")]
    assert len(set(twin_keys(mixed, TWINS))) == 3  # an id that does not match is no twin of one that does
    with pytest.raises(ValueError, match=r"no regular expression"):
        twin_keys(ROWS, "(")
    for found in ("x*", "(x)?", "^safety(.*?)"):  # else all rows would be twins, and meet one attack
        with pytest.raises(ValueError, match=r"finds an empty text in the id 'safety-validation-0-a'"):
            twin_keys(ROWS, found)
    with pytest.raises(ValueError, match=rf"makes twins of all {len(ROWS)} rows"):
        twin_keys(ROWS, "safety")
    with pytest.raises(ValueError, match=r"finds no twins.*'safety-validation-0-a'"):
        twin_keys(ROWS, "nothing like this")


def test_too_many_attacks_and_rows_attacked_before():
    for per_row in (0, 3):
        with pytest.raises(ValueError, match=f"--per-row is {per_row}, of 2 attacks; give 1 to 2, or all"):
            assign(ROWS, KEYS, ALL[:2], per_row=per_row, seed=0)
    rows = [attack_row(ROWS[0], "flip")]
    with pytest.raises(ValueError, match=r"row safety-validation-0-a\+flip is already the work of attack 'flip'"):
        assign(rows, twin_keys(rows), ALL, per_row=1, seed=0)
