"""From the answers of all ranks to one line: who waits where, and who did not arrive.

A collective does not tell who is missing. But a rank that has begun fewer collectives of a group than another one waits
in is waited for. Where the answers do not show who is missing, nobody is named.
"""

from collections.abc import Mapping

from navil_megatron.runtime.whereabouts import Whereabouts

_MOST_RANKS = 16  # ranks that the line describes one by one

type Answers = Mapping[int, Whereabouts | str]
"""By rank; words where no answer came."""


def missing_ranks(answers: Answers) -> list[int]:
    """The ranks that did not arrive; empty: the answers do not tell.

    Returns:
        Ranks without an answer; else ranks that others wait for in a collective and that do not wait themselves; else
        ranks that do not wait; else (they wait for one another) those that others wait for and that are in a later
        step.
    """
    present = {rank: answer for rank, answer in answers.items() if isinstance(answer, Whereabouts)}
    if len(present) < len(answers):
        return [rank for rank in answers if rank not in present]
    awaited = set().union(*(awaited_by(answer, present) for answer in present.values()))
    idle = {rank for rank, answer in present.items() if not answer.operation}
    if len(idle) == len(present):
        return []
    first = min(answer.step for answer in present.values())
    return sorted(awaited & idle or idle or {rank for rank in awaited if present[rank].step > first})


def awaited_by(answer: Whereabouts, answers: Mapping[int, Whereabouts]) -> set[int]:
    """Ranks that have not begun the collective that this one waits in."""
    return {rank for rank, other in answers.items() if other.begun.get(answer.group, answer.number) < answer.number}


def hang_line(answers: Answers, asked_by: int, stacks: str) -> str:
    """The line that a run ends with, from the answers of all ranks to one of them, and the place of the stacks."""
    missing = missing_ranks(answers)
    present = {rank: answer for rank, answer in answers.items() if isinstance(answer, Whereabouts)}

    def tells_less(rank: int) -> tuple[bool, bool, int, int]:
        """The rank that tells most waits for a missing one itself, not for a rank that waits for it."""
        answer = present[rank]
        return awaited_by(answer, present).isdisjoint(missing), not answer.operation, answer.step, rank

    teller = present[min((rank for rank in present if rank not in missing), key=tells_less, default=asked_by)]
    line = f"error: step {teller.step} {'broke off' if teller.is_cut_off else 'hung'}: {teller}"
    others = [str(answers[rank]) for rank in missing or answers if rank != teller.rank]
    if others:
        said = "did not arrive" if missing else "who did not arrive is not known, the others"
        line += f"; {said}: {', '.join(others[:_MOST_RANKS])}"
    if len(others) > _MOST_RANKS:
        line += f" and {len(others) - _MOST_RANKS} more"
    return f"{line}; stacks: {stacks}"
