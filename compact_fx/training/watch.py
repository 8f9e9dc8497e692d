"""What a run would not tell by itself: calls without sketches, and steps that nobody saw."""

from collections import Counter

from compact_fx import _torch
from compact_fx.errors import warn_at_caller

Energies = list[tuple[int, float]]
"""Steps of the weight, and the share of its gradient's energy that P held until then."""

STEPS_UNSEEN = (
    "no optimizer step of the compiled weights was seen, although their values change: projections "
    "stay as they are. Where no torch.optim.Optimizer holds the model's own parameters (master "
    "copies, one flat parameter, updates by hand), call "
    "compact_fx.count_step(model.parameters()) after each step"
)


class Watch:
    """Of one backend; its report reads it. Each thing is warned of once.

    Attributes:
        unsketched: reason → how many calls or optimizer steps went without sketches for it.
        steps_unseen: whether weights change and no step of them was seen.
        energies: first weight of each tracked projection → steps, and the share ‖G P‖² / ‖G‖² of
            its gradients that P held until then.
    """

    def __init__(self) -> None:
        self.unsketched: Counter[str] = Counter()
        self.steps_unseen = False
        self.energies: dict[str, Energies] = {}
        self._is_dense = False
        self._limit_hits = _torch.recompile_limit_hits()

    def energies_of(self, weight: str, so_far: Energies) -> Energies:
        """Where those of a tracked projection go on, by the name of its first weight."""
        return self.energies.setdefault(weight, so_far)

    def expect(self, reason: str) -> None:
        """A graph is compiled without sketches, and a warning has said so."""
        self.unsketched[reason] += 0

    def ran_unsketched(self, reason: str) -> None:
        """A call of a graph that was compiled without sketches."""
        if reason not in self.unsketched:
            warn_at_caller(f"the model runs without sketches: {reason}")
        self.unsketched[reason] += 1

    def stepped_unsketched(self) -> None:
        """An optimizer has used gradients that no sketched graph has made."""
        if _torch.recompile_limit_hits() > self._limit_hits:
            reason = (
                "Dynamo has reached its limit of recompilations, and runs eagerly what is not "
                "compiled yet (dynamic=True makes fewer graphs, Dynamo's config.recompile_limit "
                "allows more)"
            )
        else:
            reason = "gradients came from elsewhere: an eager run, or another compilation"
        self.ran_unsketched(reason)

    def stepped_densely(self, optimizer: str) -> None:
        """An optimizer that does not know factors has stepped sketched gradients."""
        if not self._is_dense:
            warn_at_caller(
                f"{optimizer} makes sketched gradients dense: gradients and moments take the "
                "memory of full ones, and moments do not follow a projection that changes, which "
                f"costs quality. Use CompactAdamW or compact_optimizer({optimizer}, ...), or "
                "gradients='dense'"
            )
        self._is_dense = True

    def nobody_steps(self) -> None:
        """The weights change, and no optimizer was seen to step them."""
        if not self.steps_unseen:
            warn_at_caller(STEPS_UNSEEN)
        self.steps_unseen = True
