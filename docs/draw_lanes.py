"""Draws docs/assets/lanes.svg: ``python docs/draw_lanes.py``.

A group of 32 coordinates with 5 bits: which bytes of a token's row each lane owns, and how a field of them becomes a
number of half precision. The colours can be read on a white and on a dark page: all text stands on a filled box.
"""

from collections.abc import Iterator
from pathlib import Path

COMPUTE, LINE = "#5b6678", "#878e99"
KEYS = "#2f3f9e", "#5566c9"  # of neighbours, in turn
VALUES = "#8a3c10", "#b8561f"
FIELD = "#3f51b5"

LEFT, BYTE, GAP = 152, 37, 12  # where rows begin; a byte, and the gap between parts
HEIGHT, STEP = 30, 36  # of a box, and from a row to the next
UPPER, LOWER = 16, 4  # bytes of both parts
CELL, HALF = 26, 178  # a bit of half a word, and where its rows begin


def box(
    x: float, y: float, width: float, colour: str, text: str, size: float = 14
) -> str:
    return (
        f'<rect x="{x + 1:g}" y="{y}" width="{width - 2:g}" height="{HEIGHT}" rx="4" fill="{colour}"/>'
        f'<text x="{x + width / 2:g}" y="{y + 20}" font-size="{size}">{text}</text>'
    )


def shares(
    y: float, owners: int, colours: tuple[str, str], name: str
) -> Iterator[str]:
    """Draw who owns which bytes of both parts."""
    for begin, count in (
        (LEFT, UPPER),
        (LEFT + UPPER * BYTE + GAP, LOWER),
    ):
        width = count * BYTE / owners
        for owner in range(owners):
            text = f"{name} = {owner}" if width > 60 else f"{owner}"
            yield box(begin + owner * width, y, width, colours[owner % 2], text, 13)


def bits(y: float, label: str, cells: list[tuple[int, str, str]]) -> Iterator[str]:
    """Draw 16 bits, high ones first; cells are a number of bits, a colour and a text."""
    yield box(0, y, HALF - 14, COMPUTE, label, 13)
    x = HALF
    for count, colour, text in cells:
        yield box(x, y, count * CELL, colour, text)
        x += count * CELL


def note(y: float, text: str) -> str:
    x = HALF + 16 * CELL + 14
    return box(x, y, 914 - x, COMPUTE, text, 13)


def draw() -> str:
    second = LEFT + UPPER * BYTE + GAP
    rows = [
        box(0, 0, LEFT - 14, COMPUTE, "a token's row", 13),
        box(LEFT, 0, UPPER * BYTE, COMPUTE, "part 1: the upper 4 bits of 32 codes"),
        box(second, 0, LOWER * BYTE, COMPUTE, "part 2: the last bit"),
        box(0, STEP, LEFT - 14, COMPUTE, "its bytes", 13),
        *(
            box(
                LEFT + i * BYTE + GAP * (i >= UPPER),
                STEP,
                BYTE,
                COMPUTE,
                str(i),
                13,
            )
            for i in range(UPPER + LOWER)
        ),
        box(0, 2 * STEP, LEFT - 14, KEYS[0], "keys: lane t of 4", 13),
        *shares(2 * STEP, 4, KEYS, "t"),
        box(0, 3 * STEP, LEFT - 14, VALUES[0], "values: lane g of 8", 13),
        *shares(3 * STEP, 8, VALUES, "g"),
    ]

    def fields(highlighted: str) -> list[tuple[int, str, str]]:
        return [
            (4, highlighted if i == 1 else COMPUTE, f"code {i}")
            for i in (3, 2, 1, 0)
        ]

    zeros = COMPUTE, "0"
    y = 4 * STEP + 26
    rows += [
        *bits(y, "keys: half a word", fields(FIELD)),
        note(y, "part 1 of codes 0 to 3 of lane t"),
        *bits(
            y + STEP,
            "AND 00f0, OR 5800",
            [
                (1, *zeros),
                (5, COMPUTE, "exponent 7"),
                (2, *zeros),
                (4, FIELD, "code 1"),
                (4, *zeros),
            ],
        ),
        note(y + STEP, "128 + 2 · field; 128 comes off the sum"),
    ]
    y += 2 * STEP + 16
    rows += [
        *bits(y, "values: half a word", fields(VALUES[1])),
        note(y, "part 1 of codes 0 to 3 of lane g"),
        *bits(
            y + STEP,
            "AND 00f0, OR last bit",
            [
                (1, *zeros),
                (5, COMPUTE, "no exponent"),
                (2, *zeros),
                (4, VALUES[1], "code 1"),
                (1, VALUES[0], "bit"),
                (3, *zeros),
            ],
        ),
        note(y + STEP, "code · 2⁻²¹; the sum is multiplied"),
    ]
    height = y + STEP + HEIGHT
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 914 {height}" role="img" '
            'font-family="system-ui, sans-serif" text-anchor="middle" fill="#ffffff">',
            "<title>The 20 bytes of 32 codes of 5 bits: 16 bytes of upper parts and 4 of last bits. As keys, lane t of 4 "
            "owns 4 bytes of the first part and one of the second; as values, lane g of 8 owns 2 bytes and half a byte. "
            "Of half a word, AND keeps a field and OR gives a key an exponent and a value its last bit.</title>",
            *rows,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("assets").joinpath("lanes.svg").write_text(draw())
