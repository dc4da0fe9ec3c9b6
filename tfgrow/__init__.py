"""tfgrow: grow any Keras model while it trains.

The pipeline, each arrow a frozen value (see `tfgrow/types.py`):

    model --graph--> Site --capture--> Capture --curvature--> quadratic --morphisms--> Candidate
          --oracle--> Plan --surgery--> GrowthEvent --journal--> Journal

In an ordinary `model.fit`:

    model = tfgrow.convert(stock_model)
    model.compile("adam", loss)
    oracle = tfgrow.GaussNewtonOracle(max_params=60_000)
    growth = tfgrow.callbacks.Growth(oracle, data=train_ds, every=2)
    model.fit(train_ds, epochs=30, callbacks=[growth])
    tfgrow.strip(model).save("plain.keras")
    tfgrow.export(model, "saved_models/mine/1")
"""

from tfgrow import callbacks, layers, schedules, strategies
from tfgrow.deepening import deepen
from tfgrow.estimator import GaussNewtonEstimator
from tfgrow.export import export
from tfgrow.graph.convert import convert, strip
from tfgrow.graph.sites import Site, find_sites
from tfgrow.growth import apply, prune, widen
from tfgrow.journal import Journal
from tfgrow.layers.growable import Growable
from tfgrow.measure import measure_change
from tfgrow.morphisms.base import Candidate
from tfgrow.morphisms.registry import candidates
from tfgrow.oracle.gauss_newton import GaussNewtonOracle
from tfgrow.types import GrowthEvent, Interaction

__version__ = "0.1.0"

__all__ = [
    "Candidate",
    "GaussNewtonEstimator",
    "GaussNewtonOracle",
    "Growable",
    "GrowthEvent",
    "Interaction",
    "Journal",
    "Site",
    "apply",
    "callbacks",
    "candidates",
    "convert",
    "deepen",
    "export",
    "find_sites",
    "layers",
    "measure_change",
    "prune",
    "schedules",
    "strategies",
    "strip",
    "widen",
]
