"""The zoo: what it finds by itself, what it checks of one network, how a sweep goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
from absl import flags

import tfgrow
from experiments import cells, specimen, zoo
from tfgrow.morphisms.registry import MORPHISMS

QUICK = {"images": 8, "batch_size": 4, "steps": 2, "scale": 0.01, "seed": 0}


def parse(*arguments):
    """The values of the binary's flags, as its main would see them."""
    values = flags.FlagValues()
    zoo.define_flags(values)
    values(["program", *arguments])
    return values


def tiny(*, weights, classes, input_shape):
    """A residual stream, a gate, a concatenation and a scale that starts at nothing, in small."""
    assert weights is None
    if input_shape[0] < 40:
        raise ValueError(f"Input size must be at least 40x40; Received: {input_shape}")
    image = keras.Input(input_shape)
    x = keras.layers.Conv2D(4, 3, strides=4, name="stem")(image)
    x = keras.layers.BatchNormalization(name="stem_bn")(x)
    branch = keras.layers.Conv2D(6, 3, padding="same", activation="relu", name="inner")(x)
    x = keras.layers.Add()([x, keras.layers.Conv2D(4, 1, name="outer")(branch)])
    x = keras.layers.ReLU()(x)
    x = keras.layers.Concatenate()([x, keras.layers.Conv2D(3, 1, name="beside")(x)])
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, keras.layers.Dense(classes, "softmax", name="out")(x))


@pytest.fixture(scope="module")
def examined():
    keras.utils.set_random_seed(0)
    return specimen.Specimen(tiny, QUICK).examine()


def test_architectures_are_found():
    found = specimen.architectures()
    assert {"VGG16", "ResNet50V2", "NASNetLarge", "ConvNeXtTiny"} <= set(found)
    assert len(found) > 30
    assert all(callable(build) for build in found.values())
    assert zoo.names() == sorted(found)


def test_smallest_images_are_found():
    assert specimen.built_small(tiny).input_shape == (None, 40, 40, 3)

    def broken(**_):
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        specimen.built_small(broken)


def test_waking_gives_statistics_and_spread_logits():
    model = specimen.built_small(tiny)
    images, labels = specimen.images_for(tiny, model, 16, seed=0)
    assert labels.shape == (16,)
    kept = model.get_layer("stem_bn").momentum
    specimen.wake(model, images)
    norm = model.get_layer("stem_bn")
    assert norm.momentum == kept
    seen = keras.Model(model.input, norm.input)(images).numpy()
    np.testing.assert_allclose(norm.moving_mean, seen.mean((0, 1, 2)), rtol=1e-3, atol=1e-3)
    logits = np.log(specimen.outputs_of(model, images))
    assert np.std(logits, axis=-1).max() == pytest.approx(1.0, rel=0.01)


def test_waking_drops_nothing_out():
    """EfficientNets drop whole branches out: their statistics would be those of another network."""
    image = keras.Input((4, 4, 3))
    dropped = keras.layers.Dropout(0.5, name="drop")(image)
    norm = keras.layers.BatchNormalization(name="norm")
    x = keras.layers.GlobalAveragePooling2D()(norm(dropped))
    model = keras.Model(image, keras.layers.Dense(2, "softmax")(x))
    images = np.random.default_rng(0).normal(2.0, 1.0, (8, 4, 4, 3)).astype("float32")
    specimen.wake(model, images)
    np.testing.assert_allclose(norm.moving_variance, images.var((0, 1, 2)), rtol=1e-4)
    assert model.get_layer("drop").rate == 0.5


def test_waking_switches_branches_on():
    image = keras.Input((2, 2, 3))
    scale = keras.layers.BatchNormalization(center=False, gamma_initializer="ones", name="scale")
    scaled = keras.layers.PReLU(
        alpha_initializer=keras.initializers.Constant(1e-6), shared_axes=[1, 2], name="off"
    )
    x = keras.layers.GlobalAveragePooling2D()(scaled(scale(image)))
    model = keras.Model(image, keras.layers.Dense(2, "softmax")(x))
    specimen.wake(model, np.ones((2, 2, 2, 3), "float32"))
    assert np.all(model.get_layer("off").alpha == np.float32(1e-6)), "not a vector: left alone"

    class Scale(keras.layers.Layer):
        def build(self, shape):
            start = keras.initializers.Constant(1e-6)
            self.gamma = self.add_weight(shape=shape[-1:], initializer=start, name="gamma")

        def call(self, x):
            return x * self.gamma

    x = keras.layers.GlobalAveragePooling2D()(Scale(name="off")(image))
    model = keras.Model(image, keras.layers.Dense(2, "softmax")(x))
    specimen.wake(model, np.ones((2, 2, 2, 3), "float32"))
    np.testing.assert_array_equal(model.get_layer("off").gamma, 1.0)


