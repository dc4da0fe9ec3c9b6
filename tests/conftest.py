"""Settings of every test: quiet, few threads, seeded, and the slow tests last."""

import os
import sys

import hypothesis
import pytest

# TensorFlow reads these when it is first imported, which is after this file. Under pytest-xdist the
# workers share the cores, so that each gets one thread.
_THREADS = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", _THREADS)
os.environ.setdefault("TF_NUM_INTEROP_THREADS", _THREADS)
os.environ.setdefault("OMP_NUM_THREADS", _THREADS)
os.environ.setdefault("MPLBACKEND", "Agg")

# TensorFlow traces at first sight of a shape: no deadline holds, and few examples must do.
hypothesis.settings.register_profile(
    "tfgrow",
    deadline=None,
    max_examples=20,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("tfgrow"), derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "tfgrow")


def pytest_collection_modifyitems(items):
    """Puts the tests marked slow last, otherwise in the order they were found."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


class FreshKeras:
    """Every test and docstring example starts alike: seed 0, layer names from 0, float32.

    A plugin rather than a fixture, so that it reaches the docstrings outside of this folder.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self):
        if "keras" not in sys.modules:  # tests that only read sources do not wait for TensorFlow
            return
        import keras

        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy("float32")


@pytest.fixture
def rng():
    """Random numbers that no other test draws from: workers share the tests out anew each run."""
    import numpy as np

    return np.random.default_rng(0)


def pytest_configure(config):
    config.pluginmanager.register(FreshKeras(), "fresh-keras")
