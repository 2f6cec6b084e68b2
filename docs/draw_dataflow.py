"""Draws docs/assets/dataflow.svg: ``python docs/draw_dataflow.py``.

The colours can be read on a white and on a dark page: all text stands on a filled box.
"""

from pathlib import Path

COMPUTE, DENSE, PACKED, LINE = "#5b6678", "#3f51b5", "#b0501a", "#878e99"
TOP, BOTTOM, HEIGHT = (
    16,
    142,
    60,
)  # of the two rows: what is stored, and what is asked

BOXES = [  # x, y, width, colour, name, detail
    (4, TOP, 100, COMPUTE, "k, v", "after RoPE"),
    (130, TOP, 90, COMPUTE, "rotate", "by P"),
    (246, TOP, 214, DENSE, "dense buffer", "newest 128 tokens, 4 sinks"),
    (486, TOP, 96, COMPUTE, "pack", "in few bits"),
    (608, TOP, 164, PACKED, "packed history", "codes and scales"),
    (4, BOTTOM, 100, COMPUTE, "q", "after RoPE"),
    (130, BOTTOM, 90, COMPUTE, "rotate", "by P"),
    (
        246,
        BOTTOM,
        526,
        COMPUTE,
        "attention",
        "one softmax over buffer, sinks and history; nothing is rebuilt",
    ),
    (798, BOTTOM, 112, COMPUTE, "output", "rotated back"),
]
ARROWS = [  # x1, y1, x2, y2
    *(
        (x, TOP + HEIGHT / 2, x + 26, TOP + HEIGHT / 2)
        for x in (104, 220, 460, 582)
    ),
    *(
        (x, BOTTOM + HEIGHT / 2, x + 26, BOTTOM + HEIGHT / 2)
        for x in (104, 220, 772)
    ),
    (353, TOP + HEIGHT, 353, BOTTOM),
    (690, TOP + HEIGHT, 690, BOTTOM),
]


def box(
    x: float, y: float, width: float, colour: str, name: str, detail: str
) -> str:
    middle = x + width / 2
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{HEIGHT}" rx="7" fill="{colour}"/>'
        f'<text x="{middle}" y="{y + 26}" font-size="18" font-weight="600">{name}</text>'
        f'<text x="{middle}" y="{y + 47}" font-size="14.5">{detail}</text>'
    )


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{LINE}" stroke-width="2" marker-end="url(#head)"/>'


def draw() -> str:
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 914 218" role="img" '
            'font-family="system-ui, sans-serif" text-anchor="middle" fill="#ffffff">',
            "<title>Keys and values are rotated and enter a dense buffer; what leaves it is packed into the "
            "history; rotated queries attend to both, and the output is rotated back.</title>",
            f'<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5" orient="auto">'
            f'<path d="M0 0 8 4 0 8z" fill="{LINE}"/></marker>',
            *(arrow(*a) for a in ARROWS),
            *(box(*b) for b in BOXES),
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("assets").joinpath("dataflow.svg").write_text(draw())