def test_sites_are_spread():
    sites = tfgrow.find_sites(tfgrow.convert(specimen.built_small(tiny)))
    can = [site for site in sites if site.blocked is None]
    assert [site.name for site in can] == ["stem", "inner", "beside"]
    assert specimen.spread(can) == can
    assert specimen.spread([]) == []


def test_one_network_passes_every_check(examined):
    assert not examined["errors"]
    assert (examined["sites"], examined["layers"], examined["tied"]) == (3, 4, 1)
    assert [examined[name] for name in ("convolutions", "wider", "larger", "either")] == [
        4,
        4,
        3,
        4,
    ]
    assert examined["blocked"] == {
        "layer '...' is an output layer: its width is the model's output": 1
    }
    for name in ("split", "add", "prune"):
        assert examined["morphisms"][name]["places"] == 3
    assert set(examined["morphisms"]) == set(MORPHISMS)
    deviations = zoo.deviations(examined)
    assert {"converted", "taken back", "saved", "exported", "split at theta 0"} <= set(deviations)
    assert max(deviations.values()) < zoo.SAME
    assert zoo.verdict(examined) == "equal"
    assert examined["morphisms"]["add"]["ratio"] == pytest.approx(1.0, rel=0.1)
    assert examined["together"][:2] == ["split", "add"]
    assert "prune" not in examined["together"], "it can't be scaled"
    assert examined["all"]["ratio"] == pytest.approx(1.0, rel=0.2)
    assert examined["params_after"] > 0
    assert examined["peak_gb"] > 0.1
    assert {"build", "convert", "theta 0", "learn", "apply", "export"} <= set(examined["seconds"])


def test_removals_are_judged_one_at_a_time():
    model = tfgrow.convert(tiny(weights=None, classes=3, input_shape=(40, 40, 3)))
    both = [*tfgrow.candidates(model, "add"), *tfgrow.candidates(model, "prune")]
    adds = [row for row, one in enumerate(both) if one.morphism == "add"]
    assert specimen.rows_to_judge(both, "add") == adds
    assert specimen.rows_to_judge(both, "prune") == [len(both) - 1]
    assert specimen.rows_to_judge(both, "skip") == []


def test_a_wrong_edit_is_seen(monkeypatch):
    """Were theta = 0 to change the function, or a phase to fail, the result would say so."""
    monkeypatch.setattr(type(MORPHISMS["add"]), "scaled", lambda self, c, alpha: c.replace(
        theta={name: value + 1.0 for name, value in c.theta.items()}))  # fmt: skip

    def fails(*args, **kwargs):
        raise RuntimeError("out of ink")

    monkeypatch.setattr(tfgrow, "export", fails)
    monkeypatch.setattr(specimen.Specimen, "_learn", fails)
    monkeypatch.setattr(specimen.Specimen, "_score", lambda self: None)
    monkeypatch.setattr(specimen.Specimen, "_apply", lambda self: None)
    found = specimen.Specimen(tiny, QUICK).examine()
    assert found["morphisms"]["add"]["unchanged"] > zoo.SAME
    assert found["morphisms"]["prune"]["unchanged"] < zoo.SAME
    assert set(found["errors"]) == {"learn", "export"}
    assert found["errors"]["export"]["error"] == "RuntimeError: out of ink"
    assert found["saved"] < zoo.SAME, "one failure does not keep the others from being tried"
    assert zoo.verdict({**found, "errors": {}}).startswith("not equal: add at theta 0 ")
    assert "out of ink" in zoo.in_a_line({"model": "tiny", **found})


