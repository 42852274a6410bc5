"""A page of the samples that a model did worst on: pictures, question, what was expected and what came."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from navil_megatron.evaluation.scores import Scored
from navil_megatron.files.html_page import address_of, render_page
from navil_megatron.hf.generate import open_picture

_THUMBNAIL_SIDE = 240
_MAX_PICTURES = 4  # of one sample; further ones are counted
_NAMES = {"cider": "CIDEr", "bleu": "BLEU", "anls": "ANLS"}
_TITLES = {"caption": "Captions", "qa": "Answers"}

_STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }
img { max-width: 100%; background: #eee; margin: 0 .3rem .3rem 0 }
dl { margin: .3rem 0 0; display: grid; grid-template-columns: auto 1fr; gap: .2rem .7rem }
dt { color: #666 } dd { margin: 0; white-space: pre-wrap; unicode-bidi: plaintext } .found { font-weight: 600 }
footer { color: #666; font-size: .85rem; margin-top: .5rem }
"""
_BODY = """
{% for task in tasks %}
<h2>{{ task.title }}: {{ task.summary }}</h2>
<p>The worst {{ task.cases|length }} of {{ task.num }}.</p>
<div class="cards">
{% for case in task.cases %}
<article>
{% for source in case.pictures %}<img src="{{ source }}" alt="">{% endfor %}
{% if case.num_more %}<p>and {{ case.num_more }} more pictures</p>{% endif %}
<dl>
{% if case.question %}<dt>question</dt><dd>{{ case.question }}</dd>{% endif %}
<dt>expected</dt><dd>{{ case.expected }}</dd>
<dt>found</dt><dd class="found">{{ case.found or "(nothing)" }}</dd>
<dt>score</dt><dd>{{ case.points }}</dd>
</dl>
<footer>{{ case.id }}</footer>
</article>
{% endfor %}
</div>
{% endfor %}
"""


def write_worst_page(
    path: Path, scored: Sequence[Scored], scores: Mapping[str, Mapping[str, Any]], num_worst: int, title: str
) -> None:
    """Writes the page; equal scores stay in the order of the set."""
    tasks = []
    for task, values in scores.items():
        worst = sorted((one for one in scored if one.sample.task == task), key=lambda one: one.rank)[:num_worst]
        tasks.append(
            {"title": _TITLES[task], "summary": _points(values), "num": values["num"], "cases": list(map(_case, worst))}
        )
    path.write_text(render_page(title, _STYLE, _BODY, {"tasks": tasks}), encoding="utf-8")


def describe_scores(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each task."""
    return [f"{_TITLES[task].lower()} ({values['num']}): {_points(values)}" for task, values in scores.items()]


def _case(one: Scored) -> dict[str, Any]:
    sample = one.sample
    return {
        "id": sample.id,
        "pictures": [_thumbnail(path) for path in sample.images[:_MAX_PICTURES]],
        "num_more": max(0, len(sample.images) - _MAX_PICTURES),
        "question": sample.question,
        "expected": "\n".join(dict.fromkeys(sample.answers)),
        "found": one.text,
        "points": _points(one.points),
    }


def _points(points: Mapping[str, float]) -> str:
    shown = {_NAMES.get(name, name.replace("_", " ")): value for name, value in points.items() if name != "num"}
    return ", ".join(f"{name} {value:.1f}" for name, value in shown.items())


def _thumbnail(path: Path) -> str:
    picture = open_picture(path)
    picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    return address_of(picture)
