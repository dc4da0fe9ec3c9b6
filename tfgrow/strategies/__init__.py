"""Other ways to grow, behind the interface of the Gauss-Newton oracle, each written from its paper.

tfgrow.callbacks.Growth("net2net", data=train_ds, every=2)
tfgrow.callbacks.Growth(tfgrow.strategies.Uniform(max_params=60_000), data=train_ds)
"""

from tfgrow.strategies.base import Strategy
from tfgrow.strategies.firefly import Firefly
from tfgrow.strategies.gradmax import GradMax
from tfgrow.strategies.net2net import Net2Net
from tfgrow.strategies.random_units import RandomUnits
from tfgrow.strategies.registry import get, register_strategy
from tfgrow.strategies.splitting import Splitting
from tfgrow.strategies.tiny import Tiny
from tfgrow.strategies.uniform import Uniform

__all__ = [
    "Firefly",
    "GradMax",
    "Net2Net",
    "RandomUnits",
    "Splitting",
    "Strategy",
    "Tiny",
    "Uniform",
    "get",
    "register_strategy",
]
