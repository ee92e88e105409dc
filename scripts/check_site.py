"""Check that the pages of a built site load nothing from the network: python scripts/check_site.py site"""

import re
import sys
from pathlib import Path

LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//[^"'\s>]+|"""
    r"""<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon))[^>]*\bhref=["']?(?:https?:)?//[^"'\s>]+"""
)


def loaded_from_the_network(page: str) -> list[str]:
    """Return the elements of a page that load a file from another host; links to click are not among them.

    >>> loaded_from_the_network('<script src="https://a.b/c.js"></script><a href="https://a.b">a</a><img src="d.png">')
    ['<script src="https://a.b/c.js']
    """
    return LOADED.findall(page)


def main() -> int:
    pages = sorted(Path(sys.argv[1]).rglob("*.html"))
    found = [(page, element) for page in pages for element in loaded_from_the_network(page.read_text())]
    for page, element in found:
        print(f"{page}: loads a file from the network: {element}", file=sys.stderr)
    if not pages:
        print(f"{sys.argv[1]} has no pages: build the site first (make docs)", file=sys.stderr)
    return 1 if found or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
