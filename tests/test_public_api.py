"""The public surface is the list below: a name comes or goes by decision, not by accident."""

import inspect
import types

import pytest

import tfgrow

FUNCTIONS = {
    "apply",
    "candidates",
    "convert",
    "deepen",
    "export",
    "find_sites",
    "measure_change",
    "strip",
    "prune",
    "widen",
}
CLASSES = {"GaussNewtonEstimator", "GaussNewtonOracle", "Growable"}
VALUES = {"Candidate", "GrowthEvent", "Interaction", "Journal", "Site"}  # what the calls give back
NAMESPACES = {
    "callbacks": {"Growth"},
    "layers": {"BatchNormalization", "Conv1D", "Conv2D", "Conv3D", "Dense", "DepthwiseConv2D"},
    "schedules": {"OnPlateau"},
    "strategies": {
        "Firefly",
        "GradMax",
        "Net2Net",
        "RandomUnits",
        "Splitting",
        "Strategy",
        "Tiny",
        "Uniform",
    },
}
NAMES = FUNCTIONS | CLASSES | VALUES | set(NAMESPACES)

# The leading parameters of the fixed calls: they may gain arguments with defaults, never lose any.
SIGNATURES = {
    "GaussNewtonEstimator": ("model", "loss", "curvature"),
    "apply": ("model", "candidates"),
    "candidates": ("model", "morphisms", "sites"),
    "convert": ("model",),
    "deepen": ("model", "after", "kind"),
    "export": ("model", "path"),
    "find_sites": ("model",),
    "measure_change": ("model", "candidates", "dataset"),
    "strip": ("model",),
    "prune": ("model", "layer", "units"),
    "widen": ("model", "layer", "units"),
}
METHODS = {
    "interaction": ("candidates", "dataset"),
    "joint_change": ("candidates", "dataset"),
    "learn": ("candidates", "dataset", "steps"),
    "score": ("candidates", "dataset"),
}


def parameters(function):
    """The parameters of a call, `self` left out."""
    found = inspect.signature(function).parameters.values()
    return [parameter for parameter in found if parameter.name != "self"]


def assert_callable_as(function, expected):
    """`function` takes `expected` by position, and asks for nothing more."""
    found = parameters(function)
    positional = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    assert len(positional) >= len(expected), f"{function.__name__} takes {found}, not {expected}"
    beyond = set(found) - set(positional[: len(expected)])
    required = [
        p.name
        for p in beyond
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    assert not required, f"{function.__name__} asks for {required} beyond {expected}"


def test_all_is_exactly_the_list():
    assert set(tfgrow.__all__) - {"__version__"} == NAMES
    assert len(tfgrow.__all__) == len(set(tfgrow.__all__))


def test_nothing_public_besides_all_but_modules():
    leaked = {
        name
        for name, value in vars(tfgrow).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert leaked <= NAMES


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_function(name):
    assert inspect.isfunction(getattr(tfgrow, name))


@pytest.mark.parametrize("name", sorted(CLASSES | VALUES))
def test_class(name):
    assert inspect.isclass(getattr(tfgrow, name))


@pytest.mark.parametrize("namespace", sorted(NAMESPACES))
def test_namespace(namespace):
    module = getattr(tfgrow, namespace)
    assert isinstance(module, types.ModuleType)
    missing = {name for name in NAMESPACES[namespace] if not inspect.isclass(getattr(module, name))}
    assert not missing


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signature(name):
    assert_callable_as(getattr(tfgrow, name), SIGNATURES[name])


@pytest.mark.parametrize("name", sorted(METHODS))
def test_estimator_method(name):
    assert_callable_as(getattr(tfgrow.GaussNewtonEstimator, name), METHODS[name])


def test_calls_of_the_guide_bind():
    """The keyword calls that users write, as the guide writes them."""
    inspect.signature(tfgrow.GaussNewtonOracle).bind(
        objective="val_loss", morphisms=("split", "add"), max_params=60_000
    )
    inspect.signature(tfgrow.callbacks.Growth).bind(object(), data=object(), every=2)
    inspect.signature(tfgrow.callbacks.Growth).bind(object(), data=object(), when=object())
    inspect.signature(tfgrow.candidates).bind(object(), morphisms=("split", "add"), sites=None)
    inspect.signature(tfgrow.GaussNewtonEstimator).bind(object(), loss=None, curvature="auto")
    inspect.signature(tfgrow.GaussNewtonEstimator.learn).bind(object(), [], object(), steps=100)
    inspect.signature(tfgrow.schedules.OnPlateau).bind("val_loss")
    inspect.signature(tfgrow.widen).bind(object(), "conv1", 8)


@pytest.mark.parametrize("name", sorted(FUNCTIONS | CLASSES))
def test_documented_with_an_example(name):
    documentation = inspect.getdoc(getattr(tfgrow, name)) or ""
    assert ">>>" in documentation, f"tfgrow.{name} needs a docstring with an example that runs"
