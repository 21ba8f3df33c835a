"""Text attacks: deterministic rewrites of a prompt, each a pure function str -> str, harmless by themselves.

An attacked row keeps its label, its source and the attack's name; benign rows pass through the same transform, or the
model would learn that an odd spelling means no.
"""

from dataclasses import replace

from ..schema import Row

LEET = str.maketrans("aeiost", "4310$7")


def leet(text: str) -> str:
    """Letters to look-alike digits: "taste" -> "74$73"."""
    return text.translate(LEET)


def flip(text: str) -> str:
    """Words in reverse order."""
    return " ".join(reversed(text.split()))


ATTACKS = {"leet": leet, "flip": flip}


def attack(row: Row, name: str) -> Row:
    """`row` with every user text rewritten by attack `name`; id, attack and source_id say so.

    Raises:
        ValueError: no such attack.
    """
    if name not in ATTACKS:
        raise ValueError(f"unknown attack {name!r}; choose one of {sorted(ATTACKS)}")
    messages = tuple(
        {**message, "content": _rewrite(message["content"], name)} if message["role"] == "user" else message
        for message in row.messages
    )
    note = {"name": name, "params": {}, "seed": 0, "source_id": row.id}
    return replace(row, id=f"{row.id}+{name}", messages=messages, attack=note)


def _rewrite(content, name: str):
    if isinstance(content, str):
        return ATTACKS[name](content)
    return [{**part, "text": ATTACKS[name](part["text"])} if part["type"] == "text" else part for part in content]
