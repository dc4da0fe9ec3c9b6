"""New layers in a live model: what Keras shows, optimizer, files, fit, rollback, refusals."""

import gc
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.surgery.hand_made import (
    OPTIMIZERS,
    assert_like_fresh,
    assert_same_bits,
    assert_trains_on_like_its_file,
    batch,
    convolutional_net,
    live_variables,
    photograph,
    slot_kind,
    trained_net,
    values,
)
from tfgrow.graph.versions import version_of
from tfgrow.surgery import insert, rebuild
from tfgrow.surgery import optimizer as slots
from tfgrow.surgery.insert import add_branch, insert_after
from tfgrow.surgery.transaction import growth_transaction

layers = keras.layers


def conv(name="new", **arguments):
    return layers.Conv2D(3, 3, padding="same", name=name, **arguments)


def long_branch(tensor):
    """Deep enough to move the old layers' order: those beside it come later now."""
    for index in range(3):
        tensor = layers.Dense(3, activation="tanh", name=f"long{index}")(tensor)
    return tensor


def two_ways(**compile_arguments):
    """Two branches, whose layers' order follows their depth, and two outputs."""
    inputs = keras.Input((4,), name="x")
    stem = layers.Dense(3, name="stem")(inputs)
    left = layers.Dense(3, activation="relu", name="left1")(stem)
    left = layers.Dense(3, name="left2")(left)
    right = layers.Dense(3, name="right")(stem)
    both = layers.Add(name="both")([left, right])
    model = keras.Model(inputs, [layers.Dense(2, name="out")(both), right], name="ways")
    if compile_arguments:
        model.compile(loss=["mse", "mse"], **compile_arguments)
    return model


def vectors(seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 2)).astype("float32")
    return x, [y, np.concatenate([y, y[:, :1]], axis=1)]


def stack(style="list"):
    """A Sequential model; one made by `add` has calls of its layers that it doesn't run."""
    parts = [keras.Input((4,)), *(layers.Dense(3, name=name) for name in "abc")]
    if style == "list":
        return keras.Sequential(parts)
    model = keras.Sequential()
    for part in parts:
        model.add(part)
    return model


