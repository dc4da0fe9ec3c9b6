"""What a growth step may spend, and by what gains are compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from tfgrow._checks import require_whole
from tfgrow.types import Cost


def up_to_multiple(units: int, multiple: int) -> int:
    """How many more units bring a width to its next multiple; one of it, if it is one already."""
    return -units % multiple or multiple


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a selection may spend.

    Attributes:
      params: most parameters it may add; None is unlimited.
      flops: most inference FLOPs per sample it may add; None is unlimited.
      edits: most candidates it may choose; None is unlimited.
      min_gain_per_param: choosing stops where the marginal gain (loss per sample) per parameter
        (per FLOP where only those count, see `prices`) falls under this.
      step: whether it is the share of one step, not the whole budget, that bounds `params`.
      round_to: the final width of every site it touches is a multiple of this; None or 1 is free.
      prices: what a parameter and a FLOP count when gains are compared; by default only parameters
        count, or only FLOPs if only those are limited.
      cost_exponent: gains are compared per cost to the power of this: 1 is gain per parameter, 0
        counts gains as they are. Returns diminish: of what a step may spend, a site whose units
        cost a tenth would get ten times as many, and they bring less than ten times as much.
    """

    params: int | None = None
    flops: int | None = None
    edits: int | None = None
    min_gain_per_param: float = 0.0
    round_to: int | None = None
    step: bool = False
    prices: tuple[float, float] | None = None
    cost_exponent: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("params", 0), ("flops", 0), ("edits", 0), ("round_to", 1)):
            require_whole(name, getattr(self, name), least)
        gain = self.min_gain_per_param
        if not isinstance(gain, (int, float)) or not (math.isfinite(gain) and gain >= 0):
            raise ValueError(f"min_gain_per_param must be a finite number >= 0. Found: {gain!r}")
        power = self.cost_exponent
        if not isinstance(power, (int, float)) or not 0 <= power <= 1:
            raise ValueError(f"cost_exponent must be a number from 0 to 1. Found: {power!r}")
        prices = (1.0, 0.0) if self.prices is None else self.prices
        if len(prices) != 2 or not all(0 <= one < math.inf for one in prices) or not any(prices):
            raise ValueError(
                f"prices must be two finite numbers >= 0, not both 0. Found: {self.prices!r}"
            )

    def allow(self, cost: Cost, edits: int = 0) -> bool:
        """Whether so much may be spent; what costs nothing always may."""
        return not self.exceeded(cost, edits)

    def exceeded(self, cost: Cost, edits: int = 0) -> list[str]:
        """Which of `"params"`, `"flops"`, `"edits"` so much would exceed."""
        spent = {"params": cost.params, "flops": cost.flops, "edits": edits}
        limits = {name: getattr(self, name) for name in spent}
        return [
            name
            for name, limit in limits.items()
            if limit is not None and spent[name] > max(0, limit)
        ]

    def said(self, names: Iterable[str]) -> str:
        """That some of `"params"`, `"flops"`, `"edits"` are in the way, in words."""
        in_all = f"budget of {self.params} extra parameters reached"
        in_step = f"growth_per_step allows {self.params} more parameters in this step"
        words = {
            "params": in_step if self.step else in_all,
            "flops": f"budget of {self.flops} extra FLOPs reached",
            "edits": f"limit of {self.edits} edits reached",
        }
        return " and ".join(words[name] for name in names)

    def price(self, cost: Any) -> Any:
        """What gains are divided by when they are compared; `params` and `flops` may be arrays."""
        of_param, of_flop = self._prices
        return of_param * cost.params + of_flop * cost.flops

    @property
    def unit(self) -> str:
        """What `min_gain_per_param` is per: `"params"`, or `"flops"` if only those count."""
        return "params" if self._prices[0] else "flops"

    @property
    def unit_name(self) -> str:
        """One of them, in words."""
        return "parameter" if self.unit == "params" else "FLOP"

    @property
    def _prices(self) -> tuple[float, float]:
        only_flops = self.params is None and self.flops is not None
        return self.prices or ((0.0, 1.0) if only_flops else (1.0, 0.0))
