"""Cross-references of docstrings, such as a class role before a name, as links of the site."""

import re

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):<code>(~?)([\w.]+)</code>")


def on_page_content(html: str, **_: object) -> str:
    """Of each page: a link where the name has a page, its last part in code where it has none."""
    return _ROLE.sub(_link, html)


def _link(match: re.Match[str]) -> str:
    short, name = match.groups()
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{name}"><code>{shown}</code></autoref>'
