"""What can go wrong, as types a caller can catch, and how a person is warned."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

import torch

log = logging.getLogger(__name__)
_INSIDE = (
    *(os.path.dirname(file) + os.sep for file in (torch.__file__, __file__)),
    "<string>",  # what a dataclass begins with
)


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
    """A `memory_budget` that no treatment of a graph reaches; raised whatever `strict` says.

    From a compiled call it comes as `inner_exception` of torch's `BackendCompilerFailed`.

    Attributes:
        smallest: bytes of activations at the peak of the graph that can be reached.
        share: that, of what they take with torch.compile; what `memory_budget` has to be at least.
    """

    def __init__(self, message: str, smallest: int, share: float) -> None:
        super().__init__(message)
        self.smallest = smallest
        self.share = share


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


def warn_at_caller(text: str) -> None:
    """Warn at the person's line: neither within this package nor in torch, which may be between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
