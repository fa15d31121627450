"""Fails if a page of the built site would load anything from the network: `python offline.py build/docs/html`."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

LOADING = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "object": "data",
    "image": "href",
}
STYLE = re.compile(r"url\(\s*['\"]?(?:https?:)?//|@import\s+['\"]?(?:https?:)?//")


class Loads(HTMLParser):
    """Addresses outside of the site that a page loads when it is opened; links to follow are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {k: v or "" for k, v in attributes}
        rel = given.get("rel", "")
        at = given.get(LOADING.get(tag, ""), "")
        if tag == "link" and re.search("stylesheet|icon|preload|preconnect|prefetch", rel):
            at = given.get("href", "")
        if re.match(r"(https?:)?//", at):
            self.found.append(f"<{tag}> {at}")


def loads(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".css":
        return STYLE.findall(text)
    parser = Loads()
    parser.feed(text)
    return parser.found + STYLE.findall(text)


def main(site: str) -> int:
    pages = [p for kind in ("*.html", "*.css") for p in Path(site).rglob(kind)]
    bad = [f"{page}: {what}" for page in pages for what in loads(page)]
    sys.stdout.write("\n".join([*bad, f"{len(pages)} files, {len(bad)} load from outside"]) + "\n")
    return bool(bad) or not pages


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