def test_table_and_page(examined):
    stuck = {
        **examined, "model": "Stuck", "sites": 0, "layers": 0, "morphisms": {}, "blocked": {"x": 2}
    }  # fmt: skip
    results = [{"model": "Tiny", "settings": QUICK, **examined}, {"settings": QUICK, **stuck}]
    columns, rows = zoo.table(results)
    first = dict(zip(columns, rows[0], strict=True))
    assert (first["network"], first["outputs"]) == ("Tiny", "equal")
    assert first["add: estimate/truth"].startswith(f"{examined['morphisms']['add']['ratio']:.2f} (")
    text = zoo.page([*results, zoo._failed(zoo.Cell("Huge", QUICK, "."), MemoryError("16 GB"))])
    assert "| Tiny " in text
    assert "* Stuck: x." in text
    assert "Huge failed. process: MemoryError: 16 GB" in text


def test_a_sweep_goes_on_from_finished_networks(tmp_path, monkeypatch, examined):
    ran = []

    def here(work, cell):
        ran.append(cell.model)
        if cell.model == "VGG19":
            raise MemoryError("killed")
        result = {"model": cell.model, "settings": dict(cell.settings), **examined}
        cell.path.write_text(json.dumps(result))
        return result

    monkeypatch.setattr(zoo, "in_fresh_process", here)
    places = [f"--output_dir={tmp_path}", f"--docs={tmp_path}/zoo.md", "--jobs=1"]
    results = zoo.run(parse("--models=VGG.*", *places))
    assert ran == ["VGG16", "VGG19"]
    assert [bool(one["errors"]) for one in results] == [False, True]
    zoo.run(parse("--models=VGG.*|Xception", *places))
    assert ran == ["VGG16", "VGG19", "VGG19", "Xception"], "what failed is tried again"
    assert "| VGG16 " in (tmp_path / "zoo.md").read_text()
    assert len((tmp_path / "zoo.csv").read_text().splitlines()) == 4
    with pytest.raises(ValueError, match="other settings"):
        zoo.run(parse("--models=VGG16", "--steps=9", *places))
    with pytest.raises(ValueError, match="names none of"):
        zoo.run(parse("--models=AlexNet", *places))
    with pytest.raises(flags.IllegalFlagValueError, match="models"):
        parse("--models=(")


