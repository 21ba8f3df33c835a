"""The embedded data: splits that share nothing, and safety rows that neither image nor text alone can tell."""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import hashlib
from collections import Counter

import pytest
from PIL import Image

from cosmo_rl.data.prepare import mini
from cosmo_rl.data.prepare.jailbreak.registry import ATTACKS

SPLITS = ("train", "validation", "heldout")


def text(row):
    return next(part["text"] for part in row.messages[0]["content"] if part["type"] == "text")


DIGESTS = {}
"""Path, or id of a PIL image (all of them stay cached in mini.py) -> digest of its pixels."""


def pixels(row):
    image = row.images[0]
    key = id(image) if isinstance(image, Image.Image) else image
    if key not in DIGESTS:
        data = image if isinstance(image, Image.Image) else Image.open(image).convert("RGB")
        DIGESTS[key] = hashlib.blake2b(data.tobytes(), digest_size=16).digest()
    return DIGESTS[key]


@pytest.fixture(scope="module")
def splits():
    return {split: (mini.safety_rows(split), mini.general_rows(split)) for split in SPLITS}


def test_splits_share_no_image_and_no_wording(splits):
    for kind in (0, 1):
        for name, of in (("image", pixels), ("wording", text)):
            seen = [{of(row) for row in splits[split][kind]} for split in SPLITS]
            for a, b in ((0, 1), (0, 2), (1, 2)):
                assert not seen[a] & seen[b], f"{name} of {SPLITS[a]} and {SPLITS[b]}"
    captions = {pixels(row) for row in mini.caption_rows(1000)}
    for split in ("validation", "heldout"):
        for rows in splits[split]:
            assert not captions & {pixels(row) for row in rows}


def test_sizes_that_the_report_needs(splits):
    suite = mini.mini_suite("heldout")
    assert len(suite["unsafe"]) >= 300 and len(suite["benign"]) >= 300 and len(suite["general"]) >= 2000
    for name in ("heldout_attack", "unseen_attack"):
        assert len(suite[f"{name}_unsafe"]) == len(suite["unsafe"])
        assert len(suite[f"{name}_benign"]) == len(suite["benign"])


@pytest.mark.parametrize("split", SPLITS)
def test_neither_image_nor_text_alone_tells(splits, split):
    rows = splits[split][0]
    assert len({row.id for row in rows}) == len(rows)
    for unsafe, other_image, other_text in zip(rows[0::3], rows[1::3], rows[2::3], strict=True):
        assert [r.tags["combined"] for r in (unsafe, other_image, other_text)] == ["unsafe", "safe", "safe"]
        assert text(unsafe) == text(other_image) and pixels(unsafe) != pixels(other_image)
        assert pixels(unsafe) == pixels(other_text) and text(unsafe) != text(other_text)
    # Given a risky image, or a risky text, half of the rows are unsafe.
    for side in ("image", "text"):
        labels = Counter(row.tags["combined"] for row in rows if row.tags[side] == "unsafe")
        assert labels["unsafe"] == labels["safe"]


def test_general_answers_agree_with_the_elements(splits):
    rows = splits["heldout"][1]
    for row in rows:
        shape, colour = row.key_elements
        assert colour in mini.COLOURS and shape in mini.SHAPES
        if row.answer not in ("yes", "no"):
            assert row.answer in (colour, shape)
        else:
            words = set(text(row).rstrip("?").split())
            holds = bool(words & {colour, shape})
            assert (row.answer == "yes") == (holds != bool(words & {"not", "no"})), row


def test_stage_0_refuses_at_random():
    rows = [row for row in mini.sft_rows("train") if row.task == "safety"]
    for label in ("unsafe", "safe"):
        members = [row for row in rows if row.tags["combined"] == label]
        share = sum(row.chosen.endswith(mini.REFUSAL) for row in members) / len(members)
        assert abs(share - 0.5) < 0.04, (label, share)
        assert all(row.chosen.endswith((mini.REFUSAL, mini.COMPLIANCE)) for row in members)


def test_only_stage_0_sees_the_heldout_attack_and_no_stage_the_other():
    rows = {0: mini.sft_rows("train"), 1: mini.mini_rows(1), 2: mini.mini_rows(2)}
    seen = {stage: {row.attack["name"] for row in rows[stage] if row.attack} for stage in rows}
    assert seen == {0: {mini.SEEN_ATTACK}, 1: set(), 2: set(mini.JAILBREAK_MIX)}
    classes = {kind: {ATTACKS[name].kind for name in names} for kind, names in (
        ("mix", mini.JAILBREAK_MIX), ("held out", (mini.SEEN_ATTACK, mini.UNSEEN_ATTACK)))}
    assert not classes["mix"] & classes["held out"]


def test_stage_2_puts_whole_triplets_under_an_attack(splits):
    plain, mixed = splits["train"][0], mini.jailbreak_mix("train")
    attacked = 0
    for start in range(0, len(plain), 3):
        before, after = plain[start:start + 3], mixed[start:start + 3]
        notes = [(row.attack or {}).get("name") for row in after]
        assert len(set(notes)) == 1, notes
        if notes[0] is None:
            assert after == before
            continue
        attacked += 1
        assert len({(str(row.attack["params"]), row.attack["seed"]) for row in after}) == 1
        for old, new in zip(before, after, strict=True):
            assert (new.attack["source_id"], new.tags, new.domain) == (old.id, old.tags, old.domain)
            assert pixels(new) != pixels(old) and text(new) == text(old)
    assert abs(attacked / (len(plain) / 3) - mini.JAILBREAK_SHARE) < 0.03
    heldout = {text(row) for rows in mini.mini_suite("heldout").values() for row in rows}
    assert not heldout & {text(row) for row in mixed}