CHANGES = {
    "insert": lambda model: insert_after(model, "right", layers.Dense(3, name="new")),
    "insert long": lambda model: insert_after(model, model.get_layer("right"), long_branch),
    "after the input": lambda model: insert_after(model, "x", layers.Dense(4, name="new")),
    "branch": lambda model: add_branch(model, "x", "out", layers.Dense(2, name="new")),
    "own branch": lambda model: add_branch(model, "left1", "left1", long_branch),
    "operation": lambda model: insert_after(model, "both", lambda x: keras.ops.sin(x) * 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_model_is_what_keras_would_build(change):
    model = two_ways(optimizer="adam")
    old_layers, old_weights = list(model.layers), list(model.weights)
    outputs = {layer.name: layer.output for layer in old_layers}
    version = version_of(model)
    inserted = CHANGES[change](model)
    assert version_of(model) != version
    assert {id(x) for x in (*old_layers, *inserted)} == {id(x) for x in model.operations}
    assert {id(v) for v in old_weights} < {id(v) for v in model.weights} or change == "operation"
    assert all(layer.output is outputs[layer.name] for layer in old_layers)
    assert_like_fresh(model)
    fresh = type(model).from_config(model.get_config())
    fresh.set_weights(model.get_weights())
    assert model.output_names == fresh.output_names
    paths = [v.path for v in model.trainable_variables]
    assert paths == [v.path for v in fresh.trainable_variables]
    for operation, other in zip(model.operations, fresh.operations, strict=True):
        assert len(operation._inbound_nodes) == len(other._inbound_nodes) == 1
        readers = [reader.operation.name for reader in operation._outbound_nodes]
        assert sorted(readers) == sorted(r.operation.name for r in other._outbound_nodes)
        assert operation in model.layers or change == "operation"
    x, y = vectors()
    for name in [layer.name for layer in model.layers]:  # layer.input and layer.output mean it too
        ours = keras.Model(model.input, model.get_layer(name).output)(x)
        theirs = keras.Model(fresh.input, fresh.get_layer(name).output)(x)
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(model.predict(x, verbose=0), fresh.predict(x, verbose=0), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    model.fit(x, y, verbose=0)
    assert model.count_params() == fresh.count_params()


def test_the_output_list_follows():
    model = two_ways()
    x = vectors()[0]
    before = model.predict(x, verbose=0)
    (new,) = insert_after(model, "right", layers.Dense(3, use_bias=False, name="new"))
    assert model.outputs[1] is model.output[1] is new.output
    assert model.output_names == ["out", "new"]
    after = model.predict(x, verbose=0)
    np.testing.assert_allclose(after[1], before[1] @ new.kernel.numpy(), rtol=1e-5)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_old_slots_stay_new_ones_are_neutral_and_files_agree(name, tmp_path):
    model = trained_net(OPTIMIZERS[name])
    optimizer = model.optimizer
    before = {id(v): (v, v.numpy()) for v in optimizer.variables}
    rate, steps = float(optimizer.learning_rate), int(optimizer.iterations)
    insert_after(model, "relu", conv())
    add_branch(model, "relu", "conv2", layers.Conv2D(3, 1, strides=2, name="skip"))

    assert model.optimizer is optimizer
    assert (float(optimizer.learning_rate), int(optimizer.iterations)) == (rate, steps)
    assert before.keys() <= {id(v) for v in optimizer.variables}
    for variable, value in before.values():
        assert_same_bits([variable.numpy()], [value])
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    assert [v.path for v in inner._trainable_variables] == [
        v.path for v in model.trainable_variables
    ]
    weights = {v.path.replace("/", "_"): v.numpy() for v in model.trainable_variables}
    old = {v.name: value for v, value in before.values()}
    born = 0
    for variable in optimizer.variables:
        if id(variable) in before or variable.shape == ():
            continue
        weight = next(w for w in weights if variable.name.startswith(w + "_"))
        assert weight.startswith(("new_", "skip_"))
        born += 1
        slot = variable.name.removeprefix(weight + "_")
        kin = [
            value.ravel() for w in weights if (value := old.get(f"{w}_{slot}")) is not None
        ]  # the slots of that kind that were there
        kind = slot_kind(name, slot)
        if kind == "average":
            expected = weights[weight]
        elif kind in ("momentum", "average_gradient", "gradient_accumulator"):
            expected = 0.0
        else:
            expected = np.concatenate(kin).astype(np.float64).mean()
            assert expected > 0
        np.testing.assert_allclose(variable.numpy(), np.broadcast_to(expected, variable.shape))
    # The net's convolutions have four weights, and it got four of such.
    assert born == sum(value.ndim > 0 for name, value in old.items() if name.startswith("conv"))

    fresh = type(optimizer).from_config(optimizer.get_config())
    fresh.build(model.trainable_variables)
    for variable, other in zip(optimizer.variables, fresh.variables, strict=True):
        assert variable.name == other.name or (name == "nadam" and variable.shape == ())
        assert (variable.shape, variable.dtype) == (other.shape, other.dtype)
    assert_trains_on_like_its_file(model, tmp_path / "deeper.keras")


def test_what_an_optimizer_does_not_list_stays_with_it():
    """Inside a LossScaleOptimizer Keras neither lists nor saves the product that Nadam keeps."""
    scaled = keras.optimizers.LossScaleOptimizer
    model = trained_net(lambda: scaled(keras.optimizers.Nadam(0.01)))
    nadam = model.optimizer.inner_optimizer
    product = float(nadam._u_product.numpy())
    assert product < 1.0
    assert not any(variable is nadam._u_product for variable in nadam.variables)
    moments = {v.path: v.numpy() for v in nadam._velocities}
    insert_after(model, "relu", conv())
    assert float(nadam._u_product.numpy()) == product
    assert not any(variable is nadam._u_product for variable in nadam.variables)
    assert len(nadam._velocities) == len(model.trainable_variables) > len(moments)
    for velocity in nadam._velocities:
        if velocity.path in moments:
            assert_same_bits([velocity.numpy()], [moments[velocity.path]])
    model.train_on_batch(*batch())
    assert float(nadam._u_product.numpy()) < product


def test_slots_move_with_their_weights_when_the_order_of_old_layers_changes():
    model = two_ways(optimizer="adam", run_eagerly=True)
    model.train_on_batch(*vectors())
    old = [v.path for v in model.trainable_variables]
    before = {v.path: v.numpy() for v in model.optimizer.variables}
    insert_after(model, "right", long_branch)
    now = [v.path for v in model.trainable_variables if v.path in old]
    assert now != old
    assert sorted(now) == sorted(old)
    for weight, slot in zip(model.trainable_variables, model.optimizer._momentums, strict=True):
        assert slot.name == weight.path.replace("/", "_") + "_momentum"
        if weight.path in old:
            np.testing.assert_array_equal(slot, before[slot.path])
            assert np.any(slot)
    model.train_on_batch(*vectors())


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_continued_fit_is_that_of_a_net_built_like_that(jit_compile):
    model = convolutional_net(
        optimizer=keras.optimizers.SGD(0.05), jit_compile=jit_compile, metrics=["mae"]
    )
    model.fit(*batch(), epochs=2, verbose=0)
    model.predict(batch()[0], verbose=0)
    insert_after(model, "relu", conv(activation="relu"))

    inputs = keras.Input((4, 4, 2))
    x = inputs
    for layer in model.layers[1:]:
        x = type(layer).from_config(layer.get_config())(x)
    fresh = keras.Model(inputs, x)
    fresh.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=jit_compile, metrics=["mae"])
    fresh.set_weights(model.get_weights())
    histories = [
        net.fit(*batch(1), epochs=2, batch_size=4, shuffle=False, verbose=0).history
        for net in (model, fresh)
    ]
    assert histories[0] == histories[1]
    assert_same_bits(values(model.variables), values(fresh.variables))
    assert model.evaluate(*batch(2), verbose=0) == fresh.evaluate(*batch(2), verbose=0)
    assert_same_bits(
        [model.predict(batch(2)[0], verbose=0)], [fresh.predict(batch(2)[0], verbose=0)]
    )


@pytest.mark.parametrize("name", ["adam", "accumulating", "loss scale"])
def test_inside_fit(name, recwarn):
    class Deepening(keras.callbacks.Callback):
        due = False

        def on_epoch_end(self, epoch, logs=None):
            self.due = epoch == 0

        def on_train_batch_begin(self, batch, logs=None):
            if self.due:
                self.due = False
                before = self.model.predict(inputs, verbose=0)
                add_branch(self.model, "conv1", "conv1", conv(kernel_initializer="zeros"))
                assert_same_bits([self.model.predict(inputs, verbose=0)], [before])

    inputs = batch()[0]
    model = convolutional_net(optimizer=OPTIMIZERS[name](), metrics=["mae"])
    iterations = []
    counting = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: iterations.append(int(model.optimizer._iterations))
    )
    history = model.fit(
        *batch(),
        batch_size=2,
        epochs=3,
        validation_data=batch(1),
        callbacks=[Deepening(), counting],
        verbose=0,
    ).history
    assert len(history["val_mae"]) == 3
    assert iterations == ([4, 8, 12] if name != "loss scale" else [0, 0, 0])
    assert np.any(model.get_layer("new").kernel)  # it was trained
    assert not [w for w in recwarn if "trainable" in str(w.message)]


def test_new_means_of_squared_gradients_are_those_of_the_others(tmp_path):
    model = trained_net(lambda: keras.optimizers.Adafactor(0.01))
    optimizer = model.optimizer
    before = [*optimizer._r]
    insert_after(model, "relu", conv())
    assert len(optimizer._r) == len(model.trainable_variables) == len(before) + 2
    kernel, bias = (
        [v.path for v in model.trainable_variables].index(f"new/{name}")
        for name in ("kernel", "bias")
    )
    assert optimizer._r[bias].shape == ()
    assert optimizer._r[bias].numpy() == 0
    kin = [slot.numpy().ravel() for slot in before if slot.shape != ()]
    expected = np.concatenate(kin).astype(np.float64).mean()
    np.testing.assert_allclose(optimizer._r[kernel].numpy(), np.full((3, 3, 3), expected))
    assert_trains_on_like_its_file(model, tmp_path / "grown.keras")


@pytest.mark.parametrize("style", ["list", "add"])
def test_sequential(style, tmp_path):
    model = stack(style)
    model.compile("adam", "mse")
    x = vectors()[0]
    y = x[:, :3]
    model.fit(x, y, verbose=0)
    new = layers.Dense(3, name="new")
    assert insert_after(model, "a", lambda t: layers.ReLU(name="act")(new(t)))[0] is new
    assert [layer.name for layer in model.layers] == ["a", "new", "act", "b", "c"]
    assert [layer.name for layer in type(model).from_config(model.get_config()).layers] == [
        layer.name for layer in model.layers
    ]
    for name, names in {"new": "a new", "b": "a new act b", "c": "a new act b c"}.items():
        extractor = keras.Model(model.inputs, model.get_layer(name).output)
        assert [layer.name for layer in extractor.layers[1:]] == names.split()
    assert model.get_layer("b").input is model.get_layer("act").output
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "stack.keras")
    loaded = keras.models.load_model(tmp_path / "stack.keras")
    assert_same_bits(values(loaded.optimizer.variables), values(model.optimizer.variables))
    before = model.predict(x, verbose=0)
    assert_same_bits([loaded.predict(x, verbose=0)], [before])
    last = model.pop()
    assert last.name == "c"
    assert model.output_shape == (None, 3)
    model.add(last)
    assert_same_bits([model.predict(x, verbose=0)], [before])
    insert_after(model, "c", layers.Dense(3, name="end"))
    assert [layer.name for layer in model.layers][-2:] == ["c", "end"]
    assert model.outputs[0] is model.get_layer("end").output


