"""A page that is one file, with its pictures inside, so that it can be mailed and kept."""

import base64
import io
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment
from PIL import Image

_FRAME = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c1c1c }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
article { border: 1px solid #d5d5d5; border-radius: 6px; padding: .8rem; overflow-wrap: anywhere }
@STYLE@
</style>
<h1>{{ title }}</h1>
@BODY@
</html>
"""


def render_page(title: str, style: str, body: str, values: Mapping[str, Any]) -> str:
    """The HTML of a page: ``style`` is CSS of its own, ``body`` Jinja that ``values`` fill, escaped."""
    page = _FRAME.replace("@STYLE@", style.strip()).replace("@BODY@", body.strip())
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(page).render(values, title=title)
    )


def address_of(picture: Image.Image, kind: str = "JPEG") -> str:
    """A picture as an address that holds it."""
    content = io.BytesIO()
    picture.save(content, kind, quality=80)  # of a JPEG; a PNG loses nothing
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
