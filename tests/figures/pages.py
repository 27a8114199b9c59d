"""What a real parser of HTML finds in a page."""

from collections import Counter
from html.parser import HTMLParser

_LINKS = ("href", "src", "xlink:href", "action", "background", "poster", "data", "srcset")


def active_parts(page: str) -> tuple[Counter, list[str]]:
    """(number of each tag, addresses that the page leads to); fails on attributes that run scripts."""
    tags, links = Counter(), []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags[tag] += 1
            for name, value in attributes:
                assert not name.startswith("on"), f"<{tag} {name}={value}>"
                if name in _LINKS:
                    links.append(value or "")

    parser = Parser(convert_charrefs=True)
    parser.feed(page)
    parser.close()
    return tags, links
