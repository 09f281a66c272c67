"""What a screen reader needs of a page, as far as its HTML shows it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from bs4 import BeautifulSoup, Tag

HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


def barriers(html: str) -> list[str]:
    """What of a page some readers cannot find their way by."""
    # Half of a page is code, in which nobody looks for a way
    html = re.sub(r"<(pre|script|style)\b.*?</\1>", "", html, flags=re.DOTALL)
    page = BeautifulSoup(html, "html.parser")
    for hidden in page.select(".onlyprint"):  # the theme's second title, for paper
        hidden.decompose()
    return list(_barriers(page))


def _barriers(page: BeautifulSoup) -> Iterator[str]:
    if page.html is None or not page.html.get("lang"):
        yield "the page does not say its language"
    for image in page.find_all("img"):
        if not image.get("alt", "").strip():
            yield f"picture without words: {image.get('src', '')[:60]}"
    for cell in page.find_all("th"):
        if not cell.get_text(strip=True):
            yield f"empty head of a column: {cell.parent.get_text('|', strip=True)}"
    for link in page.find_all("a", href=True):
        if not _words(link):
            yield f"link without words: {link['href']}"
    levels = [int(heading.name[1]) for heading in page.find_all(HEADINGS)]
    if levels.count(1) != 1:
        yield f"{levels.count(1)} titles"
    for above, below in pairwise(levels):
        if below > above + 1:
            yield f"a heading of level {below} right under one of level {above}"


def _words(link: Tag) -> str:
    """What is read out for a link."""
    alts = [image.get("alt", "") for image in link.find_all("img")]
    said = (link.get("aria-label", ""), link.get("title", ""), *alts)
    return " ".join((*said, link.get_text())).strip()
