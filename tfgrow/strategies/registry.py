"""The strategies by name. A new one is one file and one row."""

from __future__ import annotations

from typing import Any

from tfgrow.oracle.base import GrowthOracle
from tfgrow.oracle.gauss_newton import GaussNewtonOracle
from tfgrow.strategies.firefly import Firefly
from tfgrow.strategies.gradmax import GradMax
from tfgrow.strategies.net2net import Net2Net
from tfgrow.strategies.random_units import RandomUnits
from tfgrow.strategies.splitting import Splitting
from tfgrow.strategies.tiny import Tiny
from tfgrow.strategies.uniform import Uniform

STRATEGIES: dict[str, type[GrowthOracle]] = {
    "firefly": Firefly,
    "gauss_newton": GaussNewtonOracle,
    "gradmax": GradMax,
    "net2net": Net2Net,
    "random": RandomUnits,
    "splitting": Splitting,
    "tiny": Tiny,
    "uniform": Uniform,
}


def get(identifier: str | GrowthOracle, **settings: Any) -> GrowthOracle:
    """An oracle by name, made with some settings, or the one given.

    Args:
      identifier: one of `"firefly"`, `"gauss_newton"`, `"gradmax"`, `"net2net"`, `"random"`,
        `"splitting"`, `"tiny"`, `"uniform"`, or an oracle.
      **settings: of an oracle named: `max_params`, `growth_per_step`, `seed`...

    Raises:
      ValueError: for an unknown name, or settings beside an oracle that is made already.
      TypeError: for what is neither.

    Example:

    >>> import tfgrow
    >>> tfgrow.strategies.get("uniform", max_params=60_000).max_params
    60000
    """
    if isinstance(identifier, GrowthOracle):
        if settings:
            raise ValueError(
                f"{type(identifier).__name__} is made already; found settings {sorted(settings)} "
                "beside it. Give them where it is made."
            )
        return identifier
    if not isinstance(identifier, str):
        raise TypeError(
            "oracle must be a growth oracle such as tfgrow.GaussNewtonOracle, or the name of one: "
            f"{', '.join(sorted(STRATEGIES))}. Found: {type(identifier).__name__}"
        )
    if identifier not in STRATEGIES:
        raise ValueError(
            f"Unknown oracle {identifier!r}; expected one of {sorted(STRATEGIES)}, or an oracle."
        )
    return STRATEGIES[identifier](**settings)


def register_strategy(name: str, strategy: type[GrowthOracle]) -> None:
    """Makes a strategy of your own known by a name."""
    STRATEGIES[name] = strategy
