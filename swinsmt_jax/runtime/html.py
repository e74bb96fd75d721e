"""Self-contained HTML pages from the templates of this package."""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """Fill a template; text in `values` is escaped."""
    return TEMPLATES.get_template(template).render(values)


def png(figure: Figure, **options: Any) -> str:
    """Return a figure as the address of an image; `options` as of `savefig`."""
    file = io.BytesIO()
    figure.savefig(file, format="png", **options)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
