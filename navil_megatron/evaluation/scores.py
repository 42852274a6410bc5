"""The scores of a set, task by task, and of each of its samples.

Everything is in points: 100 times the fraction, so an exact match is 100.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from navil_megatron.evaluation.answer_scores import anls, exact_match, relaxed_accuracy
from navil_megatron.evaluation.caption_scores import score_captions
from navil_megatron.evaluation.samples import Sample

QUESTION_SCORES = {"exact_match": exact_match, "anls": anls, "relaxed_accuracy": relaxed_accuracy}


@dataclass(frozen=True)
class Scored:
    """A sample, what the model answered, and how good that is."""

    sample: Sample
    text: str
    points: dict[str, float] = field(default_factory=dict)

    @property
    def rank(self) -> float:
        """What the worst are sorted by: the mean of the sample's scores."""
        return sum(self.points.values()) / max(1, len(self.points))


def score(answers: Sequence[Scored]) -> tuple[list[Scored], dict[str, dict[str, Any]]]:
    """The answers with their points, and the scores by task; a task without samples is left out."""
    scores: dict[str, dict[str, Any]] = {}
    scored: list[Scored] = []
    captions = [answer for answer in answers if answer.sample.task == "caption"]
    questions = [answer for answer in answers if answer.sample.task == "qa"]
    if captions:
        found = score_captions([one.text for one in captions], [one.sample.answers for one in captions])
        scores["caption"] = {"num": len(captions), "cider": found.cider, "bleu": found.bleu}
        scored += [replace(one, points={"cider": cider}) for one, cider in zip(captions, found.ciders, strict=True)]
    if questions:
        judges = QUESTION_SCORES.items()
        judged = [
            replace(one, points={name: 100 * judge(one.text, one.sample.answers) for name, judge in judges})
            for one in questions
        ]
        means = {name: sum(one.points[name] for one in judged) / len(judged) for name in QUESTION_SCORES}
        scores["qa"] = {"num": len(judged), **means}
        scored += judged
    return scored, scores
