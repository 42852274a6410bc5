"""The ``navil-megatron evaluate`` verb: its options, and what it reports.

Nothing heavy is imported until it runs.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import UserError

Outcome = tuple[dict[str, Any], str, int]
"""Report, its text for a terminal, and the exit status."""
_SCORERS = ("pycocoevalcap", "nltk", "sacrebleu", "rapidfuzz")


def add_evaluate_verb(add_verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the verb; ``add_verb(name, run, what, example)`` makes its parser."""
    parser = add_verb(
        "evaluate",
        run_evaluate,
        "score an exported model on local questions and captions, and show the worst; runs the code in the folder",
        "navil-megatron evaluate exported/ questions.jsonl --output runs/a/evaluation",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what convert to-hf wrote; must be trusted")
    parser.add_argument(
        "data",
        type=Path,
        metavar="DATA.jsonl",
        help='JSON lines of {"image": path or list, "question": text or none, "answers": list}; see docs/evaluation.md',
    )
    parser.add_argument(
        "--output", type=Path, default=Path("evaluation"), metavar="FOLDER", help="of answers and page (evaluation)"
    )
    parser.add_argument("--max-new-tokens", type=_count, default=64, metavar="N", help="longest answer (64)")
    parser.add_argument("--batch-size", type=_count, default=8, metavar="N", help="samples at a time (8)")
    parser.add_argument(
        "--prompts",
        choices=("auto", "plain", "chat"),
        default="auto",
        help="ask in a user's turn or not (auto: questions, where the folder has a chat template)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="type of the weights (as stored)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (cpu)")
    parser.add_argument("--worst", type=_count, default=24, metavar="N", help="samples of each task on the page (24)")


def run_evaluate(options: argparse.Namespace, on_progress: Callable[[int, int], None]) -> Outcome:
    """Answers, scores, and says how good it was."""
    missing = [name for name in _SCORERS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"scores need {', '.join(missing)}: pip install 'navil_megatron[evaluate]'")
    from navil_megatron.evaluation.evaluate import Settings, evaluate
    from navil_megatron.evaluation.worst_page import describe_scores

    settings = Settings(
        max_new_tokens=options.max_new_tokens,
        prompts=options.prompts,
        dtype=options.dtype,
        batch_size=options.batch_size,
        device=options.device,
        num_worst=options.worst,
    )
    report = evaluate(options.folder, options.data, options.output, settings, on_progress)
    lines = [
        f"{report['num_answered']} of {report['num_samples']} samples answered",
        *describe_scores(report["scores"]),
        *(f"left out: {one['id']}: {one['reason']}" for one in report["damaged"]),
        f"answers: {report['predictions']}",
        f"the worst: {report['page']}",
    ]
    return report, "\n".join(lines), 0


def _count(text: str) -> int:
    """A whole number from 1 up, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {number}, expected at least 1")
    return number
