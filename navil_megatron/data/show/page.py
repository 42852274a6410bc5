"""Packed rows as a page: bars of tokens, images at every scale with their grid, texts in any script."""

from collections.abc import Sequence

from navil_megatron.data.show.rows import WEIGHT_COLOUR, ShownRow, size_on_page
from navil_megatron.data.show.tokens import KINDS, TokenKind
from navil_megatron.files.html_page import address_of, render_page

_STYLE = """
.about { color: #666 } .failed { color: #b3261e }
.shares { display: flex; height: 1.1rem; border-radius: 6px; overflow: hidden; margin: .6rem 0 }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .85rem; margin: 0 0 .9rem; padding: 0 }
.legend i, figcaption i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em }
.line { position: relative; padding-top: 15px; margin-bottom: 4px } .line img { display: block }
.line a { position: absolute; top: 0; height: 15px; border-left: 1px solid #1c1c1c; padding-left: 3px;
  font: 11px/13px system-ui, sans-serif; color: #1c1c1c; background: #fff; text-decoration: none }
.samples { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem }
.samples article { max-width: 100%; box-sizing: border-box; min-width: 17rem } article:target { border-color: #1c1c1c }
.number { background: #1c1c1c; color: #fff; border-radius: 4px; padding: 0 .4em; margin-right: .3em }
.images { display: flex; flex-wrap: wrap; align-items: end; gap: .6rem; margin: .6rem 0 }
.images hr { width: 100%; border: 0; margin: 0 }
figure { margin: 0 } figcaption { font-size: .75rem; line-height: 1.3; color: #666 }
.grid { position: relative; line-height: 0 } .grid img { width: 100%; height: 100% }
.grid::after { content: ""; position: absolute; inset: 0; background-image:
  linear-gradient(90deg, #fff8 1px, #0000 1px), linear-gradient(#fff8 1px, #0000 1px); background-size: var(--block) }
.text { margin: .3rem 0 0; max-width: 46rem; max-height: 22rem; overflow: auto; white-space: pre-wrap; color: #4a5672;
  unicode-bidi: plaintext }
mark { background: #d3f0e1; color: #0e5c3b; border-radius: 2px }
.text b { font: 600 .72rem/1 ui-monospace, monospace; color: #666; background: #eef0f4; border-radius: 3px;
  padding: .1em .3em; margin: 0 .1em; unicode-bidi: isolate } .text mark b { color: #0e5c3b; background: #b6e3cc }
"""

_BODY = """
{% for note in notes %}<p class="failed">{{ note }}</p>{% endfor %}
{% for row in rows %}
<h2>{{ row.title }}</h2>
<p class="about">{{ row.cost }}</p>
<div class="shares">
{% for kind, count in row.counts.items() %}
<i style="flex: {{ count }}; background: rgb{{ kinds[kind][1] }}" title="{{ kinds[kind][0] }}: {{ count }}"></i>
{% endfor %}
</div>
<p class="legend">
{% for kind, count in row.counts.items() %}
<span><i style="background: rgb{{ kinds[kind][1] }}"></i>{{ kinds[kind][0] }} <b>{{ "{:,}".format(count) }}</b></span>
{% endfor %}
<span><i style="background: rgb{{ weight_colour }}"></i>loss weight of the next token</span>
</p>
{% for cells, marks in row.lines %}
<div class="line">
{% for x, number in marks %}
<a href="#sample{{ number }}" style="left: {{ x }}px">{{ number }}</a>
{% endfor %}
<img src="{{ address_of(cells, "PNG") }}" alt="">
</div>
{% endfor %}
<div class="samples">
{% for sample in row.samples %}
<article id="sample{{ sample.number }}">
<b class="number">{{ sample.number }}</b> {{ sample.name }}
<span class="about">{{ "{:,} tokens, {:,} learned".format(sample.num_tokens, sample.num_learned) }}</span>
{% if sample.images %}
<div class="images">
{% for image in sample.images %}
{% if not loop.first %}<hr>{% endif %}
{% for scale in image %}
{% set width, height = size_on_page(scale, image[-1]) %}
{% set across, down = scale.width // block, scale.height // block %}
<figure>
<div class="grid" style="width: {{ width }}px; height: {{ height }}px;
--block: {{ width / across }}px {{ height / down }}px"><img src="{{ address_of(scale) }}" alt=""></div>
<figcaption><i style="background: rgb{{ kinds[[scales[0] + loop.index0, scales[-1]] | min][1] }}"></i>
{{- scale.width }} × {{ scale.height }}<br>{{ across }} × {{ down }} tokens</figcaption>
</figure>
{% endfor %}
{% endfor %}
</div>
{% endif %}
<p class="text">
{%- for run in sample.texts -%}
{% if run.is_learned %}<mark>{% endif %}
{%- if run.is_mark %}<b dir="ltr">{{ run.text }}</b>{% else %}{{ run.text }}{% endif %}
{%- if run.is_learned %}</mark>{% endif %}
{%- endfor -%}
</p>
</article>
{% endfor %}
</div>
{% endfor %}
"""


def render_rows(rows: Sequence[ShownRow], title: str, merge_block: int, notes: Sequence[str] = ()) -> str:
    """The HTML of some rows; ``merge_block`` is the side, in pixels, of what one visual token stands for."""
    told = {"rows": rows, "notes": notes, "block": merge_block, "kinds": KINDS, "weight_colour": WEIGHT_COLOUR}
    scales = range(TokenKind.FIRST_SCALE, TokenKind.LAST_SCALE + 1)
    drawn = {"scales": scales, "address_of": address_of, "size_on_page": size_on_page}
    return render_page(title, _STYLE, _BODY, told | drawn)
