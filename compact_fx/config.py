"""The one configuration object."""

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from compact_fx.errors import warn_at_caller
from compact_fx.projections import KINDS, Kind

Rank = float | int
Place = Literal["auto", "early", "late"]
Inner = Literal["inductor", "aot_eager"]
Storage = Literal["keep", "int8", "fp8"]


@dataclass(frozen=True, kw_only=True)
class CompactConfig:
    """Settings of a compact backend; see `compact_backend`.

    Attributes:
        rank: columns of a sketch. A float in (0, 1] is a fraction of each weight's in_features,
            an int ≥ 1 an absolute rank; a mapping of name pattern → either gives the first match,
            and weights that match none are left alone.
        gradients: "sketched" gives every weight a `SketchedGrad` that holds the
            (out_features, rank) factor: for `CompactAdamW` or `compact_optimizer`. "dense" gives
            it a `.grad` of its own shape, for any optimizer; costs 5 to 10 % of the loss.
        projection: "tracked" follows the gradient; None is this for sketched gradients and
            "countsketch" for dense ones. The others are random: "countsketch" (its products are
            gathers, not matmuls), "gaussian" (the paper's), "rademacher", "sparse" or
            "orthogonal"; see `random_projection`.
        update_interval: optimizer steps after which a weight's projection changes (T in the
            paper); None is 40 for tracked projections and 200 for others.
        track_every: a tracked projection sees every so many tokens.
        follow: share of a tracked projection's columns that follow the gradient; the others
            explore, drawn anew at each change.
        seed: of all projections; the same seed and steps give the same run.
        include: glob patterns of the qualified parameter names that may be sketched.
        exclude: glob patterns of those that may not; wins over `include`.
        min_features: weights with fewer in_features are left alone.
        sketch_heads: sketch heads over a vocabulary as well: weights of the shape of an embedding
            in the same graph, with more words than features. It saves their gradients and moments,
            and costs 3 to 4 % of the loss where the
            head learns faster than the blocks (60M parameters, 16,384 words).
        recompute: let the partitioner rebuild matmul inputs in the backward pass from what other
            operators keep anyway; exact, and costs about half a percent of a step.
        saved: "int8" or "fp8" stores large values that cross in 8 bits, with a scale for each 128
            neighbours, and masks in single ones; "keep" as they are.
        memory_budget: the most that activations may take at the peak of a graph: a float in (0, 1]
            is a share of what they take with torch.compile, an int bytes. The cheapest treatment
            that is predicted to reach it (as torch cuts, `recompute`, `saved="int8"` with it)
            takes the place of `recompute` and `saved`; `BudgetTooSmall` is raised if none is.
        place: where sketches are taken. "auto" takes them in the forward pass where that makes an
            activation unnecessary and in the backward pass where the activation is there anyway.
        inner: "inductor", or "aot_eager" to run the same graphs without code generation.
        mode: of torch.compile, such as "reduce-overhead"; goes to Inductor.
        options: Inductor's own options.
        keep_graphs: keep the graphs before and after in `backend.graphs`, to read them.
        strict: raise `CannotCompact` instead of compiling a graph untouched with a warning.
    """

    rank: Rank | Mapping[str, Rank] = 0.25
    gradients: Literal["dense", "sketched"] = "sketched"
    projection: Kind | None = None
    update_interval: int | None = None
    track_every: int = 8
    follow: float = 0.25
    seed: int = 0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    min_features: int = 32
    sketch_heads: bool = False
    recompute: bool = True
    saved: Storage = "keep"
    memory_budget: float | int | None = None
    place: Place = "auto"
    inner: Inner = "inductor"
    mode: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    keep_graphs: bool = field(default=False, repr=False)  # decides nothing: not in cache keys
    strict: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, Mapping):
            object.__setattr__(self, "rank", dict(self.rank))
            for pattern, rank in self.rank.items():
                _check_type("rank pattern", pattern, str)
                _check_rank(f"rank[{pattern!r}]", rank)
        else:
            _check_rank("rank", self.rank)
        _check_choice("gradients", self.gradients, ("dense", "sketched"))
        if self.projection is not None:
            _check_choice("projection", self.projection, KINDS)
        _check_choice("saved", self.saved, get_args(Storage))
        _check_choice("place", self.place, get_args(Place))
        _check_choice("inner", self.inner, get_args(Inner))
        if self.update_interval is not None:
            _check_int("update_interval", self.update_interval, 1)
        _check_int("track_every", self.track_every, 1)
        _check_share("follow", self.follow)
        _check_int("seed", self.seed, 0)
        _check_int("min_features", self.min_features, 1)
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        for name in ("sketch_heads", "recompute", "keep_graphs", "strict"):
            _check_type(name, getattr(self, name), bool)
        if self.memory_budget is not None:
            self._check_budget(self.memory_budget)
        if self.mode is not None:
            _check_type("mode", self.mode, str)
        _check_type("options", self.options, Mapping)
        object.__setattr__(self, "options", dict(self.options))

    def _check_budget(self, budget: object) -> None:
        _check_share_or_number("memory_budget", budget, "of torch.compile's", "bytes", "one byte")
        for name, default in (("saved", "keep"), ("recompute", True)):
            if getattr(self, name) != default:
                raise ValueError(
                    f"memory_budget={budget!r} and {name}={getattr(self, name)!r} cannot both be: "
                    f"the budget chooses {name}. Leave one of them out"
                )

    @property
    def kind(self) -> Kind:
        """`projection`, or what it is for these gradients."""
        if self.projection is not None:
            return self.projection
        return "tracked" if self.gradients == "sketched" else "countsketch"

    @property
    def interval(self) -> int:
        """`update_interval`, or what it is for this kind of projection."""
        if self.update_interval is not None:
            return self.update_interval
        return 40 if self.kind == "tracked" else 200

    def rank_of(self, name: str) -> Rank | None:
        """The rank asked for of this weight, or None if no pattern names it."""
        if not isinstance(self.rank, Mapping):
            return self.rank
        return next((r for p, r in self.rank.items() if fnmatchcase(name, p)), None)

    def unmatched(self, names: Collection[str]) -> list[str]:
        """What to say of each name pattern that is none of these weights'."""
        ranks = tuple(self.rank) if isinstance(self.rank, Mapping) else ()
        texts = []
        for pattern in (*ranks, *(p for p in (*self.include, *self.exclude) if p != "*")):
            if not any(fnmatchcase(name, pattern) for name in names):
                bare = pattern.replace("*", "")
                near = sorted(name for name in names if bare in name)[:3]
                near = near or difflib.get_close_matches(bare, names, 3, 0.1)
                texts.append(
                    f"pattern {pattern!r} matches no weight that was compiled so far (patterns "
                    "match whole names, such as '*.mlp.*' or 'lm_head.weight'); "
                    f"the nearest: {', '.join(near) or 'none'}"
                )
        return texts


