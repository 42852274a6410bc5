"""From the answers of all ranks to one line: who waits where, and who did not arrive.

Nobody can ask a collective who is missing. But every rank counts what it began in each process group, so a rank that
is behind another in a group of both is one that the other waits for.
"""

from collections.abc import Collection, Mapping

from navil_megatron.runtime.whereabouts import Whereabouts

_MOST_RANKS = 16
"""Ranks that the line describes one by one."""

_PHASES = {
    "start": "before the first step",
    "data": "waiting for data",
    "step": "between microbatches",
    "gradients": "in the sums of gradients",
    "update": "in the update",
    "evaluation": "in evaluation",
    "save": "in a checkpoint save",
}


type Answers = Mapping[int, Whereabouts | None]


def missing_ranks(answers: Answers, left: Collection[int], asked_by: int) -> list[int]:
    """The ranks that did not arrive.

    Args:
        answers: By rank; ``None`` where no answer came.
        left: Ranks that said that they stop.
        asked_by: The rank that waited too long.

    Returns:
        Ranks that are gone or stopped; else ranks that are elsewhere than in a wait for others; else (they wait for one
        another, in different collectives) those that the earliest rank waits for.
    """
    gone = [rank for rank, answer in answers.items() if answer is None or rank in left]
    if gone:
        return gone
    present = {rank: answer for rank, answer in answers.items() if answer is not None}
    elsewhere = [rank for rank, answer in present.items() if not answer.operation and not _behind(answer, present)]
    if elsewhere and len(elsewhere) < len(present):
        return elsewhere
    for answer in sorted(present.values(), key=_time):
        behind = _behind(answer, present)
        if behind:
            return behind
    return [rank for rank in present if rank != asked_by]


def _behind(answer: Whereabouts, answers: Mapping[int, Whereabouts]) -> list[int]:
    """Ranks that have begun fewer collectives in a group that they share with this one."""
    return [rank for rank, other in answers.items() if _ahead_in(answer, other)]


def _ahead_in(answer: Whereabouts, other: Whereabouts | None) -> str:
    """A group in which a rank has begun more collectives than another; empty: none."""
    if other is None:
        return ""
    ahead = (group for group, count in answer.counts.items() if other.counts.get(group, count) < count)
    return next(ahead, "")


def _time(answer: Whereabouts) -> tuple[int, bool, int]:
    """Orders ranks by how far they are in the loop."""
    return answer.step, answer.phase in ("update", "evaluation", "save"), answer.rank


def hang_line(
    answers: Answers,
    left: Collection[int],
    stages: Mapping[int, int],
    asked_by: int,
    stacks: str,
) -> str:
    """The line that a run ends with.

    Args:
        answers: By rank; ``None`` where no answer came.
        left: Ranks that said that they stop.
        stages: Pipeline stage of each rank.
        asked_by: The rank that waited too long.
        stacks: Where the stacks are.
    """
    missing = missing_ranks(answers, left, asked_by)
    waiting = [answer for rank, answer in answers.items() if answer is not None and rank not in missing]
    # The rank that tells most waits for the missing ones itself, not for a rank that waits for them.
    groups = {
        answer.rank: next(filter(None, (_ahead_in(answer, answers[r]) for r in missing)), "") for answer in waiting
    }
    asking = answers[asked_by]
    teller = min(
        waiting, key=lambda answer: (not groups[answer.rank], not answer.operation, _time(answer)), default=asking
    )
    assert teller is not None
    ends = "broke off" if teller.cut_off else "hung"
    doing = _doing(teller, groups.get(teller.rank, "").rpartition(" ")[0])
    line = f"error: step {teller.step} {ends}: rank {teller.rank} ({_describe(teller)}) {doing}"
    others = [rank for rank in missing if rank != teller.rank]
    if others:
        line += f"; did not arrive: {_list(others, answers, left, stages)}"
    return f"{line}; stacks: {stacks}"


def _doing(answer: Whereabouts, group: str) -> str:
    where = answer.operation or answer.place or "code that is not ours"
    where += f" ({group})" if group and group not in where else ""
    if answer.cut_off:
        return f"lost its connections in {where}"
    return f"has {'waited' if answer.operation else 'not moved for'} {answer.stalled_seconds:.0f} s in {where}"


def _list(
    ranks: Collection[int],
    answers: Answers,
    left: Collection[int],
    stages: Mapping[int, int],
) -> str:
    told = []
    for rank in sorted(ranks)[:_MOST_RANKS]:
        answer = answers[rank]
        if rank in left:
            told.append(f"rank {rank} (pipeline stage {stages[rank]}, it ended with an error of its own)")
        elif answer is None:
            told.append(f"rank {rank} (pipeline stage {stages[rank]}, its process is gone or stopped)")
        else:
            where = answer.operation or answer.place or "code that is not ours"
            told.append(f"rank {rank} (step {answer.step}, {_describe(answer)}, in {where})")
    more = len(ranks) - len(told)
    return ", ".join(told) + (f" and {more} more" if more else "")


def _describe(answer: Whereabouts) -> str:
    """Stage, part of the step and module."""
    where = _PHASES[answer.phase]
    if answer.microbatch:
        where = f"{answer.direction} of microbatch {answer.microbatch}"
        where += "" if answer.phase == "step" else f" {_PHASES[answer.phase]}"
    return f"pipeline stage {answer.stage}, {where}, " + (
        f"module {answer.module}" if answer.module else "outside the modules"
    )
