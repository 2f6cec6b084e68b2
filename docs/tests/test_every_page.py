"""Each test says one thing that must hold on every page, in light on a desktop and in dark on a phone."""

import re

from browser import DEVICES, SCHEMES, Visit


def test_formulas_are_rendered(visit: Visit) -> None:
    assert not visit.raw_formulas()


def test_images_are_loaded_and_described(visit: Visit) -> None:
    assert not visit.find("img", "e => !e.alt.trim() || !e.naturalWidth")
    description = "(e.getAttribute('aria-label') ?? e.querySelector(':scope > title')?.textContent ?? '')"
    assert not visit.find(
        "figure.plot svg, svg[role=img]", f"e => !{description}.trim()"
    )


def test_nothing_is_wider_than_the_window(visit: Visit) -> None:
    width = DEVICES[visit.device]["viewport"]["width"]
    assert visit.page.evaluate("document.scrollingElement.scrollWidth") <= width
    assert not visit.find(
        "article :not(svg *, .katex-mathml, .katex-mathml *)", STICKS_OUT
    )


def test_text_is_readable_in_the_scheme(visit: Visit) -> None:
    assert (
        visit.page.get_attribute("body", "data-md-color-scheme")
        == SCHEMES[visit.device]
    )
    (paper,) = visit.colours("body", "background-color")
    assert (
        luminance(rgba(paper)) < 0.1
        if visit.device == "phone"
        else luminance(rgba(paper)) > 0.9
    )
    for ink in visit.colours("article :is(p, li, td)"):
        assert contrast(ink, paper) >= 4.5


def test_plots_take_the_colour_of_the_text(visit: Visit) -> None:
    (ink,) = visit.colours("body")
    no_text_in_ink = f"e => ![...e.querySelectorAll('text')].some(t => getComputedStyle(t).fill === '{ink}')"
    assert not visit.find("figure.plot svg:has(text)", no_text_in_ink)
    # A label may be coloured, or white on a coloured mark; black is what nobody chose.
    assert "rgb(0, 0, 0)" not in visit.colours("figure.plot svg text", "fill")


def test_page_has_one_heading(visit: Visit) -> None:
    assert len(visit.find("h1")) == 1


def test_code_can_be_copied(visit: Visit) -> None:
    sources = ".highlight pre:has(> code):not(.result *, .doc-signature *)"
    assert not visit.find(
        sources, "e => !e.querySelector('button[data-md-type=copy]')"
    )


def test_nothing_went_wrong(visit: Visit) -> None:
    assert not visit.problems


# Ends right of the window, and in no box that scrolls.
STICKS_OUT = """e => {
    if (e.getBoundingClientRect().right <= innerWidth + 1) return false
    for (let box = e.parentElement; box.tagName !== "ARTICLE"; box = box.parentElement)
        if (/auto|scroll/.test(getComputedStyle(box).overflowX)) return false
    return true
}"""


def rgba(colour: str) -> tuple[float, float, float, float]:
    """Read red, green, blue (0 to 255) and alpha (0 to 1) of a computed `rgb(...)` or `rgba(...)`."""
    red, green, blue, *alpha = map(float, re.findall(r"[\d.]+", colour))
    return red, green, blue, *(alpha or [1.0])


def luminance(colour: tuple[float, ...]) -> float:
    """Compute the relative luminance by WCAG 2, from 0 (black) to 1 (white)."""
    shares = [value / 255 for value in colour[:3]]
    linear = [
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        for share in shares
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(ink: str, paper: str) -> float:
    """Compute the contrast ratio by WCAG 2, from 1 to 21, of a colour that may let an opaque one shine through."""
    *front, alpha = rgba(ink)
    back = rgba(paper)[:3]
    blend = tuple(
        alpha * f + (1 - alpha) * b for f, b in zip(front, back, strict=True)
    )
    dark, light = sorted([luminance(blend), luminance(back)])
    return (light + 0.05) / (dark + 0.05)
