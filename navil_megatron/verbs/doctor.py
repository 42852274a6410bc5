"""``navil-megatron doctor``: what is installed here, and what to mend."""

from argparse import Namespace

from navil_megatron.verbs.verb import Outcome, verb


@verb(
    "doctor", "show versions and GPUs, what is missing or wrong, and the line that installs it", "navil-megatron doctor"
)
def doctor(options: Namespace) -> Outcome:
    """The checks; 1 if something must be mended before a run."""
    from navil_megatron.doctor import as_json, as_table, diagnose

    checks = diagnose()
    return Outcome(as_json(checks), as_table(checks), int(any(check.is_problem for check in checks)))
