"""Search, navigation without loading, and the switch between light and dark are tried once."""

import re
from urllib.parse import urljoin, urlsplit

from browser import Opener
from built_site import PAGES, SITE, file_of, read
from playwright.sync_api import Route, expect


def test_search_finds_a_page(opened: Opener) -> None:
    with opened("/", "desktop") as visit:
        visit.page.locator("[data-md-component=search-query]").click()
        visit.page.keyboard.type("retention")
        result = visit.page.locator(".md-search-result__link").first
        address = result.get_attribute("href")
        result.click()
        visit.page.wait_for_url(address)
        expect(visit.page.locator(".md-content article")).to_contain_text(
            re.compile("retention", re.IGNORECASE)
        )
        assert not visit.problems


def test_instant_navigation_renders_formulas(opened: Opener) -> None:
    # A page with formulas that is not the first: from there one page back, and here again.
    path = next(
        path
        for path in PAGES
        if read(path).formulas and 'rel="prev"' in file_of(path).read_text()
    )
    with opened(path, "desktop") as visit:
        visit.page.route("**/sitemap.xml", local_sitemap)
        visit.page.reload()
        visit.page.evaluate("window.isTheSame = true")
        visit.page.locator(".md-footer__link--prev").click()
        visit.page.wait_for_url(lambda url: urlsplit(url).path != path)
        visit.page.locator(".md-footer__link--next").click()
        visit.page.wait_for_url(lambda url: urlsplit(url).path == path)
        expect(visit.page.locator(".arithmatex:has(.katex)")).to_have_count(
            read(path).formulas
        )
        assert not visit.raw_formulas()
        assert visit.page.evaluate("window.isTheSame"), (
            "the pages were loaded, not exchanged"
        )
        assert not visit.problems


def local_sitemap(route: Route) -> None:
    """Answer with the sitemap of the site as served here: only pages that the sitemap names are exchanged."""
    sitemap = (SITE / "sitemap.xml").read_text()
    published = min(re.findall("<loc>(.*?)</loc>", sitemap), key=len)
    route.fulfill(
        body=sitemap.replace(published, urljoin(route.request.url, "/")),
        content_type="application/xml",
    )


def test_scheme_is_toggled(opened: Opener) -> None:
    with opened("/", "desktop") as visit:
        for scheme in ("slate", "default"):
            visit.page.locator("[data-md-component=palette] label:visible").click()
            expect(visit.page.locator("body")).to_have_attribute(
                "data-md-color-scheme", scheme
            )
        assert not visit.problems
