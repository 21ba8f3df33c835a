"""Pictograms of everyday things for the embedded safety rows: drawn, never downloaded, in any colours.

A figure is a list of strokes in the square [-1, 1]^2, y downwards: ("poly", points), ("disc", x, y, radius) or
("line", width, points); a trailing "paper" draws in the background's colour.
"""

import math
import random

from PIL import Image, ImageDraw

SIZE = 64
"""Side of a picture in pixels."""
OVERSAMPLE = 4

FIGURES: dict[str, list[tuple]] = {
    # risky
    "knife": [
        ("poly", [(-1, -.25), (.25, -.25), (.25, .2), (-.6, .2)]),
        ("poly", [(.3, -.18), (1, -.18), (1, .1), (.3, .1)]),
    ],
    "flame": [
        ("poly", [(0, -1), (.35, -.4), (.62, .1), (.6, .55), (.3, .95), (-.3, .95), (-.6, .55), (-.62, .1),
                  (-.3, -.1)]),
        ("disc", 0, .5, .25, "paper"),
    ],
    "pill": [
        ("disc", -.55, 0, .42), ("disc", .55, 0, .42),
        ("poly", [(-.55, -.42), (.55, -.42), (.55, .42), (-.55, .42)]), ("line", .12, [(0, -.5), (0, .5)], "paper"),
    ],
    "scissors": [
        ("line", .16, [(-.3, .45), (.6, -.95)]), ("line", .16, [(.3, .45), (-.6, -.95)]), ("disc", -.4, .65, .33),
        ("disc", .4, .65, .33), ("disc", -.4, .65, .15, "paper"), ("disc", .4, .65, .15, "paper"),
    ],
    "bolt": [
        ("poly", [(.25, -1), (-.6, .15), (-.05, .15), (-.3, 1), (.6, -.2), (.05, -.2)]),
    ],
    "saw": [
        ("poly", [(-1, -.3), (.4, -.3), (.4, .3), (.2, .05), (0, .3), (-.2, .05), (-.4, .3), (-.6, .05), (-.8, .3),
                  (-1, .05)]),
        ("poly", [(.4, -.45), (1, -.45), (1, .45), (.4, .45)]), ("disc", .7, 0, .2, "paper"),
    ],
    "skull": [
        ("disc", 0, -.25, .72), ("poly", [(-.4, .3), (.4, .3), (.4, .95), (-.4, .95)]),
        ("disc", -.3, -.25, .2, "paper"), ("disc", .3, -.25, .2, "paper"),
        ("line", .1, [(-.13, .6), (-.13, 1)], "paper"), ("line", .1, [(.13, .6), (.13, 1)], "paper"),
    ],
    "needle": [
        ("poly", [(-.35, -.22), (.5, -.22), (.5, .22), (-.35, .22)]), ("line", .08, [(-1, 0), (-.35, 0)]),
        ("line", .12, [(.5, 0), (.95, 0)]), ("line", .12, [(.95, -.35), (.95, .35)]),
    ],
    # harmless
    "cup": [
        ("poly", [(-.7, -.6), (.4, -.6), (.3, .7), (-.6, .7)]), ("disc", .5, -.05, .42),
        ("disc", .5, -.05, .22, "paper"), ("poly", [(-.6, -.5), (.32, -.5), (.25, .6), (-.52, .6)]),
    ],
    "book": [
        ("poly", [(-.95, -.6), (-.06, -.45), (-.06, .75), (-.95, .6)]),
        ("poly", [(.95, -.6), (.06, -.45), (.06, .75), (.95, .6)]),
    ],
    "flower": [
        ("disc", 0, -.65, .33), ("disc", .55, -.2, .33), ("disc", .35, .42, .33), ("disc", -.35, .42, .33),
        ("disc", -.55, -.2, .33), ("disc", 0, -.05, .25, "paper"),
    ],
    "leaf": [
        ("poly", [(0, -1), (.45, -.5), (.5, 0), (.3, .4), (0, .65), (-.3, .4), (-.5, 0), (-.45, -.5)]),
        ("line", .1, [(0, .55), (0, 1)]), ("line", .07, [(0, -.8), (0, .55)], "paper"),
    ],
    "hat": [
        ("poly", [(-.5, -.7), (.5, -.7), (.55, .3), (-.55, .3)]), ("poly", [(-1, .3), (1, .3), (1, .6), (-1, .6)]),
        ("line", .12, [(-.52, .08), (.52, .08)], "paper"),
    ],
    "key": [
        ("disc", -.55, 0, .42), ("disc", -.55, 0, .2, "paper"), ("line", .18, [(-.15, 0), (1, 0)]),
        ("line", .16, [(.9, 0), (.9, .45)]), ("line", .16, [(.55, 0), (.55, .38)]),
    ],
    "moon": [
        ("disc", 0, 0, .9), ("disc", .42, -.12, .75, "paper"),
    ],
    "house": [
        ("poly", [(0, -1), (1, -.1), (-1, -.1)]), ("poly", [(-.7, -.1), (.7, -.1), (.7, .85), (-.7, .85)]),
        ("poly", [(-.18, .25), (.18, .25), (.18, .85), (-.18, .85)], "paper"),
    ],
}


def draw(name: str, rng: random.Random) -> Image.Image:
    """One picture of `name`: random colours, place, size and tilt. (SIZE, SIZE) RGB.

    Any ink may meet any paper that is clearly brighter, so that colour tells nothing of the thing.
    """
    while True:
        ink, paper = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
        if _luma(paper) - _luma(ink) > 70:
            break
    side = SIZE * OVERSAMPLE
    radius = side * rng.uniform(.34, .46)
    cx, cy = (rng.uniform(radius, side - radius) for _ in range(2))
    tilt = math.radians(rng.uniform(-12, 12))
    cos, sin = math.cos(tilt) * radius, math.sin(tilt) * radius
    image = Image.new("RGB", (side, side), paper)
    pen = ImageDraw.Draw(image)

    def place(x: float, y: float) -> tuple[float, float]:
        return cx + x * cos - y * sin, cy + x * sin + y * cos

    for stroke in FIGURES[name]:
        colour = paper if stroke[-1] == "paper" else ink
        kind, *rest = stroke
        if kind == "poly":
            pen.polygon([place(*point) for point in rest[0]], fill=colour)
        elif kind == "line":
            pen.line([place(*point) for point in rest[1]], fill=colour, width=round(rest[0] * radius))
        else:
            x, y, r = rest[:3]
            px, py = place(x, y)
            pen.ellipse([px - r * radius, py - r * radius, px + r * radius, py + r * radius], fill=colour)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _luma(colour: tuple[int, ...]) -> float:
    return .299 * colour[0] + .587 * colour[1] + .114 * colour[2]