def test_policies_are_followed():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = convolutional_net(optimizer="adam")
    keras.config.set_dtype_policy("float32")
    insert_after(model, "relu", lambda t: conv()(t))
    assert model.get_layer("new").compute_dtype == "bfloat16"
    assert keras.config.dtype_policy().name == "float32"
    with pytest.raises(ValueError, match=r"dtype float32, the output of layer 'relu' .* bfloat16"):
        insert_after(model, "relu", conv("other", dtype="float32"))
    model.fit(*batch(), verbose=0)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_checkpoints_and_exports(optimizer, tmp_path):
    model = two_ways(optimizer=optimizer)
    x, y = vectors()
    model.fit(x, y, verbose=0)
    insert_after(model, "left1", long_branch)
    model.fit(x, y, verbose=0)
    expected = values(model.variables + model.optimizer.variables)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    model.fit(x, y, verbose=0)
    checkpoint.restore(path).assert_existing_objects_matched()
    assert_same_bits(values(model.variables + model.optimizer.variables), expected)
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    for found, wanted in zip(exported.serve(x), model(x), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_no_optimizer_an_unbuilt_one_and_frozen_layers():
    plain = convolutional_net()
    insert_after(plain, "conv1", conv())
    unbuilt = convolutional_net(optimizer="adam")
    insert_after(unbuilt, "conv1", conv())
    assert not unbuilt.optimizer.built
    unbuilt.fit(*batch(), verbose=0)
    frozen = convolutional_net()
    frozen.get_layer("conv1").trainable = False
    frozen.compile("adam", "mse")
    frozen.fit(*batch(), verbose=0)
    insert_after(frozen, "conv1", conv())
    frozen.fit(*batch(), verbose=0)
    known = [v.path for v in frozen.optimizer._trainable_variables]
    assert known == [v.path for v in frozen.trainable_variables]


class WithTwoOptimizers(keras.Model):
    """Trains one layer by an optimizer of its own."""

    def train_step(self, data):
        self.second.apply([keras.ops.ones_like(v) for v in self.part], self.part)
        return super().train_step(data)


def test_an_optimizer_of_a_part_is_left_alone():
    stock = convolutional_net()
    model = WithTwoOptimizers(stock.inputs, stock.outputs)
    model.compile("adam", "mse", run_eagerly=True)
    model.part = model.get_layer("dense").trainable_variables
    model.second = keras.optimizers.Adam()
    model.train_on_batch(*batch())
    before = [id(variable) for variable in model.second.variables]
    insert_after(model, "conv1", conv())
    assert [id(variable) for variable in model.second.variables] == before
    assert len(model.optimizer.variables) == 2 + 2 * len(model.trainable_variables)
    model.train_on_batch(*batch())


# All or nothing.


def whole_picture(model):
    """A photograph, and the graph behind it."""
    nodes = [node for layer in model.layers for node in layer._inbound_nodes]
    return {
        **photograph(model),
        "config": model.get_config(),
        "calls": [(id(node), [id(t) for t in node.input_tensors]) for node in nodes],
        "readers": [[id(n) for n in layer._outbound_nodes] for layer in model.layers],
        "histories": [tuple(t._keras_history) for node in nodes for t in node.outputs],
        "outputs": [id(t) for t in model.outputs],
        "output names": list(getattr(model, "output_names", ())),
        "tracked": [id(layer) for layer in model._layers],
        "optimizer": {k: id(v) for k, v in vars(model.optimizer).items()},
        "slots": [id(v) for v in model.optimizer._variables],
        "version": version_of(model),
        "prediction": [p.tobytes() for p in keras.tree.flatten(model.predict_on_batch(X))],
    }


X = vectors()[0]


def assert_untouched(picture, model):
    now = whole_picture(model)
    for part in ("functions", "attributes"):  # predicting makes a function
        picture[part], now[part] = None, None
    assert_same_bits(now.pop("values"), picture["values"])
    for name, found in now.items():
        assert found == picture[name], name


STAGES = [
    (insert, "_check_fits", 2),
    (insert, "_check_calls", 1),
    (rebuild, "splice", 1),
    (rebuild, "_read_instead", 4),
    (rebuild, "_renew_graph", 1),
    (rebuild, "note_trainable_state", 1),
    (slots, "extend_optimizer", 1),
    (slots, "_built_alike", 1),
    (slots, "_neutral", 3),
    (rebuild, "refit_optimizer", 1),
    (rebuild, "renew_functions", 1),
]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_at_any_stage_leaves_no_trace(monkeypatch, when, error):
    model = two_ways(optimizer=keras.optimizers.AdamW(use_ema=True), run_eagerly=True)
    model.train_on_batch(*vectors())
    model.predict_on_batch(X)
    picture = whole_picture(model)
    for module, name, call in STAGES:
        original, calls = getattr(module, name), []

        def failing(*args, original=original, calls=calls, call=call, **kwargs):
            calls.append(None)
            if len(calls) == call and when == "before":
                raise error("injected")
            result = original(*args, **kwargs)
            if len(calls) == call:
                raise error("injected")
            return result

        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing)
            with pytest.raises(error, match="injected"):
                add_branch(model, "stem", "right", layers.Dense(3))
        assert_untouched(dict(picture), model)
    add_branch(model, "stem", "right", layers.Dense(3))  # and it still can be done
    model.train_on_batch(*vectors())