def test_a_cell_ends_with_the_run_that_began_it(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, pathlib, time\n"
        "from experiments.cells import in_fresh_process\n"
        "def work(path):\n"
        "    pathlib.Path(path).write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        f"    in_fresh_process(work, {str(tmp_path / 'pid')!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = subprocess.Popen([sys.executable, str(script)], env=environment)
    told = tmp_path / "pid"
    wait_until(lambda: told.exists() and told.read_text())
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_until(lambda: not os.path.exists(f"/proc/{told.read_text()}"))


def wait_until(true, most=30.0):
    limit = time.monotonic() + most
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_cells_are_named_by_network(tmp_path):
    cell = zoo.Cell("VGG16", QUICK, str(tmp_path))
    assert cell.path == tmp_path / "VGG16.json"
    assert cells.load(cell) is None


@pytest.mark.slow
def test_a_real_architecture_passes_every_check():
    keras.utils.set_random_seed(0)
    made = specimen.architectures()["MobileNetV2"]
    found = specimen.Specimen(made, {**QUICK, "images": 16}).examine()
    assert not found["errors"]
    assert zoo.verdict({"model": "MobileNetV2", **found}) == "equal"
    assert found["sites"] >= 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["ResNet50V2", "MobileNetV2", "MobileNetV3Small", "MobileNetV3Large", "EfficientNetV2B0",
     "DenseNet121", "InceptionV3", "Xception", "VGG16"],
)  # fmt: skip
def test_most_convolutions_of_real_architectures_are_in_sites(name):
    stock = specimen.built_small(specimen.architectures()[name])
    model = tfgrow.convert(stock)
    x = np.random.default_rng(0).uniform(size=(2, *stock.input_shape[1:])).astype("float32")
    expected = np.asarray(stock(x, training=False))
    np.testing.assert_allclose(model(x, training=False), expected, atol=1e-4)
    free = [site for site in tfgrow.find_sites(model) if site.blocked is None]
    inside = {layer for site in free for layer in specimen.layers_that_widen(site)}
    mixing = (tfgrow.layers.Conv2D, tfgrow.layers.Conv2DTranspose)
    convolutions = [layer for layer in model.layers if "Conv" in type(layer).__name__]
    assert sum(layer.name in inside for layer in convolutions) > 0.9 * len(convolutions)
    made = {node.name for site in free for node in site.producers}
    own = [layer for layer in convolutions if isinstance(layer, mixing)]
    assert sum(layer.name in made for layer in own) > 0.9 * len(own)


@pytest.mark.slow
def test_all_convolutions_of_convnext_can_grow():
    """LayerNormalization holds the channels of its stages together: they grow by doubling."""
    build = specimen.architectures()["ConvNeXtTiny"]
    model = tfgrow.convert(build(weights=None, input_shape=(224, 224, 3), classes=10))
    sites = tfgrow.find_sites(model)
    convolutions = {layer.name for layer in model.layers if "Conv" in type(layer).__name__}
    assert len(convolutions) == 22
    stages = [site for site in sites if site.doubles]
    assert [site.units for site in stages] == [96, 192, 384, 768]
    assert convolutions <= {layer for site in stages for layer in specimen.layers_that_widen(site)}
    hidden = [site for site in sites if site.blocked is None]
    assert len(hidden) == 18, "the hidden layers of all blocks"
    larger = {layer for site in sites for layer in specimen.layers_with_larger_kernels(site)}
    assert len(larger & convolutions) == 18, "all depthwise ones"


def test_networks_run_side_by_side(tmp_path, monkeypatch, examined):
    both = threading.Barrier(2, timeout=10)

    def here(work, cell):
        both.wait()  # breaks if they came one after the other
        return {"model": cell.model, "settings": dict(cell.settings), **examined}

    monkeypatch.setattr(zoo, "in_fresh_process", here)
    cells_of_two = [zoo.Cell(name, QUICK, str(tmp_path)) for name in ("VGG16", "VGG19")]
    found = zoo.sweep(cells_of_two, jobs=2)
    assert [one["model"] for one in found] == ["VGG16", "VGG19"]
    assert not any(one["errors"] for one in found)


def test_rounding_is_told_from_error_in_double_precision(examined):
    keras.utils.set_random_seed(0)
    model = tfgrow.convert(specimen.built_small(tiny))
    images, _ = specimen.images_for(tiny, model, 4, seed=0)
    double = specimen.in_double(model)
    assert {weight.dtype for weight in double.weights} == {"float64"}
    assert 0 < specimen.difference(np.asarray(double(images)), np.asarray(model(images))) < zoo.SAME
    before = specimen.outputs_of(double, images)
    found = specimen.changed_in_double(model, "prune", ["inner"], images, before)
    assert found < zoo.SAME_IN_DOUBLE

    def after(**found):
        morphisms = {**examined["morphisms"], "prune": {"places": 1, **found}}
        return zoo.verdict({"model": "Tiny", **examined, "morphisms": morphisms})

    assert after(unchanged=2e-4, **{"in double": 1e-12}).startswith("equal up to rounding: prune")
    assert after(unchanged=2e-4, **{"in double": 2e-4}) == "not equal: prune at theta 0 2.0e-04"
    assert after(unchanged=2e-4) == "not equal: prune at theta 0 2.0e-04"


def test_a_served_network_that_rounds_otherwise_is_exported_again_in_double(examined):
    found = specimen.Specimen(tiny, QUICK, same=-1.0)  # whatever single precision gives
    result = found.examine()
    assert not result["errors"]
    assert result["in double"]["exported"] < zoo.SAME_IN_DOUBLE

    def verdict(**double):
        return zoo.verdict({**examined, "model": "A", "exported": 2e-4, "in double": double})

    assert verdict(exported=1e-12).startswith("equal up to rounding: exported 2.0e-04, 1.0e-12")
    assert verdict(exported=1e-5) == verdict() == "not equal: exported 2.0e-04"


def test_an_error_shows_in_double_precision_too(monkeypatch):
    keras.utils.set_random_seed(0)
    model = tfgrow.convert(specimen.built_small(tiny))
    images, _ = specimen.images_for(tiny, model, 4, seed=0)
    monkeypatch.setattr(type(MORPHISMS["add"]), "scaled", lambda self, c, alpha: c.replace(
        theta={name: value + 1.0 for name, value in c.theta.items()}))  # fmt: skip
    before = specimen.outputs_of(specimen.in_double(model), images)
    found = specimen.changed_in_double(model, "add", ["inner"], images, before)
    assert found > zoo.SAME_IN_DOUBLE
