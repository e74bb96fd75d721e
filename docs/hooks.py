"""On the site, links that leave docs/ (figures, scripts) become plain paths."""

import re

LINK = r"(?<!!)\[([^\]]*)\]\(\.\./([^)]+)\)"
IN_PARENTHESES = re.compile(rf"([(]|[,;] ){LINK}\)")
LEAVES_DOCS = re.compile(LINK)


def on_page_markdown(markdown, **_):
    """Replace `[text](../path)` by the text and the path in the repository."""
    markdown = IN_PARENTHESES.sub(r"\1\2: `\3`)", markdown)
    return LEAVES_DOCS.sub(r"\1 (`\2`)", markdown)
