"""Random runs against the same mathematics written plainly: losses, gradients and weights agree.

Each sequence of operations comes from one integer. The reference knows nothing of graphs, sketched
gradients or the package's optimizers: eager autograd gives exact gradients G; factors G P, moments
and steps are kept here. What it asks of the package is P itself, and of a plan, which P is whose.

`python tests/compact_fx/test_random_runs.py --operations 20000` runs as many as you like.
"""

import argparse
import collections
import contextlib
import copy
import functools
import io
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
    compact_backend,
    compact_optimizer,
    set_steps,
)

SEQUENCES = 25  # of one model and backend: compiling takes longer than running them
OPERATIONS = 60  # in a sequence
KINDS = ("countsketch", "gaussian", "rademacher", "sparse", "orthogonal")


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


def factors_first(name, tensor):
    """The weight, or what has its shape, with in_features last."""
    return tensor.T if name == "matrix" else tensor


# --- settings ------------------------------------------------------------------------------------


class Settings:
    """Model and backend of a block of sequences; graphs are compiled once for all of them."""

    def __init__(self, block: int) -> None:
        choose = random.Random(f"block {block}")
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
            "place": choose.choice(["auto", "early", "late"]),
            "recompute": choose.random() < 0.5,
        }
        self.backend = compact_backend(**self.config, inner="aot_eager", strict=True)
        self.plans = {}  # by the frozen layers, which graphs depend on

    def make_model(self, seed):
        torch.manual_seed(seed)
        return self.model_class().to(self.dtype)

    def note_plans(self, count, frozen):
        """Remember the plan of a graph that has just been compiled for these frozen layers."""
        for plan in self.backend.plans[count:]:
            projections = {}  # a weight's: which, and the weight that says when it changes
            for site in plan.sketched:
                owner = next(s.weight for s in plan.sketched if s.projection == site.projection)
                projections[site.weight] = (plan.projections[site.projection], owner)
                assert not site.reason, site
            assert self.plans.setdefault(frozen, projections) == projections

    @functools.cache  # noqa: B019 - as long as the settings
    def matrix(self, basis):
        projection, generation = basis
        return projection(self.config["seed"], generation)


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

Basis = tuple[Projection, int]  # and how often it has changed


@dataclass
class Gradient:
    """A sum of G P Pᵀ, with the exact G by the projection; None is no projection."""

    parts: dict[Basis | None, Tensor] = field(default_factory=dict)

    def add(self, basis, exact):
        self.parts[basis] = self.parts[basis] + exact if basis in self.parts else exact

    def scale(self, number):
        self.parts = {basis: exact * number for basis, exact in self.parts.items()}


