"""What can go wrong, as types a caller can catch."""

import contextlib
import logging
from collections.abc import Iterator

log = logging.getLogger(__name__)


class CannotCompact(RuntimeError):
    """A graph that the passes cannot handle; it is compiled untouched unless `strict=True`."""


class SiteFailed(CannotCompact):
    """A weight that a pass fails for; the graph is planned again without it.

    Attributes:
        weight: its qualified name.
    """

    def __init__(self, message: str, weight: str) -> None:
        super().__init__(message)
        self.weight = weight


class BudgetTooSmall(CannotCompact):
    """A `memory_budget` that no treatment of a graph reaches; raised whatever `strict` says."""


@contextlib.contextmanager
def failures_of(pass_name: str, weight: str | None = None) -> Iterator[None]:
    """The one place where a failure in a pass gets its name; its traceback goes to the log."""
    try:
        yield
    except CannotCompact:
        raise
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        message = f"{type(error).__name__} in {pass_name}: {first_line}"
        log.info("%s%s", message, f" (weight {weight})" if weight else "", exc_info=True)
        if weight is None:
            raise CannotCompact(message) from error
        raise SiteFailed(message, weight) from error