def test_an_insertion_that_was_trained_can_be_rolled_back():
    model = two_ways(optimizer=keras.optimizers.Adam(use_ema=True), run_eagerly=True)
    model.train_on_batch(*vectors())
    model.predict_on_batch(X)
    picture = whole_picture(model)
    with growth_transaction(model) as block:
        for _ in range(2):
            insert_after(model, "right", long_branch)
            model.train_on_batch(*vectors(1))
            block.rollback()
            assert_untouched(dict(picture), model)
    insert_after(model, "right", long_branch)
    model.train_on_batch(*vectors(1))


def test_a_build_that_fails_leaves_no_trace_in_a_stack_made_by_add():
    model = stack("add")
    model.compile("adam", "mse", run_eagerly=True)
    model.train_on_batch(X, X[:, :3])
    model.predict_on_batch(X)
    picture = whole_picture(model)

    def build(tensor):
        layers.Dense(3, name="new")(tensor)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        insert_after(model, "b", build)
    with pytest.raises(ValueError, match="no branch"):
        insert_after(model, "b", lambda t: layers.Add()([t, layers.Dense(3)(t)]))
    assert_untouched(picture, model)


def test_what_is_rolled_back_is_let_go():
    model = two_ways(optimizer="adam", run_eagerly=True)
    model.train_on_batch(*vectors())

    def build(tensor):
        layers.Dense(3)(tensor)
        raise RuntimeError

    counts = []
    for _ in range(3):
        with pytest.raises(RuntimeError):
            insert_after(model, "stem", build)
        gc.collect()
        counts.append(live_variables())
    assert len(set(counts)) == 1


