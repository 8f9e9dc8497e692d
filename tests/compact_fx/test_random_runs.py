"""Random runs against the same mathematics written plainly: losses, gradients and weights agree.

Each sequence of operations comes from one integer. The reference knows nothing of graphs, sketched
gradients or the package's optimizers: eager autograd gives exact gradients G; factors G P, dense
gradients beside them, moments, steps, and who shares a projection with whom are kept here. It asks
the package for P itself, the plan of the graph that ran for the weights that meet there, and, where
one backward pass brings several projections, for the one that autograd delivered first.

When a tracked projection has to change, and its Y, are kept here too; the new P is read and judged.

`python tests/compact_fx/test_random_runs.py --operations 20000` runs as many as you like.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import io
import pickle
import random
import time
import warnings
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compact_fx import (
    CompactAdamW,
    Projection,
    SketchedGrad,
    _torch,
    compact_backend,
    compact_optimizer,
    count_step,
    set_steps,
)
from compact_fx.projections import Version
from compact_fx.training.weights import known_record

SEQUENCES = 25  # of one model and backend: compiling takes longer than running them
OPERATIONS = 60  # in a sequence
DRAWN = ("countsketch", "gaussian", "rademacher", "sparse", "orthogonal")
# A prime number of them, so that each meets every model.
KINDS = (*(kind for drawn in DRAWN for kind in (drawn, "tracked")), "tracked")


# --- models --------------------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 40)
        self.last = nn.Linear(40, 24)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Siblings(nn.Module):
    """Two weights on one activation: they share a projection, which is of the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, 48), nn.Linear(32, 48, bias=False)
        self.down = nn.Linear(48, 24)

    def forward(self, x):
        return self.down(torch.tanh(self.gate(x)) * self.up(x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(32, 40), nn.Linear(40, 40)
        self.last = nn.Linear(40, 24)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


class Left(nn.Module):
    """A weight of shape (in_features, out_features)."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(32, 48) / 6)
        self.second, self.last = nn.Linear(48, 40), nn.Linear(40, 24)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(x @ self.matrix))))


MODELS = (Chain, Siblings, Twice, Left)


def layer_of(name):
    return name.partition(".")[0]


def freeze(model, layers):
    for name, weight in model.named_parameters():
        weight.requires_grad_(layer_of(name) not in layers)


# --- settings ------------------------------------------------------------------------------------


class Settings:
    """Model and backend of a block of sequences; graphs are compiled once for all of them."""

    def __init__(self, block: int) -> None:
        choose = random.Random(f"block {block}")
        tracked = KINDS[block % len(KINDS)] == "tracked"
        self.model_class = MODELS[block % len(MODELS)]
        self.dtype = torch.float32 if block % 7 == 6 else torch.float64
        self.sketched = block % 3 != 2
        self.interval = choose.choice([2, 3, 4])
        self.config = {
            "gradients": "sketched" if self.sketched else "dense",
            "projection": KINDS[block % len(KINDS)],
            "rank": choose.choice([0.25, 0.5, 8, 1.0]),
            "update_interval": self.interval,
            "seed": choose.randrange(100),
            "exclude": choose.choice([(), ("last.weight", "down.weight")]),
            # With so few tokens P and Y take more memory than there is to save.
            "place": choose.choice(["early", "late"] if tracked else ["auto", "early", "late"]),
            "recompute": choose.random() < 0.5,
            "track_every": choose.choice([1, 1, 3]),
            "follow": choose.choice([0.25, 0.5, 1.0]),
        }
        self.backend = compact_backend(**self.config, inner="aot_eager", strict=True)
        self.plan = None  # of the graph that ran last
        self.traced = self._compile  # one object: Dynamo compares it
        model = self.make_model(0)
        first, second, *_ = dict.fromkeys(layer_of(name) for name, _ in model.named_parameters())
        # Each weight alone, then both: models that do the same later have groups that meet.
        for frozen in ((first,), (second,), ()):
            model = self.make_model(0)
            freeze(model, frozen)
            torch.compile(model, backend=self.traced)(torch.ones(3, 5, 32, dtype=self.dtype))

    def _compile(self, module, example_inputs):
        """The backend, and a note of which graph runs: equal calls may have different ones."""
        count = len(self.backend.plans)
        compiled = self.backend(module, example_inputs)
        plan = self.backend.plans[-1] if len(self.backend.plans) > count else None
        assert plan is None or not any(site.reason for site in plan.sketched), plan.sketched

        def run(*arguments):
            self.plan = plan
            return compiled(*arguments)

        return run

    def make_model(self, seed):
        torch.manual_seed(seed)
        return self.model_class().to(self.dtype)

    @functools.cache  # noqa: B019 - as long as the settings
    def drawn(self, projection, generation):
        return projection(self.config["seed"], generation)

    def matrix(self, basis):
        if isinstance(basis.version, Version):
            return basis.version.matrix
        return self.drawn(basis.projection, basis.version)


@dataclass
class Algorithm:
    """An optimizer and its options, drawn for one sequence."""

    adam: bool
    compact: bool
    options: dict
    own: dict  # options of the package's optimizers
    refresh: str

    @staticmethod
    def drawn(choose, settings):
        adam, compact = choose.random() < 0.6, choose.random() < 0.65
        form = choose.choice([{"foreach": True}, {"foreach": False}, {"fused": True}])
        options = {"maximize": choose.random() < 0.1, **form}
        if adam:
            eps = 1e-8 if settings.dtype is torch.float64 else 1e-3  # rounding is not to be seen
            options |= {"betas": choose.choice([(0.9, 0.95), (0.8, 0.99)]), "eps": eps}
        else:
            more = choose.choice([{}, {"nesterov": True}, {"dampening": 0.1}])
            if choose.random() < 0.7:
                options |= {"momentum": 0.9, **more}
                # torch's fused SGD starts momentum wrongly where a weight has no gradient in the
                # first step or that step is skipped; with foreach, nesterov changes gradients.
                options |= {"fused": False, "foreach": options.get("foreach") and not more}
        refresh = choose.choice(["keep", "project", "reset"])
        return Algorithm(adam, compact, options, {"refresh": refresh} if compact else {}, refresh)

    def group(self, choose, names):
        group = {"names": names, "lr": choose.choice([1e-3, 3e-3]) * (1 if self.adam else 10)}
        group["weight_decay"] = choose.choice([0.0, 0.1])
        scales = {
            "scale": choose.choice([1.0, 0.25, 1.7]),
            "dense_scale": choose.choice([1.0, 0.5]),
        }
        return group | (scales if self.compact else {})

    def make(self, model, groups):
        """The optimizer itself."""
        named = dict(model.named_parameters())
        groups = [
            {"params": [named[name] for name in group["names"]], **without(group, "names")}
            for group in groups
        ]
        if not self.compact:
            return (torch.optim.AdamW if self.adam else torch.optim.SGD)(groups, **self.options)
        if self.adam:
            return CompactAdamW(groups, **self.options, **self.own)
        return compact_optimizer(torch.optim.SGD, groups, **self.options, **self.own)


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


# --- the reference -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Basis:
    """P; version: of a tracked one the package's, of others how often it has changed."""

    projection: Projection
    version: int | Version
    dim: int  # of the weight's, that P is applied to

    def rows(self, tensor):
        """The weight, or what has its shape, with P's features last; and back."""
        return tensor if self.dim == 1 else tensor.T


@dataclass
class Followed:
    """A tracked projection.

    Attributes:
        first: P that it begins with.
        version: None where it has just begun.
        seen: Y, None where nothing has arrived since it changed.
        is_exact: whether that can be told from the gradients.
        is_used: by a graph; before, nobody knows when it is to change.
    """

    first: Tensor
    version: Version | None = None
    seen: Tensor | None = None
    is_exact: bool = True
    changed_at: int = 0
    is_used: bool = False

    def see(self, rows, is_exact):
        """Y = Gᵀ F / ‖F‖, for G with the features last; an overflow counts as 0."""
        factor = rows @ self.version.matrix
        y = (rows.T @ (factor / factor.norm())).double()
        y = torch.where(y.isfinite(), y, 0.0)
        self.seen = y if self.seen is None else self.seen + y
        self.is_exact &= is_exact

    def begin(self, version):
        if version.generation or not version.matrix.equal(self.first):
            raise Difference(f"a tracked projection begins in generation {version.generation}")
        self.version = version

    def set_back(self, steps):
        self.seen, self.is_exact = None, True
        if self.changed_at > steps:
            self.changed_at, self.version = 0, None

    def is_due(self, steps, interval):
        since = steps - self.changed_at
        return self.is_used and since >= (interval if self.version.generation else 1)

    def change(self, steps, is_due, new):
        """Before the next use; new: the version that the package has now. Whether it changes."""
        since, old, seen = steps - self.changed_at, self.version, self.seen
        if not is_due:
            seen = None
        else:
            self.changed_at, self.seen, self.is_exact = steps, None, True
        changes = seen is not None and bool(seen.any())
        if (new is not old) != changes:
            raise Difference(
                f"tracked projection has changed: {new is not old}, expected {changes}, in "
                f"generation {old.generation} with {steps} steps, {since} since it changed"
            )
        if changes and new.generation != old.generation + 1:
            raise Difference(f"generation {new.generation} after {old.generation}")
        self.version = new
        return changes


@dataclass
class Gradient:
    """F Pᵀ + G: a factor in its basis and a dense gradient; each may be None.

    Attributes:
        basis: of the factor; kept when something has written into the gradient.
        is_written: it is all in the dense part then, for good.
        is_blank: set to zero, and nothing was added since.
        user: the optimizer that has used it as it is now.
    """

    basis: Basis | None = None
    factor: Tensor | None = None
    dense: Tensor | None = None
    is_written: bool = False
    is_blank: bool = False
    user: object = None

    def add_factor(self, basis, factor, expanded):
        if not self.is_written and (self.basis is None or self.is_blank):
            self.basis, self.factor = basis, factor
        elif not self.is_written and self.basis == basis:
            self.factor = self.factor + factor
        else:
            self.add_dense(expanded)
        self.is_blank, self.user = False, None

    def add_dense(self, dense):
        self.dense = dense if self.dense is None else self.dense + dense
        self.is_blank, self.user = False, None

    def write(self, dense):
        self.factor, self.dense, self.is_written = None, dense, self.basis is not None
        self.is_blank, self.user = False, None

    def scale(self, number):
        self.factor, self.dense = (
            None if part is None else part * number for part in (self.factor, self.dense)
        )
        self.user = None

    def zero(self, factor):
        """Factor: zeros of its shape, for a gradient that has a basis."""
        if self.basis is None:
            self.dense = torch.zeros_like(self.dense)
        else:
            self.factor, self.dense, self.is_written, self.is_blank = factor, None, False, True
        self.user = None

    @property
    def is_finite(self):
        return all(p is None or p.isfinite().all() for p in (self.factor, self.dense))


@dataclass
class Shared:
    """One projection, and the weights that have it in common; tracked ones by their shape."""

    salt: int
    members: set[str]
    followed: dict[tuple[int, int], Followed] = field(default_factory=dict)


@dataclass
class Records:
    """What belongs to the weights as objects: a copy of a model begins anew.

    Attributes:
        steps: of each weight, since something asked for it (`known`).
        shared: by weight, from its first sketched graph or a saved state.
        latest: the basis of its latest sketched graph.
    """

    steps: dict[str, int]
    known: set[str] = field(default_factory=set)
    shared: dict[str, Shared] = field(default_factory=dict)
    latest: dict[str, Basis] = field(default_factory=dict)

    def meet(self, names, salt):
        """These weights are sketched with one projection; whether they had several."""
        group = next((self.shared[name] for name in names if name in self.shared), None)
        group = group or Shared(salt, set())
        salts = {self.shared[name].salt for name in names if name in self.shared}
        for name in names:
            members = self.shared[name].members if name in self.shared else {name}
            group.members |= members
            if name in self.shared:
                group.followed = self.shared[name].followed | group.followed
            self.shared.update(dict.fromkeys(members, group))
        self.known.update(names)
        return len(salts) > 1

    def shared_steps(self, name):
        return max(self.steps[member] for member in self.shared[name].members)

    def followed(self, name, projection):
        return self.shared[name].followed.get((projection.features, projection.rank))

    def restore_salt(self, name, salt):
        self.shared.setdefault(name, Shared(salt, {name})).salt = salt
        self.known.add(name)

    def set_steps(self, steps):
        met = steps.keys() & self.shared.keys()
        before = {name: self.shared_steps(name) for name in met}
        self.steps |= steps
        self.known.update(steps)
        for name in met:
            now = self.shared_steps(name)
            for followed in self.shared[name].followed.values() if now < before[name] else ():
                followed.set_back(now)

    def count(self, name):
        """A step that an optimizer made."""
        if name in self.known:
            self.steps[name] += 1


@dataclass
class Way:
    """How a weight is stepped: densely, or with a factor in a basis; and what is said of it."""

    gradient: Tensor
    basis: Basis | None = None
    warning: str = ""


class Reference:
    """Weights, gradients, moments, steps and the loss scale, after the definitions."""

    def __init__(self, settings, algorithm, model, groups):
        self.settings, self.algorithm = settings, algorithm
        self.model = model
        self.groups = copy.deepcopy(groups)
        self.records = Records({name: 0 for name, _ in model.named_parameters()})
        self.gradients = {}  # of those that have one
        self.meetings = 0  # of weights that had different projections
        self.changes = 0  # of tracked projections
        self.state = {}
        self.loss_scale, self.good_steps = 2.0**8, 0

    def __deepcopy__(self, memo):
        result = copy.copy(self)
        for name in ("model", "groups", "records", "gradients", "state"):
            setattr(result, name, copy.deepcopy(getattr(self, name), memo))
        return result

    @property
    def weights(self):
        return dict(self.model.named_parameters())

    @property
    def held(self):
        return [name for group in self.groups for name in group["names"]]

    def trainable(self):
        return {name for name, weight in self.weights.items() if weight.requires_grad}

    def run(self, plan, model):
        """A graph has run, of the package's model: the basis of each of its sketched weights."""
        names = {site.index: site.weight for site in plan.sites}
        owners = {i.projection: [names[o] for o in i.owners] for i in plan.projection_inputs}
        for number, own in owners.items():
            self.meetings += self.records.meet(own, plan.projections[number].salt)
        shared = {number: self.records.shared[own[0]] for number, own in owners.items()}
        weights, followed = dict(model.named_parameters()), []
        for number, group in shared.items():
            if plan.projections[number].is_tracked:
                followed.append(self.follow(group, plan.projections[number], weights))
        self.change_those_due(followed, weights)
        bases, sides = {}, {site.weight: site.side for site in plan.sites if site.rank}
        for number, own in owners.items():
            projection = plan.projections[number].with_salt(shared[number].salt)
            followed = self.records.followed(own[0], projection)
            version = self.records.shared_steps(own[0]) // self.settings.interval
            for name in own:
                dim = int((sides[name] == "input") != (name == "matrix"))
                bases[name] = Basis(projection, followed.version if followed else version, dim)
        self.records.latest |= bases
        return bases

    def follow(self, group, projection, weights):
        """A tracked projection of this shape is used; it begins at random."""
        shape, drawn = (projection.features, projection.rank), projection.with_salt(group.salt)
        if shape not in group.followed:
            group.followed[shape] = Followed(self.settings.drawn(drawn, 0))
        if group.followed[shape].version is None:  # nothing has arrived: it cannot have changed
            group.followed[shape].begin(followed_by(weights[min(group.members)], shape).version)
        group.followed[shape].is_used = True
        return group.followed[shape]

    def change_those_due(self, own, weights):
        """All tracked projections at once, when one is due that the graph uses."""
        due = []
        groups = {id(group): group for group in self.records.shared.values()}
        for group in groups.values():
            for shape, followed in group.followed.items():
                if followed.version is None:
                    followed.begin(followed_by(weights[min(group.members)], shape).version)
            steps = self.records.shared_steps(min(group.members))
            interval = self.settings.interval
            due += [f for f in group.followed.values() if f.is_due(steps, interval)]
        if not any(one is other for one in due for other in own):
            due = []
        for group in groups.values():
            steps = self.records.shared_steps(min(group.members))
            for shape, followed in group.followed.items():
                new = followed_by(weights[min(group.members)], shape).version
                seen, is_exact = followed.seen, followed.is_exact
                is_due = any(followed is one for one in due)
                if followed.change(steps, is_due, new):
                    self.judge(new.matrix.double(), seen if is_exact else None)
                    self.changes += 1

    def judge(self, p, seen):
        """Whether it is orthonormal, and its first columns span the largest of Y."""
        error = (p.T @ p - torch.eye(p.shape[1])).abs().max()
        if not error < 1e-5:
            raise Difference(f"columns of a tracked projection are orthonormal up to {error:.3g}")
        if seen is None:
            return
        follow = self.settings.config["follow"]
        columns = max(1, round(follow * p.shape[1])) if follow else 0
        sizes, order = seen.norm(dim=0).sort(descending=True)
        if columns < len(sizes) and sizes[columns] > 0.999 * sizes[columns - 1]:
            return  # it is rounding that says which is larger
        largest = seen[:, order[:columns]] / sizes[:columns]
        inside = p[:, :columns] @ (p[:, :columns].T @ largest)
        if not (largest - inside).norm() < 1e-3:
            raise Difference(f"tracked projection is off Y by {(largest - inside).norm():.3g}")

    def see(self, pending, exact):
        """What tracked projections see of a backward pass; a changed one hears nothing of it."""
        for name, (followed, basis) in pending.followed.items():
            if followed.version is basis.version:
                once = name != "twice.weight" and self.settings.config["track_every"] == 1
                followed.see(basis.rows(exact[name]), once)

    def matrix(self, basis):
        return self.settings.matrix(basis)

    def compress(self, dense, basis):
        return basis.rows(dense) @ self.matrix(basis)

    def expand(self, factor, basis):
        return basis.rows(factor @ self.matrix(basis).T)

    def fit(self, dense, basis):
        """The factor nearest to it."""
        inverse = torch.linalg.pinv(self.matrix(basis).double()).T
        return (basis.rows(dense).double() @ inverse).to(dense.dtype)

    def exact(self, loss, names):
        """Also of those that were frozen since the forward pass."""
        names, frozen = sorted(names), names - self.trainable()
        for name in frozen:
            self.weights[name].requires_grad_(True)
        exact = torch.autograd.grad(loss, [self.weights[name] for name in names])
        for name in frozen:
            self.weights[name].requires_grad_(False)
        return dict(zip(names, exact, strict=True))

    def add(self, name, exact, basis):
        """A gradient arrives."""
        gradient = self.gradients.setdefault(name, Gradient())
        if basis is None:
            gradient.add_dense(exact)
            return
        factor = self.compress(exact, basis)
        expanded = self.expand(factor, basis)
        if self.settings.sketched:
            gradient.add_factor(basis, factor, expanded)
        else:
            gradient.add_dense(expanded)

    def dense(self, name):
        """What a reader sees."""
        gradient = self.gradients[name]
        if gradient.factor is None:
            return gradient.dense
        expanded = self.expand(gradient.factor, gradient.basis)
        return expanded if gradient.dense is None else expanded + gradient.dense

    def norm(self, name, kind, actual):
        """That of the factor where the package takes it: P is orthonormal up to rounding."""
        is_factor = kind == 2.0 and isinstance(actual, SketchedGrad) and actual.is_isometric
        gradient = self.gradients[name]
        return torch.linalg.vector_norm(gradient.factor if is_factor else self.dense(name), kind)

    def zero(self, name):
        gradient = self.gradients[name]
        zeros = None
        if gradient.basis is not None:
            zeros = torch.zeros_like(self.compress(self.weights[name], gradient.basis))
        gradient.zero(zeros)

    def way(self, name):
        """How it is to be stepped."""
        gradient, state = self.gradients[name], self.state.get(name, {})
        if not (self.settings.sketched and self.algorithm.compact):
            return Way(self.dense(name))
        is_dense = bool(state) and "basis" not in state
        basis = gradient.basis
        if basis is None:
            latest = None if is_dense else self.records.latest.get(name)
            basis = latest or state.get("basis")
            if basis is None:
                return Way(gradient.dense)
            factor = self.compress(gradient.dense, basis)
            return Way(factor, basis, NO_SKETCH if state else "")
        if is_dense and gradient.dense is not None:
            return Way(self.dense(name))
        if gradient.is_written:
            return Way(self.fit(gradient.dense, basis), basis, WRITTEN)
        if gradient.dense is not None:
            factor = gradient.factor + self.compress(gradient.dense, basis)
            return Way(factor, basis, BESIDE)
        return Way(gradient.factor, basis, ANEW if is_dense else "")

    def ways(self):
        """Of all weights that a step changes."""
        return {name: self.way(name) for name in self.held if name in self.gradients}

    @torch.no_grad()
    def step(self, ways, optimizer):
        for group in self.groups:
            for name in group["names"]:
                if name in ways:
                    self.step_weight(name, group, ways[name])
                    self.use(name, optimizer)

    def use(self, name, optimizer):
        """A gradient that another optimizer has used is no other step."""
        gradient = self.gradients[name]
        if gradient.user in (None, optimizer):
            gradient.user = optimizer
            self.records.count(name)

    def step_weight(self, name, group, way):
        weight, state = self.weights[name], self.state.setdefault(name, {})
        decay, adam = group["weight_decay"], self.algorithm.adam
        sign = -1.0 if self.algorithm.options["maximize"] else 1.0
        if way.basis is None:
            lr = group["lr"] * group.get("dense_scale", 1.0)
            gradient = sign * way.gradient + (0.0 if adam else decay * weight)
            update = self.update(state, gradient, lr)
            if self.algorithm.compact and self.gradients[name].basis is not None:
                self.gradients[name] = Gradient(dense=way.gradient)
        else:
            lr, p = group["lr"], self.matrix(way.basis)
            if "basis" not in state:  # of full size
                state.clear()
            elif state["basis"] != way.basis:
                self.change_basis(state, p)
            coupled = 0.0 if adam else decay * self.compress(weight, way.basis)
            scale = group["scale"]
            # Adam's updates do not grow with the gradient.
            if adam and way.basis.projection.is_tracked:
                scale *= (p.shape[0] / p.shape[1]) ** 0.5
            update = scale * self.update(state, sign * way.gradient + coupled, lr)
            update = self.expand(update, way.basis)
            state["basis"] = way.basis
        weight.mul_(1 - lr * decay if adam else 1.0).add_(update)

    def change_basis(self, state, p):
        refresh, tracked = self.algorithm.refresh, state["basis"].projection.is_tracked
        if refresh == "reset":
            state.clear()
            return
        change = self.settings.matrix(state["basis"]).T @ p
        if "first" in state and (tracked or refresh == "project"):
            state["first"] = state["first"] @ change
        if "second" in state and tracked:
            state["second"] = state["second"] @ change.square()

    def update(self, state, gradient, lr):
        """What Adam or SGD adds, and their moments."""
        options = self.algorithm.options
        if not self.algorithm.adam:
            momentum = options.get("momentum", 0.0)
            if not momentum:
                return -lr * gradient
            old = state.get("first")
            kept = gradient * (1 - options.get("dampening", 0.0))
            state["first"] = gradient if old is None else momentum * old + kept
            nesterov = momentum * state["first"] + gradient
            return -lr * (nesterov if options.get("nesterov") else state["first"])
        (beta1, beta2), t = options["betas"], state.get("t", 0) + 1
        first = beta1 * state.get("first", 0.0) + (1 - beta1) * gradient
        second = beta2 * state.get("second", 0.0) + (1 - beta2) * gradient.square()
        state |= {"t": t, "first": first, "second": second}
        mean, square = first / (1 - beta1**t), second / (1 - beta2**t)
        return -lr * mean / (square.sqrt() + options["eps"])

    def unscale(self):
        """Whether a gradient is not finite."""
        own = [self.gradients[name] for name in self.held if name in self.gradients]
        for gradient in own:
            gradient.scale(1 / self.loss_scale)
        return not all(gradient.is_finite for gradient in own)

    def update_scale(self, found_inf):
        self.good_steps = 0 if found_inf else self.good_steps + 1
        if found_inf:
            self.loss_scale *= 0.5
        elif self.good_steps == GROWTH_INTERVAL:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0

    def saved_steps(self, name):
        """In an optimizer's state; torch's own optimizers have counted as well."""
        if name in self.records.known:
            return self.records.steps[name]
        return self.state.get(name, {}).get("t", 0)

    def restore(self, saved, copied, weights, bases):
        """What the weights get of a saved state of a compact optimizer, or of a copied one."""
        sketched = {
            n: saved.state[n]["basis"] for n in self.held if "basis" in saved.state.get(n, {})
        }
        for name, basis in sketched.items():
            self.records.restore_salt(name, basis.projection.salt)
        restored = {}
        for name in self.held:
            steps = saved.saved_steps(name)
            if copied:
                is_restored = name in saved.records.known
            else:
                is_restored = name in self.records.known or (steps and self.weights[name].dim() > 1)
            if is_restored:
                restored[name] = steps
        self.records.set_steps(restored)
        tracked = {n: basis for n, basis in sketched.items() if basis.projection.is_tracked}
        self.restore_followed(saved, tracked, copied, weights, bases)

    def restore_followed(self, saved, sketched, copied, weights, bases):
        """Tracked projections go on as saved; weights, bases: the package's, of its states."""
        renewed = {}

        def renew(old, new):
            """A version is another object now, the same for all that have it."""
            if (old.generation, renewed.setdefault(old, new)) != (new.generation, new):
                raise Difference(f"version {old.generation} is {new.generation}, or two of them")
            if not torch.equal(old.matrix, new.matrix):
                raise Difference(f"a restored projection differs, generation {old.generation}")
            return new

        most = collections.Counter()  # steps that a weight with this projection has seen
        for name, basis in sketched.items():
            followed = saved.records.followed(name, basis.projection)
            steps = self.records.shared_steps(name)
            most[followed.version] = max(most[followed.version], steps)
        for name, basis in sketched.items():
            shape = (basis.projection.features, basis.projection.rank)
            followed = copy.deepcopy(saved.records.followed(name, basis.projection))
            since = max(0, saved.records.shared_steps(name) - followed.changed_at)
            followed.changed_at = max(0, most[followed.version] - since)
            followed.version = renew(followed.version, followed_by(weights[name], shape).version)
            followed.is_used = False
            if followed.seen is None and not copied:
                followed.seen = torch.zeros_like(followed.version.matrix)
            self.records.shared[name].followed[shape] = followed
            version = renew(basis.version, bases[weights[name]].version)
            self.state[name]["basis"] = dataclasses.replace(basis, version=version)


GROWTH_INTERVAL = 3
WRITTEN, BESIDE, NO_SKETCH, ANEW = WARNINGS = (
    "is dense since something wrote",
    "has a dense part",
    "is dense: no sketch made it",
    "the moments of such weights begin anew",
)


# --- one run -------------------------------------------------------------------------------------


class Difference(AssertionError):
    """The package and the reference disagree."""


class Interruption(Exception):
    """Raised in the middle of a step."""


@dataclass
class Pending:
    """A loss without its backward pass, of the package and of the reference."""

    loss: Tensor
    expected: Tensor
    names: set[str]
    bases: dict[str, Basis]
    followed: dict[str, tuple[Followed, Basis]]  # of weights that have a tracked projection


@dataclass
class Checkpoint:
    file: bytes
    reference: Reference
    rest: list[dict]


class Run:
    """One sequence of operations: the package and the reference, side by side."""

    def __init__(self, settings, seed):
        self.settings = settings
        self.random = choose = random.Random(f"sequence {seed}")
        self.algorithm = Algorithm.drawn(choose, settings)
        self.log, self.counts = [], collections.Counter()
        self.factors = settings.sketched and self.algorithm.compact
        self.tolerance = 1e-9 if settings.dtype is torch.float64 else 2e-4
        model = settings.make_model(seed)
        self.layers = list(dict.fromkeys(layer_of(name) for name, _ in model.named_parameters()))
        self.frozen = frozenset()
        names = [name for name, _ in model.named_parameters()]
        late = choose.choice([*self.layers, None])
        parts = [
            [n for n in names if n.endswith("weight") or n == "matrix"],
            [n for n in names if n.endswith("bias")],
        ]
        own = [[n for n in part if layer_of(n) != late] for part in parts]
        groups = [self.algorithm.group(choose, part) for part in own if part]
        later = [name for name in names if layer_of(name) == late]
        self.rest = [self.algorithm.group(choose, later)] if later else []  # groups to be added
        self.optimizer = None
        self.reference = Reference(settings, self.algorithm, copy.deepcopy(model), groups)
        self.take(model, self.algorithm.make(model, groups))
        self.scaler = self.make_scaler()
        self.shape = (3, 5)
        self.pending, self.checkpoints = [], []

    def make_scaler(self):
        return torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=GROWTH_INTERVAL)

    def take(self, model, optimizer):
        if optimizer is not self.optimizer:
            self.warned = set()  # by this optimizer
        self.model, self.optimizer = model, optimizer
        self.step = torch.compile(model, backend=self.settings.traced)
        self.pending = []
        for name, weight in model.named_parameters():
            weight.requires_grad_(layer_of(name) not in self.frozen)
            self.reference.weights[name].requires_grad_(layer_of(name) not in self.frozen)

    def operate(self):
        """One random operation, and the comparison after it."""
        names, weights = zip(*WEIGHTS.items(), strict=True)
        name = self.random.choices(names, weights)[0]
        if not self.log and self.chance(0.3):
            name = "meet"
        self.log.append(name)
        try:
            done = getattr(self, name)()
        except Difference:
            raise
        except Exception as error:
            raise Difference(f"{type(error).__name__}: {error}") from error
        if done is False:
            self.log.pop()
        else:
            self.counts[name] += 1
            self.compare()

    def compare(self):
        reference, weights = self.reference.weights, dict(self.model.named_parameters())
        for name, weight in weights.items():
            self.close(f"weight {name}", weight.detach(), reference[name].detach())
            has = name in self.reference.gradients
            if has != (weight.grad is not None):
                raise Difference(f"gradient of {name}: {weight.grad is not None}, expected {has}")
            if not has:
                continue
            self.compare_gradient(name, weight.grad)
        for name, group in self.reference.records.shared.items():
            for shape, followed in group.followed.items():
                self.compare_followed(followed, followed_by(weights[name], shape))

    def compare_followed(self, expected, actual):
        self.counts["(tracked projections compared)"] += 1
        if expected.version is None:
            expected.begin(actual.version)
        if expected.version is not actual.version:
            raise Difference("a tracked projection is of another version")
        if (expected.seen is None) != (actual.gradient is None):
            raise Difference(f"there is Y: {actual.gradient is not None}")
        if expected.is_exact and expected.seen is not None:
            error = (actual.gradient - expected.seen).norm()
            if not error <= 1e-4 * expected.seen.norm() + 1e-12:
                raise Difference(f"Y is off by {error:.3g} of {expected.seen.norm():.3g}")

    def compare_gradient(self, name, actual):
        expected = self.reference.gradients[name]
        if self.factors:  # otherwise optimizers write into gradients as they like
            if isinstance(actual, SketchedGrad) != (expected.basis is not None):
                raise Difference(f"gradient of {name} is {actual!r}, expected {expected.basis}")
            if expected.basis is not None:
                self.counts["(factors compared)"] += 1
                kind = actual.factor is None, actual.is_written
                if kind != (expected.dense is not None, expected.is_written):
                    raise Difference(f"gradient of {name}: (dense, written) = {kind}")
                basis = basis_of(actual)
                if canonical(basis) != canonical(expected.basis):
                    raise Difference(f"gradient of {name} in {basis}, expected {expected.basis}")
        if isinstance(actual, SketchedGrad):
            actual = actual.to_dense()
        self.close(f"gradient {name}", actual, self.reference.dense(name))

    def close(self, what, actual, expected):
        error = (actual.detach() - expected.detach()).norm().item()
        size = expected.detach().norm().item()
        if not error <= self.tolerance * size + 1e-12:
            raise Difference(f"{what}: off by {error:.3g} of {size:.3g}")

    def chance(self, probability):
        return self.random.random() < probability

    # --- forward and backward ---

    def batch(self):
        seed = self.random.randrange(2**31)
        generator = torch.Generator().manual_seed(seed)
        sizes = (*self.shape, 32), (*self.shape, 24)
        return tuple(
            torch.randn(size, generator=generator, dtype=self.settings.dtype) for size in sizes
        )

    def losses(self):
        """A forward pass of both, and whether the losses agree."""
        x, target = self.batch()
        loss = F.mse_loss(self.step(x), target)
        bases = self.reference.run(self.settings.plan, self.model)
        expected = F.mse_loss(self.reference.model(x), target)
        self.close("loss", loss, expected)
        self.counts["(sketched)"] += len(bases)
        followed = {
            name: (self.reference.records.followed(name, basis.projection), basis)
            for name, basis in bases.items()
            if basis.projection.is_tracked
        }
        return Pending(loss, expected, self.reference.trainable(), bases, followed)

    def forward(self):
        if len(self.pending) == 3:
            return False
        self.pending.append(self.losses())
        return None

    def backward(self):
        """Of one or more of the losses, in one pass."""
        if not self.pending:
            self.pending.append(self.losses())
        count = self.random.randint(1, len(self.pending))
        chosen = self.random.sample(self.pending, count)
        self.pending = [p for p in self.pending if all(p is not c for c in chosen)]
        self.deliver(chosen)

    def across(self):
        """Forward passes with a change of projections between them, and one backward pass."""
        chosen = []
        for _ in range(self.random.randint(2, 3)):
            chosen.append(self.losses())
            self.set_steps()
        self.deliver(self.random.sample(chosen, len(chosen)))

    def deliver(self, chosen, scale=1.0, factor=1.0):
        total = sum(pending.loss for pending in chosen) * factor
        (self.scaler.scale(total) if scale != 1.0 else total).backward()
        arrived = collections.defaultdict(list)
        for pending in chosen:
            loss = pending.expected * (factor * scale)
            exact = self.reference.exact(loss, pending.names)
            self.reference.see(pending, exact)
            for name in pending.names & self.reference.trainable():
                arrived[name].append((exact[name], pending.bases.get(name)))
        for name, parts in arrived.items():
            first = basis_of(dict(self.model.named_parameters())[name].grad)
            self.counts["(several projections)"] += len({basis for _, basis in parts}) > 1
            for exact, basis in sorted(
                parts, key=lambda part: canonical(part[1]) != canonical(first)
            ):
                self.reference.add(name, exact, basis)

    def eager_backward(self):
        """Without the backend, into the same gradients."""
        x, target = self.batch()
        loss, expected = (F.mse_loss(m(x), target) for m in (self.model, self.reference.model))
        loss.backward()
        for name, exact in self.reference.exact(expected, self.reference.trainable()).items():
            self.reference.add(name, exact, None)

    def eager_step(self):
        """Gradients that no sketch has made, alone or added to zeros."""
        if self.chance(0.3):
            self.forward()
        self.zero(set_to_none=self.chance(0.8))
        self.eager_backward()
        self.attempt(self.optimizer.step)

    def evaluate(self):
        x, _ = self.batch()
        with torch.no_grad():
            self.close("output", self.step(x), self.reference.model(x))

    def resize(self):
        self.shape = self.random.randint(2, 6), self.random.randint(2, 7)

    # --- optimizer ---

    def zero(self, set_to_none, of=None):
        (of or self.model).zero_grad(set_to_none=set_to_none)
        names = self.reference.held if of is self.optimizer else list(self.reference.weights)
        for name in names:
            if set_to_none:
                self.reference.gradients.pop(name, None)
            elif name in self.reference.gradients:
                self.reference.zero(name)

    def zero_grad(self):
        of = self.optimizer if self.chance(0.5) else self.model
        self.zero(self.chance(0.6), of)

    def optimizer_step(self):
        self.attempt(self.optimizer.step)

    def attempt(self, step):
        """A step of the optimizer, which may have to warn."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
        said = {t for w in caught for t in WARNINGS if t in str(w.message)}
        ways = self.reference.ways()
        expected = {way.warning for way in ways.values() if way.warning} - self.warned
        if said != expected:
            raise Difference(f"warned {said}, expected {expected}")
        self.warned |= said
        self.counts.update(f"({way.warning})" for way in ways.values() if way.warning)
        self.stepped(ways)

    def bystander(self):
        """An optimizer that changes nothing makes a step; others may have used the gradients."""
        weights = dict(self.model.named_parameters())
        names = [name for name in weights if self.chance(0.8)]
        if not any(name in self.reference.gradients for name in names):
            return False
        if self.chance(0.3):
            self.optimizer_step()
        optimizer = torch.optim.SGD([weights[name] for name in names], lr=0.0, foreach=False)
        for _ in range(self.random.randint(1, 2)):
            optimizer.step()
            for name in names:
                if name in self.reference.gradients:
                    self.reference.use(name, optimizer)
        self.pending = []
        if self.chance(0.3):
            self.optimizer_step()
        return None

    def count_step(self):
        """Something else has stepped the weights, it says."""
        weights = dict(self.model.named_parameters())
        names = [name for name in weights if self.chance(0.5)]
        count_step(weights[name] for name in names)
        for name in names:
            self.reference.records.set_steps({name: self.reference.records.steps[name] + 1})

    def stepped(self, ways):
        before = dict(self.reference.records.steps)
        self.reference.step(ways, self.optimizer)
        self.pending = []  # weights have changed
        interval = self.settings.interval
        for name, steps in self.reference.records.steps.items():
            self.counts["(projections changed)"] += steps // interval != before[name] // interval

    def train(self):
        """The usual loop."""
        for _ in range(self.random.randint(1, 3)):
            self.zero(set_to_none=True)
            self.deliver([self.losses()])
            self.attempt(self.optimizer.step)
            self.compare()

    def closure(self, fail=False):
        zero, calls = self.chance(0.7), []

        def closure():
            calls.append(1)
            if zero:
                self.zero(set_to_none=True, of=self.optimizer)
            losses = self.losses()
            self.deliver([losses])
            if fail:
                raise Interruption
            return losses.loss

        if fail:
            with expected_failure(Interruption):
                self.optimizer.step(closure)
        else:
            self.attempt(lambda: self.optimizer.step(closure))
        assert len(calls) == 1

    def failing_closure(self):
        self.closure(fail=True)

    def failing_loss(self):
        """Between forward and backward, or at the start of backward."""
        x, target = self.batch()
        with expected_failure(Interruption):
            output = self.step(x)
            self.reference.run(self.settings.plan, self.model)
            if self.chance(0.5):
                raise Interruption
            output.register_hook(interrupt)
            F.mse_loss(output, target).backward()

    def clip(self):
        if not self.reference.gradients:
            return False
        kind = float("inf") if self.chance(0.2) else 2.0
        actual = {name: weight.grad for name, weight in self.model.named_parameters()}
        norms = [self.reference.norm(n, kind, actual[n]) for n in self.reference.gradients]
        norm = torch.stack(norms).norm(kind)
        limit = norm.item() * self.random.uniform(0.3, 1.3) + 1e-9
        foreach = self.random.choice([None, True, False])
        actual = nn.utils.clip_grad_norm_(self.model.parameters(), limit, kind, foreach=foreach)
        self.close("norm", actual, norm)
        for gradient in self.reference.gradients.values():
            gradient.scale(min(1.0, limit / (norm.item() + 1e-6)))
        return None

    def clip_value(self):
        """It makes gradients dense for good."""
        if not self.reference.gradients:
            return False
        limit = self.random.choice([1e-3, 1e-2])
        nn.utils.clip_grad_value_(self.model.parameters(), limit)
        for name in self.reference.gradients:
            clipped = self.reference.dense(name).clamp(-limit, limit)
            self.reference.gradients[name].write(clipped)
        return None

    def scaled_step(self):
        """GradScaler, at times with an overflow."""
        if self.chance(0.8):
            self.zero(set_to_none=self.chance(0.7))
        overflow = self.chance(0.25)
        for number in range(self.random.randint(1, 2)):
            factor = float("inf") if overflow and number == 0 else 1.0
            self.deliver([self.losses()], self.reference.loss_scale, factor)
        if not any(name in self.reference.gradients for name in self.reference.held):
            self.zero(set_to_none=True)
            return
        clips = self.chance(0.4)
        if clips:
            self.scaler.unscale_(self.optimizer)
        found_inf = self.reference.unscale()
        # Those of weights that the optimizer does not hold may have overflowed alone.
        if clips and all(gradient.is_finite for gradient in self.reference.gradients.values()):
            self.clip()
        if found_inf:
            self.scaler.step(self.optimizer)
            self.counts["(steps skipped)"] += 1
            if self.algorithm.options.get("fused"):  # to autograd, it has written into the weights
                self.pending = []
        else:
            self.attempt(lambda: self.scaler.step(self.optimizer))
        self.scaler.update()
        self.reference.update_scale(found_inf)
        if self.scaler.get_scale() != self.reference.loss_scale:
            raise Difference(f"scale {self.scaler.get_scale()}, {self.reference.loss_scale}")
        # What a fused step leaves of scaled gradients is its own affair.
        self.zero(set_to_none=self.chance(0.7))

    def learning_rate(self):
        factor = self.random.choice([0.5, 0.9, 1.1])
        for group, own in zip(self.optimizer.param_groups, self.reference.groups, strict=True):
            group["lr"] = own["lr"] = own["lr"] * factor

    def add_group(self):
        if not self.rest:
            return False
        group = self.rest.pop()
        self.reference.groups.append(copy.deepcopy(group))
        named = dict(self.model.named_parameters())
        params = [named[name] for name in group["names"]]
        self.optimizer.add_param_group({"params": params, **without(group, "names")})
        return None

    # --- weights ---

    def freeze(self, frozen=None):
        """Another choice of frozen layers: weights that share an activation also run alone."""
        if frozen is None:
            frozen = [layer for layer in self.layers[:2] if self.chance(0.4)]
        self.frozen = frozenset(frozen)
        for model in (self.model, self.reference.model):
            freeze(model, self.frozen)

    def meet(self):
        """Each weight alone, then both: Siblings have had two projections, and now have one."""
        first, second, *_ = self.layers
        for frozen in [*self.random.sample([[first], [second]], 2), []]:
            self.freeze(frozen)
            self.deliver([self.losses()])
            self.set_steps()

    def set_steps(self):
        """Also between a forward and its backward pass."""
        names = list(self.reference.weights)
        names = names if self.chance(0.5) else [self.random.choice(names)]
        steps = self.random.randrange(10)
        set_steps([dict(self.model.named_parameters())[name] for name in names], steps)
        self.reference.records.set_steps(dict.fromkeys(names, steps))

    def save(self):
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        reference = copy.deepcopy(self.reference)
        self.checkpoints.append(Checkpoint(file.getvalue(), reference, list(self.rest)))

    def load(self):
        """Into the same model and optimizer, or into fresh ones."""
        if not self.checkpoints:
            return False
        checkpoint = self.random.choice(self.checkpoints)
        fresh = self.chance(0.5) or len(checkpoint.rest) != len(self.rest)
        reference = copy.deepcopy(checkpoint.reference)
        if fresh:
            model = self.settings.make_model(0)
            # Settings of groups are part of the state: these are to be overwritten.
            groups = [{**group, "lr": 1.0, "weight_decay": 0.5} for group in reference.groups]
            optimizer, gradients = self.algorithm.make(model, groups), {}
            self.frozen = frozenset()
            self.scaler = self.make_scaler()
        else:
            model, optimizer = self.model, self.optimizer
            gradients = self.reference.gradients
        self.log[-1] += " fresh" if fresh else " same"
        state = torch.load(io.BytesIO(checkpoint.file), weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        reference.gradients = gradients
        saved, reference.records = copy.deepcopy(reference), self.reference.records
        self.reference, self.rest = reference, list(checkpoint.rest)
        self.carry(saved, model, optimizer, fresh=fresh)
        self.take(model, optimizer)
        return None

    def carry(self, saved, model, optimizer, fresh=True, copied=False):
        """Plain optimizers know nothing of steps, the package's of those of their own weights."""
        if fresh:
            self.reference.records = Records(dict.fromkeys(saved.records.steps, 0))
        if self.algorithm.compact:
            weights = dict(model.named_parameters())
            self.reference.restore(saved, copied, weights, optimizer._bases)
            return
        for name, weight in model.named_parameters():
            steps = saved.records.steps[name]
            set_steps([weight], steps)
            self.reference.records.set_steps({name: steps})

    def deepcopy(self):
        """Go on with the copy, or with what was copied."""
        if self.chance(0.5):
            model, optimizer = copy.deepcopy((self.model, self.optimizer))
        else:
            model, optimizer = pickle.loads(pickle.dumps((self.model, self.optimizer)))
        if self.chance(0.5):
            return
        self.log[-1] += " taken"
        self.carry(copy.deepcopy(self.reference), model, optimizer, copied=True)
        self.reference.gradients = {}
        self.take(model, optimizer)


WEIGHTS = {
    "forward": 10,
    "backward": 14,
    "across": 3,
    "eager_backward": 3,
    "eager_step": 3,
    "optimizer_step": 12,
    "bystander": 3,
    "count_step": 2,
    "zero_grad": 8,
    "train": 6,
    "scaled_step": 6,
    "clip": 5,
    "clip_value": 2,
    "closure": 3,
    "failing_closure": 2,
    "failing_loss": 2,
    "evaluate": 3,
    "resize": 4,
    "learning_rate": 2,
    "freeze": 3,
    "meet": 1,
    "set_steps": 5,
    "add_group": 2,
    "save": 3,
    "load": 3,
    "deepcopy": 2,
}


@contextlib.contextmanager
def expected_failure(kind):
    """The block has to raise this."""
    try:
        yield
    except kind:
        return
    raise Difference(f"no {kind.__name__}")


def basis_of(gradient):
    """As the reference names it."""
    if not isinstance(gradient, SketchedGrad):
        return None
    basis = gradient.basis
    version = basis.version if basis.projection.is_tracked else basis.generation
    return Basis(basis.projection, version, basis.dim)


def followed_by(weight, shape):
    """The package's tracked projection of the weight."""
    followed = known_record(weight).group.root().followed
    return next(own for (*its_shape, _), own in followed.items() if tuple(its_shape) == shape)


def canonical(basis):
    """The same in every dtype where that makes no difference: a countsketch is ±1 and 0."""
    if basis is None or basis.projection.kind != "countsketch":
        return basis
    projection = dataclasses.replace(basis.projection, dtype=torch.float32)
    return dataclasses.replace(basis, projection=projection)


def interrupt(_):
    raise Interruption


# --- many runs -----------------------------------------------------------------------------------


@contextlib.contextmanager
def many_graphs():
    """Each set of frozen layers is another graph of the same function."""
    torch._dynamo.reset()
    # torch 2.11 overlooks by default that weights are frozen.
    settings = {"recompile_limit": 64, "skip_tensor_guards_with_matching_dict_tags": False}
    with torch._dynamo.config.patch(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def run_sequence(settings, seed, counts):
    """What differs in it, with the last operations; None if nothing does."""
    run = Run(settings, seed)
    try:
        for _ in range(OPERATIONS):
            run.operate()
    except Difference as difference:
        return f"seed {seed}: {difference} after {', '.join(run.log[-12:])} ({run.algorithm})"
    finally:
        counts.update(run.counts)
        counts["(meetings)"] += run.reference.meetings
        counts["(tracked projections changed)"] += run.reference.changes
    return None


@pytest.mark.parametrize(
    "block", [*range(4), *(pytest.param(block, marks=pytest.mark.long) for block in (4, 5))]
)
def test_random_runs_agree_with_plain_mathematics(block):
    counts = collections.Counter()
    with many_graphs():
        settings = Settings(block)
        seeds = range(block * SEQUENCES, block * SEQUENCES + 6)
        differences = [run_sequence(settings, seed, counts) for seed in seeds]
    assert not any(differences), "\n".join(filter(None, differences))
    assert counts["(sketched)"], "nothing was sketched"
    assert counts["(projections changed)"]


@pytest.mark.long
@pytest.mark.parametrize("block", [2, 5])  # drawn, and tracked
def test_random_runs_of_recorded_graphs_agree_or_raise(monkeypatch, block):
    """CUDA graphs have projections in place: a late backward pass raises, and is never wrong."""
    monkeypatch.setattr(_torch, "records_cuda_graphs", lambda *_: True)
    counts = collections.Counter()
    with many_graphs():
        settings = Settings(block)
        seeds = range(block * SEQUENCES, block * SEQUENCES + 12)
        differences = [run_sequence(settings, seed, counts) for seed in seeds]
    assert any(found is None for found in differences)
    assert any(differences)
    for found in filter(None, differences):
        assert "modified by an inplace operation" in found
    assert counts["(projections changed)"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=20000, help="how many at least")
    parser.add_argument("--first", type=int, default=0, help="the first sequence's seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts, differences, seed, settings = collections.Counter(), [], arguments.first, None
    start = time.perf_counter()
    done = 0
    while done < arguments.operations:
        with many_graphs():
            settings = Settings(seed // SEQUENCES)
            while done < arguments.operations:
                differences.append(run_sequence(settings, seed, counts))
                done = sum(n for name, n in counts.items() if name[0] != "(")
                seed += 1
                if seed % SEQUENCES == 0:
                    break
            found = sum(map(bool, differences))
            took = time.perf_counter() - start
            print(f"{done} operations, {found} differences, {took:.0f} s: {settings.config}")
    print(f"{len(differences)} runs; " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    print("\n".join(filter(None, differences)) or "no differences")


if __name__ == "__main__":
    main()
