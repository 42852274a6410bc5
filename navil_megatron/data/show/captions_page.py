"""What a model says of held-out pictures, as a page and as text."""

from collections.abc import Sequence

from PIL import Image

from navil_megatron.files.html_page import address_of, render_page

_STYLE = """
.samples { display: flex; flex-wrap: wrap; gap: 1rem } article { width: 20rem } article img { max-width: 100% }
.about { color: #666; font-size: .85rem } p { white-space: pre-wrap; unicode-bidi: plaintext; margin: .4rem 0 }
"""

_BODY = """
<div class="samples">
{% for name, wanted, said, picture in samples %}
<article>
<img src="{{ address_of(picture) }}" alt="">
<p>{{ said }}</p><p class="about">{{ wanted }}</p><p class="about">{{ name }}</p>
</article>
{% endfor %}
</div>
"""


def render_captions(
    title: str, names: Sequence[str], wanted: Sequence[str], said: Sequence[str], pictures: Sequence[Image.Image]
) -> str:
    """The HTML: each picture with what was said, and below, in grey, what the sample says."""
    samples = list(zip(names, wanted, said, pictures, strict=True))
    return render_page(title, _STYLE, _BODY, {"samples": samples, "address_of": address_of})


def captions_text(names: Sequence[str], wanted: Sequence[str], said: Sequence[str]) -> str:
    """The same for a terminal."""
    return "".join(
        f"{name}\n  said    {' '.join(found.split())}\n  sample  {' '.join(text.split())}\n"
        for name, text, found in zip(names, wanted, said, strict=True)
    )
