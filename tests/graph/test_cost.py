"""Costs of edits, against really widened models and TensorFlow's own profiler."""

import keras
import pytest
import tensorflow as tf

import tfgrow
from tests.cases import CASES, by_name
from tfgrow.graph.cost import CostModel, model_flops
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import sites_of

MULTIPLY_ADDS = {"Conv2D", "DepthwiseConv2dNative", "MatMul", "BatchMatMulV2"}


def profiled_flops(model):
    """FLOPs of the multiply-adds of one sample, as TensorFlow's profiler counts them."""
    profiler = tf.compat.v1.profiler
    specs = [tf.TensorSpec((1, *tensor.shape[1:]), tensor.dtype) for tensor in model.inputs]
    function = tf.function(lambda *x: model(list(x) if len(x) > 1 else x[0], training=False))
    options = profiler.ProfileOptionBuilder(profiler.ProfileOptionBuilder.float_operation())
    result = profiler.profile(
        function.get_concrete_function(*specs).graph,
        cmd="op",
        options=options.with_empty_output().build(),
    )
    total = 0
    while result.children:  # the view by operation is a chain
        (result,) = result.children
        if result.name in MULTIPLY_ADDS:
            total += result.float_ops
    return total


# The profiler does not know how much a 3-D convolution or an einsum costs, counts the padding that
# TensorFlow adds to the inputs of dilated convolutions, and takes all of a transposed convolution's
# outputs for inner ones. The products of queries, keys and values are an einsum to it, unless there
# is dropout between them. Of grouped convolutions, which Keras compiles, it sees nothing.
UNPROFILED = (
    "as_many_groups_as_channels",
    "conv3d",
    "conv1d_causal",
    "dilated_no_bias",
    "einsum_dense",
    "grouped_cross_attention",
    "transposed_1d",
    "transposed_2d",
    "transposed_3d",
)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in UNPROFILED], ids=lambda case: case.name
)
def test_flops_are_those_of_tensorflows_profiler(case):
    model = case.model()
    assert model_flops(trace(model)) == profiled_flops(model)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("strides", [1, 2, (1, 3)])
def test_a_transposed_convolution_costs_what_its_convolution_does(padding, strides):
    down, up = (
        tfgrow.convert(keras.Sequential([keras.Input(shape), layer]))
        for shape, layer in (
            ((12, 18, 5), keras.layers.Conv2D(4, 3, strides, padding)),
            ((*small(padding, strides), 4), keras.layers.Conv2DTranspose(5, 3, strides, padding)),
        )
    )
    assert up.input_shape[1:] == down.output_shape[1:]
    assert model_flops(trace(up)) == model_flops(trace(down))


def small(padding, strides):
    """What a 3x3 convolution makes of 12x18 positions."""
    layer = keras.layers.Conv2D(1, 3, strides, padding)
    return layer.compute_output_shape((1, 12, 18, 5))[1:3]


def test_flops_of_einsums_and_of_lookups():
    model = by_name("einsum_dense").model()
    assert model_flops(trace(model)) == 2 * (4 * (3 * 3 + 3 * 3 + 3 * 2) + 4 * 2 * 2)
    model = by_name("embedding").model()
    assert model_flops(trace(model)) == 2 * (3 * 2 * 3 * 2 + 2 * 2 + 2 * 3 + 3 * 2)


def test_a_layer_costs_flops_at_every_call():
    inputs = [keras.Input((6,)), keras.Input((6,))]
    encoder = keras.layers.Dense(5, "relu")
    both = keras.layers.Concatenate()([encoder(x) for x in inputs])
    model = tfgrow.convert(keras.Model(inputs, keras.layers.Dense(2)(both)))
    assert model_flops(trace(model)) == 2 * (2 * 6 * 5 + 10 * 2)
    assert CostModel(trace(model), ()).base.params == model.count_params()


def test_attention_costs_flops_at_every_call():
    def model(calls):
        x = inputs = keras.Input((5, 6))
        attention = keras.layers.MultiHeadAttention(2, 3)
        for _ in range(calls):
            x = attention(x, x)
        return tfgrow.convert(keras.Model(inputs, keras.layers.Dense(2)(x)))

    once, twice, thrice = (CostModel(trace(model(calls)), ()).base for calls in (1, 2, 3))
    assert once.params == twice.params == thrice.params
    assert thrice.flops - twice.flops == twice.flops - once.flops > 0


def test_flops_of_a_3d_convolution():
    model = by_name("conv3d").model()
    conv1, conv2 = 3**3 * 2**3 * 1 * 3, (3 * 2 * 3) * 2**3 * 3 * 2
    assert model_flops(trace(model)) == 2 * (conv1 + conv2 + 2 * 2)


def test_flops_of_the_products_in_attention():
    model = by_name("grouped_cross_attention").model()
    queries, keys, heads, size = 3, 5, 4, 3
    products = 2 * heads * queries * keys * size
    assert model_flops(trace(model)) == profiled_flops(model) + 2 * products


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_costs_are_those_of_the_really_widened_model(case):
    model = case.model()
    graph = trace(model)
    costs = CostModel(graph, sites_of(model, graph))
    before = model.count_params(), model_flops(graph)
    extra = {name: 1 + number for number, name in enumerate(case.sites)}
    alone = {c.site.name: c.cost for c in tfgrow.candidates(model, "add", new_units=1)}
    expected = costs.extra(extra)
    assert alone == {name: costs.extra({name: 1}) for name in case.sites}
    for name, units in extra.items():
        tfgrow.widen(model, name, units)
    assert model.count_params() - before[0] == expected.params
    assert model_flops(trace(model)) - before[1] == expected.flops


def test_model_of_other_layers_costs_nothing_to_count():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    assert model_flops(trace(model)) == 0  # stock layers are counted once they are growable
    assert model_flops(trace(tfgrow.convert(model))) == 2 * 3 * 2