def resolve_rank(rank: Rank, in_features: int) -> int:
    """The number of columns: a float is a fraction of in_features, rounded, at least 1."""
    return max(1, round(rank * in_features)) if isinstance(rank, float) else rank


def config_from(settings: Mapping[str, Any]) -> CompactConfig:
    """A CompactConfig from keyword settings; an unknown one raises a TypeError with the known."""
    known = [f.name for f in fields(CompactConfig)]
    for name in settings:
        if name not in known:
            raise TypeError(
                f"{name!r} is not a setting of the compact backend; settings: {', '.join(known)} "
                "(Inductor's own options go into `options`)"
            )
    return CompactConfig(**settings)


def _check_type(name: str, value: object, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"{name}={value!r} must be a {expected.__name__}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def _check_int(name: str, value: object, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an int")
    if value < smallest:
        raise ValueError(f"{name}={value!r} must be ≥ {smallest}")


def _check_rank(name: str, value: object) -> None:
    _check_share_or_number(
        name, value, "of in_features", "absolute rank", "one column of each weight"
    )


def _check_share_or_number(name: str, value: object, whole: str, unit: str, one: str) -> None:
    allowed = f"a float in (0, 1] (fraction {whole}) or an int ≥ 1 ({unit})"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} must be {allowed}")
    if isinstance(value, float) and not (math.isfinite(value) and 0.0 < value <= 1.0):
        raise ValueError(f"{name}={value!r} must be {allowed}")
    if isinstance(value, int) and value < 1:
        raise ValueError(f"{name}={value!r} must be {allowed}")
    if isinstance(value, int) and value == 1:
        warn_at_caller(f"{name}=1 is {one}; {name}=1.0 is all of them")


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} must be a number from 0 to 1")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must be from 0 to 1")


def _patterns(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, tuple | list):
        raise TypeError(f"{name}={value!r} must be a tuple of name patterns, such as ('*.mlp.*',)")
    for pattern in value:
        _check_type(f"{name} pattern", pattern, str)
    return tuple(value)
