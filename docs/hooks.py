"""On the site, links that leave docs/ (figures, scripts) become plain paths."""

import re

LEAVES_DOCS = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown, **_):
    """Replace `[text](../path)` by the text and the path in the repository."""
    return LEAVES_DOCS.sub(r"\1 (`\2`)", markdown)
