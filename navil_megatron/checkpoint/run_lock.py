"""A run's folders have one owner: a second start would mix its checkpoints and records with those of the first."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.files.lock import LOCK, owned
from navil_megatron.runtime.session import Session


@contextmanager
def owned_run(config: NaViLConfig, session: Session) -> Iterator[None]:
    """Rank 0 owns the folders of the run until the block ends; every rank calls it at the same point.

    Raises:
        UserError: Another run owns one of them, or they cannot be written.
    """
    with ExitStack() as owning:
        session.together(lambda: _own(config, owning) if session.is_main else None)
        yield


def _own(config: NaViLConfig, owning: ExitStack) -> None:
    named = {"checkpoint.directory": config.checkpoint.directory, "logging.directory": config.logging.directory}
    for folder, name in {Path(folder).resolve(): name for name, folder in named.items()}.items():
        try:
            remedy = f"wait for it, stop it, or give this run another {name}"
            owning.enter_context(owned(folder / LOCK, f"{name} {folder}", remedy))
        except OSError as error:
            raise UserError(f"{name} {folder} cannot be written ({error}); mend that, or give another folder") from None
