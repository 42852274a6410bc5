"""Exact scores of what ``navil-megatron evaluate`` left behind, by kind of question."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

CAPTION = "caption"


def score_by_kind(data: Path, output: Path) -> dict[str, dict[str, Any]]:
    """Kind -> share of answers that are letter by letter right, how many there are, and what blind guessing reaches.

    Args:
        data: The set; the id of a row begins with its kind.
        output: What ``evaluate`` was told with ``--output``.
    """
    found = {row["id"]: row["text"] for row in _rows(output / "predictions.jsonl")}
    right: dict[str, list[bool]] = {}
    truth: dict[str, Counter[str]] = {}
    for row in _rows(data):
        kind = row["id"].rsplit("-", 1)[0]
        right.setdefault(kind, []).append(found[row["id"]] == row["answers"][0])
        truth.setdefault(kind, Counter())[row["answers"][0]] += 1
    return {
        kind: {
            "num": len(judged),
            "exact": sum(judged) / len(judged),
            "most_frequent_answer": truth[kind].most_common(1)[0][1] / len(judged),
        }
        for kind, judged in right.items()
    }


def captions_only(data: Path, target: Path) -> None:
    """The captions of a set, for phases that have not seen turns."""
    target.write_text("".join(json.dumps(row) + "\n" for row in _rows(data) if row["id"].startswith(CAPTION)))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