class Reference:
    """Weights, gradients, moments, steps and the loss scale, after the definitions."""

    def __init__(self, settings, algorithm, model, groups):
        self.settings, self.algorithm = settings, algorithm
        self.model = model
        self.groups = copy.deepcopy(groups)
        self.steps = {name: 0 for name, _ in model.named_parameters()}
        self.gradients = {}  # of those that have one
        self.state = {}
        self.loss_scale, self.good_steps = 2.0**8, 0

    def __deepcopy__(self, memo):
        result = copy.copy(self)
        for name in ("model", "groups", "steps", "gradients", "state"):
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

    def bases(self, projections):
        """The projection that each weight has now."""
        generation = {name: steps // self.settings.interval for name, steps in self.steps.items()}
        return {name: (p, generation[owner]) for name, (p, owner) in projections.items()}

    def backward(self, loss, names, bases):
        names = sorted(names & self.trainable())
        exact = torch.autograd.grad(loss, [self.weights[name] for name in names])
        for name, g in zip(names, exact, strict=True):
            self.gradients.setdefault(name, Gradient()).add(bases.get(name), g)

    def dense(self, name):
        """Σ G P Pᵀ."""
        total = torch.zeros_like(self.weights[name])
        for basis, exact in self.gradients[name].parts.items():
            if basis is None:
                total = total + exact
            else:
                p = self.settings.matrix(basis)
                total += factors_first(name, factors_first(name, exact) @ p @ p.T)
        return total

    def sketched_basis(self, name):
        """Of a gradient that reaches the optimizer as a factor."""
        bases = list(self.gradients[name].parts)
        return bases[0] if self.settings.sketched and len(bases) == 1 else None

    def is_mixed(self, name):
        return self.settings.sketched and len(self.gradients[name].parts) > 1

    @torch.no_grad()
    def step(self):
        for group in self.groups:
            for name in group["names"]:
                if name in self.gradients:
                    self.step_weight(name, group)
                    self.steps[name] += 1

    def step_weight(self, name, group):
        weight, state = self.weights[name], self.state.setdefault(name, {})
        basis = self.sketched_basis(name) if self.algorithm.compact else None
        decay, adam = group["weight_decay"], self.algorithm.adam
        sign = -1.0 if self.algorithm.options["maximize"] else 1.0
        if basis is None:
            lr = group["lr"] * group.get("dense_scale", 1.0)
            gradient = sign * self.dense(name) + (0.0 if adam else decay * weight)
            update = self.update(state, gradient, lr)
        else:
            lr, p = group["lr"], self.settings.matrix(basis)
            if state and state["basis"] != basis:
                self.change_basis(state, p)
            exact = factors_first(name, self.gradients[name].parts[basis])
            w = factors_first(name, weight)
            factor = sign * exact @ p + (0.0 if adam else decay * w @ p)
            update = group["scale"] * self.update(state, factor, lr) @ p.T
            update = factors_first(name, update)
            state["basis"] = basis
        weight.mul_(1 - lr * decay if adam else 1.0).add_(update)

    def change_basis(self, state, p):
        if self.algorithm.refresh == "reset":
            state.clear()
        elif self.algorithm.refresh == "project":
            old = self.settings.matrix(state["basis"])
            state["first"] = state["first"] @ (old.T @ p)

    def update(self, state, gradient, lr):
        """What Adam or SGD adds, and their moments."""
        options = self.algorithm.options
        if not self.algorithm.adam:
            momentum = options.get("momentum", 0.0)
            old = state.get("first")
            kept = gradient * (1 - options.get("dampening", 0.0))
            state["first"] = gradient if old is None or not momentum else momentum * old + kept
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
        return not all(g.isfinite().all() for own in own for g in own.parts.values())

    def update_scale(self, found_inf):
        self.good_steps = 0 if found_inf else self.good_steps + 1
        if found_inf:
            self.loss_scale *= 0.5
        elif self.good_steps == GROWTH_INTERVAL:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0


GROWTH_INTERVAL = 3


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
        # Otherwise gradients are matrices for the optimizer, and may be sums of anything.
        self.factors = settings.sketched and self.algorithm.compact
        self.tolerance = 1e-9 if settings.dtype is torch.float64 else 2e-4
        if self.algorithm.refresh == "project" and self.factors:
            self.tolerance = max(self.tolerance, 1e-5)  # moments are projected in float32
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
        self.reference = Reference(settings, self.algorithm, copy.deepcopy(model), groups)
        self.take(model, self.algorithm.make(model, groups))
        self.scaler = self.make_scaler()
        self.shape = (3, 5)
        self.pending, self.checkpoints = [], []
        for weight in model.parameters():
            weight.grad = None

    def make_scaler(self):
        return torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=GROWTH_INTERVAL)

    def take(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.step = torch.compile(model, backend=self.settings.backend)
        self.pending = []
        for name, weight in model.named_parameters():
            weight.requires_grad_(layer_of(name) not in self.frozen)
            self.reference.weights[name].requires_grad_(layer_of(name) not in self.frozen)

    def operate(self):
        """One random operation, and the comparison after it."""
        names, weights = zip(*WEIGHTS.items(), strict=True)
        name = self.random.choices(names, weights)[0]
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
        reference = self.reference.weights
        for name, weight in self.model.named_parameters():
            self.close(f"weight {name}", weight.detach(), reference[name].detach())
            has = name in self.reference.gradients
            if has != (weight.grad is not None):
                raise Difference(f"gradient of {name}: {weight.grad is not None}, expected {has}")
            if not has:
                continue
            actual = weight.grad
            if self.reference.sketched_basis(name) is not None and self.algorithm.compact:
                self.counts["(factors compared)"] += 1
                if not isinstance(actual, SketchedGrad) or actual.factor is None:
                    raise Difference(f"gradient of {name} is not sketched: {actual!r}")
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
        count = len(self.settings.backend.plans)
        loss = F.mse_loss(self.step(x), target)
        self.settings.note_plans(count, self.frozen)
        expected = F.mse_loss(self.reference.model(x), target)
        self.close("loss", loss, expected)
        bases = self.reference.bases(self.settings.plans[self.frozen])
        return Pending(loss, expected, self.reference.trainable(), bases)

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
        chosen = self.without_mixing(chosen)
        self.pending = [p for p in self.pending if all(p is not c for c in chosen)]
        self.deliver(chosen)

    def deliver(self, chosen, scale=1.0, factor=1.0):
        total = sum(pending.loss for pending in chosen) * factor
        (self.scaler.scale(total) if scale != 1.0 else total).backward()
        for pending in chosen:
            loss = pending.expected * (factor * scale)
            self.reference.backward(loss, pending.names, pending.bases)

    def mixed(self, chosen):
        """Weights whose gradient would be in two projections."""
        result = set()
        for name in self.reference.trainable():
            gradient = self.reference.gradients.get(name)
            bases = set(gradient.parts) if gradient else set()
            bases |= {p.bases.get(name) for p in chosen if name in p.names}
            if len(bases) > 1:
                result.add(name)
        return result

    def without_mixing(self, chosen, may_fail=True):
        """An optimizer of factors refuses them: mostly avoided, as a person would."""
        if not self.factors or not (mixed := self.mixed(chosen)):
            return chosen
        state, held = self.reference.state, self.reference.held
        refused = all(name in held and "basis" in state.get(name, {}) for name in mixed)
        if may_fail and refused and self.chance(0.3):
            self.counts["(gradients in two projections)"] += 1
            return chosen
        self.zero(set_to_none=True)
        return chosen[:1] if self.mixed(chosen) else chosen

    def eager_backward(self):
        """Without the backend, into the same gradients: an optimizer of factors refuses these."""
        if self.factors:
            return False
        x, target = self.batch()
        loss, expected = (F.mse_loss(m(x), target) for m in (self.model, self.reference.model))
        loss.backward()
        self.reference.backward(expected, self.reference.trainable(), {})
        return None

    def evaluate(self):
        x, _ = self.batch()
        with torch.no_grad():
            self.close("output", self.step(x), self.reference.model(x))

    def resize(self):
        self.shape = self.random.randint(2, 6), self.random.randint(2, 7)

    # --- optimizer ---

    def zero(self, set_to_none, of=None):
        (of or self.model).zero_grad(set_to_none=set_to_none)
        names = self.reference.held if of is self.optimizer else list(self.reference.steps)
        for name in names:
            if set_to_none:
                self.reference.gradients.pop(name, None)
            elif name in self.reference.gradients:
                parts = self.reference.gradients[name].parts
                parts.update({basis: torch.zeros_like(exact) for basis, exact in parts.items()})

    def zero_grad(self):
        of = self.optimizer if self.chance(0.5) else self.model
        self.zero(self.chance(0.6) or self.any_mixed(), of)

    def any_mixed(self):
        return any(map(self.reference.is_mixed, self.reference.gradients))

    def optimizer_step(self):
        if self.factors and any(
            self.reference.is_mixed(n) for n in self.reference.held if n in self.reference.gradients
        ):
            with expected_failure(ValueError):
                self.optimizer.step()
            self.compare()
            self.zero(set_to_none=True)
            return
        self.optimizer.step()
        self.stepped()

    def stepped(self):
        before = dict(self.reference.steps)
        self.reference.step()
        self.pending = []  # weights have changed
        interval = self.settings.interval
        for name, steps in self.reference.steps.items():
            self.counts["(projections changed)"] += steps // interval != before[name] // interval

    def train(self):
        """The usual loop."""
        for _ in range(self.random.randint(1, 3)):
            self.zero(set_to_none=True)
            self.deliver([self.losses()])
            self.optimizer.step()
            self.stepped()
            self.compare()

    def closure(self, fail=False):
        if self.any_mixed():
            self.zero(set_to_none=True)
        zero, calls = self.chance(0.7), []

        def closure():
            calls.append(1)
            if zero:
                self.zero(set_to_none=True, of=self.optimizer)
            losses = self.losses()
            self.deliver(self.without_mixing([losses], may_fail=False))
            if fail:
                raise Interruption
            return losses.loss

        with expected_failure(Interruption) if fail else contextlib.nullcontext():
            self.optimizer.step(closure)
        assert len(calls) == 1
        if not fail:
            self.stepped()

    def failing_closure(self):
        self.closure(fail=True)

    def failing_loss(self):
        """Between forward and backward, or at the start of backward."""
        x, target = self.batch()
        count = len(self.settings.backend.plans)
        with expected_failure(Interruption):
            output = self.step(x)
            self.settings.note_plans(count, self.frozen)
            if self.chance(0.5):
                raise Interruption
            output.register_hook(interrupt)
            F.mse_loss(output, target).backward()

    def clip(self):
        if not self.reference.gradients:
            return False
        gradients = [self.reference.dense(name) for name in self.reference.gradients]
        kind = float("inf") if self.chance(0.2) else 2.0
        norm = torch.stack([torch.linalg.vector_norm(g, kind) for g in gradients]).norm(kind)
        limit = norm.item() * self.random.uniform(0.3, 1.3) + 1e-9
        foreach = self.random.choice([None, True, False])
        actual = nn.utils.clip_grad_norm_(self.model.parameters(), limit, kind, foreach=foreach)
        self.close("norm", actual, norm)
        for gradient in self.reference.gradients.values():
            gradient.scale(min(1.0, limit / (norm.item() + 1e-6)))
        return None

    def clip_value(self):
        """It makes gradients dense, which an optimizer of factors refuses."""
        if self.factors or not self.reference.gradients:
            return False
        limit = self.random.choice([1e-3, 1e-2])
        nn.utils.clip_grad_value_(self.model.parameters(), limit)
        for name in self.reference.gradients:
            clipped = self.reference.dense(name).clamp(-limit, limit)
            self.reference.gradients[name] = Gradient({None: clipped})
        return None

    def scaled_step(self):
        """GradScaler, at times with an overflow."""
        if self.chance(0.8) or self.any_mixed():
            self.zero(set_to_none=self.chance(0.7) or self.any_mixed())
        overflow = self.chance(0.25)
        for number in range(self.random.randint(1, 2)):
            factor = float("inf") if overflow and number == 0 else 1.0
            chosen = self.without_mixing([self.losses()], may_fail=False)
            self.deliver(chosen, self.reference.loss_scale, factor)
        if not any(name in self.reference.gradients for name in self.reference.held):
            self.zero(set_to_none=True)
            return
        clips = self.chance(0.4)
        if clips:
            self.scaler.unscale_(self.optimizer)
        found_inf = self.reference.unscale()
        if clips and not found_inf:
            self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if found_inf:
            self.counts["(steps skipped)"] += 1
            if self.algorithm.options.get("fused"):  # to autograd, it has written into the weights
                self.pending = []
        else:
            self.stepped()
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
        if not self.rest or (self.factors and self.any_mixed()):
            return False
        group = self.rest.pop()
        self.reference.groups.append(copy.deepcopy(group))
        named = dict(self.model.named_parameters())
        params = [named[name] for name in group["names"]]
        self.optimizer.add_param_group({"params": params, **without(group, "names")})
        return None

    # --- weights ---

    def freeze(self):
        """Freeze a layer, or unfreeze it."""
        layer = self.random.choice(self.layers[:2])
        self.frozen ^= {layer}
        for model in (self.model, self.reference.model):
            for name, weight in model.named_parameters():
                if layer_of(name) == layer:
                    weight.requires_grad_(layer not in self.frozen)

    def set_steps(self):
        """Also between a forward and its backward pass."""
        names = list(self.reference.steps)
        names = names if self.chance(0.5) else [self.random.choice(names)]
        steps = self.random.randrange(10)
        set_steps([dict(self.model.named_parameters())[name] for name in names], steps)
        self.reference.steps.update(dict.fromkeys(names, steps))

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
            if self.any_mixed():
                self.zero(set_to_none=True)
            model, optimizer = self.model, self.optimizer
            gradients = self.reference.gradients
        self.log[-1] += " fresh" if fresh else " same"
        state = torch.load(io.BytesIO(checkpoint.file), weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        reference.gradients = gradients
        steps = {name: 0 if fresh else n for name, n in self.reference.steps.items()}
        self.reference, self.rest = reference, list(checkpoint.rest)
        self.carry_steps(model, steps)
        self.take(model, optimizer)
        return None

    def carry_steps(self, model, others):
        """Plain optimizers know nothing of steps, the package's of those of their own weights."""
        for name, weight in model.named_parameters():
            if not self.algorithm.compact:
                set_steps([weight], self.reference.steps[name])
            elif name not in self.reference.held:
                self.reference.steps[name] = others[name]

    def deepcopy(self):
        """Go on with the copy, or with what was copied."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        if self.chance(0.5):
            return
        self.log[-1] += " taken"
        self.carry_steps(model, dict.fromkeys(self.reference.steps, 0))
        self.reference.gradients = {}
        self.take(model, optimizer)


WEIGHTS = {
    "forward": 10,
    "backward": 14,
    "eager_backward": 2,
    "optimizer_step": 12,
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


def interrupt(_):
    raise Interruption


# --- many runs -----------------------------------------------------------------------------------


@contextlib.contextmanager
def many_graphs():
    """Each set of frozen layers is another graph of the same function."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64), warnings.catch_warnings():
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
    return None


@pytest.mark.parametrize("block", range(6))
def test_random_runs_agree_with_plain_mathematics(block):
    counts = collections.Counter()
    with many_graphs():
        settings = Settings(block)
        seeds = range(block * SEQUENCES, block * SEQUENCES + 6)
        differences = [run_sequence(settings, seed, counts) for seed in seeds]
    assert not any(differences), "\n".join(filter(None, differences))
    assert settings.plans[frozenset()], "nothing was sketched"
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
