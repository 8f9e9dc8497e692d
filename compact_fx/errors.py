"""What can go wrong, as types a caller can catch."""


class CannotCompact(RuntimeError):
    """A graph that the passes cannot handle; it is compiled untouched unless `strict=True`."""
