"""Every link leads somewhere, which the files alone say."""

import pytest
from built_site import PAGES, is_internal, is_sound, leads_somewhere, read


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_somewhere(path: str) -> None:
    links = read(path).links
    assert not [
        link
        for link in links
        if is_internal(link) and not leads_somewhere(path, link)
    ]
    assert not [
        link for link in links if not is_internal(link) and not is_sound(link)
    ]