# Refusals.


def shared():
    inputs = keras.Input((4,))
    twice = layers.Dense(4, name="twice")
    return keras.Model(inputs, twice(twice(inputs)), name="net")


def outer():
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3, name="a")(stack()(inputs)), name="outer")


def inner():
    model = stack()
    model(keras.Input((4,)))
    return model


def subclassed():
    class Own(keras.Model):
        def call(self, inputs):
            return inputs

    return Own()


def dense(units=3, **arguments):
    return layers.Dense(units, **{"name": "new", **arguments})


REFUSED = {
    "unknown name": (two_ways, ("nowhere", dense()), "no layer 'nowhere'.*'stem'"),
    "called twice": (shared, ("twice", dense(4)), "'twice' is called 2 times"),
    "nested": (outer, ("a", dense()), "nested model 'sequential.*tfgrow.convert"),
    "part of another": (inner, ("a", dense()), "part of another model.*tfgrow.convert"),
    "not built": (lambda: keras.Sequential([dense(name="a")]), ("a", dense()), "not built"),
    "other shape": (two_ways, ("stem", dense(5)), r"shape \(None, 5\).*\(None, 3\)"),
    "other dtype": (two_ways, ("stem", dense(dtype="float64")), "dtype float64.*float32"),
    "name taken": (two_ways, ("stem", dense(name="right")), "two layers named 'right'"),
    "nothing new": (two_ways, ("stem", lambda t: t), "at least one new layer"),
    "foreign input": (
        two_ways,
        ("stem", lambda t: layers.Add()([t, keras.Input((3,), name="other")])),
        "reads 'other', which is not part",
    ),
    "a model": (
        two_ways,
        ("stem", lambda t: keras.Sequential([keras.Input((3,)), dense()], name="m")(t)),
        "calls the model 'm'",
    ),
    "branch in a stack": (stack, ("a", lambda t: layers.Add()([t, dense()(t)])), "no branch"),
    "operation in a stack": (stack, ("a", keras.ops.sin), "no branch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    make, arguments, words = REFUSED[case]
    model = make()
    config = model.get_config()
    with pytest.raises(ValueError, match=words):
        insert_after(model, *arguments)
    assert model.get_config() == config


def test_refuses_subclassed_models_and_old_layers():
    with pytest.raises(TypeError, match="subclassed"):
        insert_after(subclassed(), "a", dense())
    with pytest.raises(TypeError, match="one symbolic tensor"):
        insert_after(two_ways(), "stem", lambda t: [t])
    model = two_ways()
    with pytest.raises(ValueError, match="calls layer 'left1', which the model has"):
        insert_after(model, "stem", model.get_layer("left1"))


def test_branches_refuse_cycles_and_stacks():
    model = two_ways()
    with pytest.raises(ValueError, match=r"'out' lies downstream of 'stem'.*cycle"):
        add_branch(model, "out", "stem", dense())
    with pytest.raises(ValueError, match=re.escape("keras.Model(model.inputs, model.outputs)")):
        add_branch(stack(), "a", "b", dense())
    with pytest.raises(ValueError, match=r"shape \(None, 7\)"):
        add_branch(model, "stem", "right", dense(7))


def test_losses_by_the_name_of_an_output_are_not_lost():
    model = two_ways()
    model.compile("sgd", loss={"out": "mse", "right": "mse"})
    with pytest.raises(ValueError, match="loss for the output named 'right'"):
        insert_after(model, "right", dense())
    insert_after(model, "left2", dense())
    named = keras.Model(model.input, dict(zip(("out", "right"), model.outputs, strict=True)))
    named.compile("sgd", loss={"out": "mse", "right": "mae"})
    insert_after(named, "right", dense(name="last"))
    x, y = vectors()
    targets = dict(zip(("out", "right"), y, strict=True))
    assert {"out_loss", "right_loss"} < named.fit(x, targets, verbose=0).history.keys()


def test_unknown_optimizers_are_refused_before_anything_is_touched():
    class Strange(keras.optimizers.Optimizer):
        def build(self, variables):
            super().build(variables)
            self.memory = [self.add_variable_from_reference(v, name="memory") for v in variables]

        def update_step(self, gradient, variable, learning_rate):
            self.assign_sub(variable, learning_rate * gradient)

    model = trained_net(lambda: Strange(0.01))
    config = model.get_config()
    with pytest.raises(ValueError, match="register_slots"):
        insert_after(model, "conv1", conv())
    assert model.get_config() == config


def test_an_optimizer_that_its_config_does_not_describe_is_refused():
    class Own(keras.optimizers.SGD):
        def __init__(self, needed, **kwargs):
            super().__init__(0.01, **kwargs)

    model = trained_net(lambda: Own(3))
    config = model.get_config()
    with pytest.raises(ValueError, match=r"Own.*get_config"):
        insert_after(model, "conv1", conv())
    assert model.get_config() == config
    model.train_on_batch(*batch())


def test_models_made_of_the_same_tensors_before_do_not_go_on_silently():
    model = two_ways()
    extractor = keras.Model(model.input, model.get_layer("left2").output)
    insert_after(model, "stem", dense())
    with pytest.raises(ValueError, match="not connected"):
        extractor(X)
    assert keras.Model(model.input, model.get_layer("left2").output)(X).shape == (8, 3)
