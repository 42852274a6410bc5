"""``navil-megatron report``: what a run cost."""

from argparse import Namespace

from navil_megatron.config.errors import UserError
from navil_megatron.verbs.arguments import value
from navil_megatron.verbs.verb import Outcome, verb


@verb(
    "report",
    "tell what a run cost: steps, restarts, lost steps, waits by cause, the slowest rank",
    "navil-megatron report runs/a/logs",
    value("run", "RUN", "its logging.directory"),
)
def report(options: Namespace) -> Outcome:
    """Adds up the records of a run."""
    from navil_megatron.runtime.run_time import METRICS_FILE, read_run_time

    found = read_run_time(options.run)
    if found.first_start is None:
        raise UserError(f"{options.run / METRICS_FILE} holds no record of a start; give the logging.directory of a run")
    wall = found.last_time - found.first_start
    content = {
        "steps": found.step,
        "skipped_steps": found.skipped_steps,
        "restarts": found.num_starts - 1,
        "lost_steps": found.lost_steps,
        "wall_seconds": wall,
        "useful_seconds": found.useful_seconds,
        "goodput": found.goodput(found.last_time),
        "seconds_by_cause": dict(found.seconds),
        "slowest_rank_records": {str(rank): records for rank, records in found.slowest.most_common()},
    }
    lines = [
        f"{found.step} steps, {found.skipped_steps} of them refused; {found.num_starts - 1} restarts, "
        f"{found.lost_steps} steps made again",
        f"{wall:,.1f} s from the first start to the last record, {found.useful_seconds:,.1f} s useful: "
        f"goodput {content['goodput']:.1%}",
        *(f"{seconds:,.1f} s {cause}" for cause, seconds in sorted(found.seconds.items(), key=lambda pair: -pair[1])),
    ]
    if found.slowest:
        rank, records = found.slowest.most_common(1)[0]
        lines.append(f"rank {rank} was the slowest in {records} of {found.slowest.total()} records")
    return Outcome(content, "\n".join(lines))
