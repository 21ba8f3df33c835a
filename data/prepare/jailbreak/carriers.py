"""Carriers: harmless pictures that an attack mixes with, hides among or writes on.

They are pictures of the caller's own rows that are known to be safe, of other rows than the attacked one and its twins;
where these do not suffice, plain ones are made from a seed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from PIL import Image, ImageDraw

from ...schema import ImageSource, Row, open_image

POOL = 64
"""Most carriers kept; they stay decoded."""
SIDE = 768
"""Longest side of a kept carrier in pixels."""
MADE = "made"
"""Prefix of a made carrier's name; the seed follows."""


@dataclass(frozen=True, slots=True)
class Carrier:
    """A safe picture of a row."""

    id: str
    """Of the row."""
    key: str
    """Of the row's twins, which it is no carrier for."""
    picture: Image.Image


class Carriers:
    """The pool of a run: the same for the same rows, in any order."""

    def __init__(self, rows: Sequence[Row] = (), keys: Sequence[str] = (), *, seed: int = 0,
                 max_image_pixels: int = 2**24) -> None:
        """`keys`: of each row's twins. At most one carrier is taken from the twins of one key."""
        found: dict[str, tuple[str, ImageSource]] = {}
        for row, key in zip(rows, keys, strict=True):
            if row.images and is_safe(row) and (key not in found or row.id < found[key][0]):
                found[key] = (row.id, row.images[0])
        rank = lambda key: blake2b(f"{seed}\0carrier\0{key}".encode(), digest_size=8).digest()
        self.pool: list[Carrier] = []
        for key in sorted(found, key=rank)[:POOL]:
            row_id, source = found[key]
            picture = open_image(source, max_image_pixels, f"row {row_id}").copy()
            picture.thumbnail((SIDE, SIDE))
            self.pool.append(Carrier(row_id, key, picture))

    def draw(self, number: int, seed: int, key: str) -> tuple[list[str], list[Image.Image]]:
        """Names and pictures of `number` different carriers for the rows of `key`."""
        rng = random.Random(seed_text(seed))
        others = [carrier for carrier in self.pool if carrier.key != key]
        chosen = rng.sample(others, min(number, len(others)))
        names, pictures = [carrier.id for carrier in chosen], [carrier.picture for carrier in chosen]
        while len(names) < number:
            made = rng.randrange(2**16)
            names.append(f"{MADE}:{made}")
            pictures.append(make(made))
        return names, pictures


def is_safe(row: Row) -> bool:
    """Its pictures are known to be harmless: tagged so, or of a row that is not about safety."""
    return row.tags.get("image") == "safe" if row.tags else row.task not in ("safety", "jailbreak")


@lru_cache(maxsize=POOL)
def make(seed: int, side: int = 336) -> Image.Image:
    """A plain picture: soft colour fields and a few shapes, (side, side) RGB. Integer arithmetic throughout."""
    rng = random.Random(seed)
    field = Image.new("RGB", (4, 4))
    field.putdata([tuple(rng.randrange(90, 230) for _ in range(3)) for _ in range(16)])
    picture = field.resize((side, side), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.randint(3, 6)):
        colour = tuple(rng.randrange(40, 250) for _ in range(3))
        size = rng.randint(side // 10, side // 4)
        x, y = rng.randrange(side - size), rng.randrange(side - size)
        rng.choice((pen.ellipse, pen.rectangle))((x, y, x + size, y + size * rng.randint(50, 100) // 100), fill=colour)
    return picture


def seed_text(seed: int) -> str:
    """Apart from the attack's own generator, which starts from `seed` itself."""
    return f"carriers/{seed}"
