"""Every loss and activation, crossed with every property a loss head must have."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrow.curvature.autodiff_loss import AutodiffLoss
from tfgrow.curvature.columns import weigh_columns, weigh_values
from tfgrow.curvature.loss_head import LossHead, make_loss_head, resolve_curvature
from tfgrow.curvature.reference import output_hessian
from tfgrow.curvature.row_losses import SigmoidCrossentropy, SoftmaxCrossentropy, SquaredError

losses = keras.losses
SAMPLES = 3


def classes(*shape: int, low: int = 0) -> np.ndarray:
    return np.random.default_rng(1).integers(low, 3, shape)


def one_hot(*shape: int) -> np.ndarray:
    return np.eye(3, dtype="float32")[classes(*shape)]


def distribution(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).dirichlet(np.ones(3), shape).astype("float32")


def bits(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 2, shape).astype("float32")


def signs(*shape: int) -> np.ndarray:
    return 2 * bits(*shape) - 1


def reals(*shape: int) -> np.ndarray:
    return np.random.default_rng(4).normal(size=shape).astype("float32")


def counts(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).poisson(2.0, shape).astype("float32")


def coupled_fourth_power(y, prediction):
    return keras.ops.sum(prediction - y, axis=(1, 2)) ** 4


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    name: str
    loss: Any
    activation: Any
    y: np.ndarray
    shape: tuple[int, ...] = (SAMPLES, 3)
    row_loss: type = AutodiffLoss

    @property
    def head(self) -> LossHead:
        return make_loss_head(self.loss, self.activation)

    @property
    def z(self) -> tf.Tensor:
        return tf.constant(np.random.default_rng(0).normal(size=self.shape), tf.float32) * 1.5

    def compiled_model(self) -> keras.Model:
        """The activation alone, compiled with the loss at Keras' default reduction."""
        loss = self.loss
        if isinstance(loss, losses.Loss) and loss.reduction != "sum_over_batch_size":
            loss = type(loss)()
        activation = keras.layers.Activation(self.activation)
        model = keras.Sequential([keras.Input(self.shape[1:]), activation])
        model.compile(loss=loss)
        return model


N, T = SAMPLES, 2
SOFTMAX, SIGMOID, SQUARED = SoftmaxCrossentropy, SigmoidCrossentropy, SquaredError
CATEGORICAL, SPARSE = losses.CategoricalCrossentropy, losses.SparseCategoricalCrossentropy
BINARY = losses.BinaryCrossentropy
PIXELS = (N, 2, 2, 3)

CASES = [
    # Crossentropies in closed form.
    Case("sparse", "sparse_categorical_crossentropy", "softmax", classes(N), row_loss=SOFTMAX),
    Case("sparse_column", SPARSE(), "softmax", classes(N, 1), row_loss=SOFTMAX),
    Case("sparse_logits", SPARSE(from_logits=True), None, classes(N), row_loss=SOFTMAX),
    Case("sparse_logits_softmax", SPARSE(True), "softmax", classes(N), row_loss=SOFTMAX),
    Case("sparse_positions", SPARSE(), "softmax", classes(N, T), (N, T, 3), SOFTMAX),
    Case("sparse_ignore", SPARSE(True, -1), None, classes(N, 4, low=-1), (N, 4, 3), SOFTMAX),
    Case("categorical", "categorical_crossentropy", "softmax", one_hot(N), row_loss=SOFTMAX),
    Case("categorical_function", losses.categorical_crossentropy, "softmax", one_hot(N),
         row_loss=SOFTMAX),
    Case("categorical_soft", CATEGORICAL(), "softmax", distribution(N), row_loss=SOFTMAX),
    Case("categorical_smooth", CATEGORICAL(label_smoothing=0.2), "softmax", one_hot(N),
         row_loss=SOFTMAX),
    Case("categorical_multilabel", CATEGORICAL(True), None, 2 * distribution(N) ** 0.5,
         row_loss=SOFTMAX),
    Case("categorical_sigmoid", CATEGORICAL(), "sigmoid", one_hot(N), row_loss=SOFTMAX),
    Case("categorical_pixels", CATEGORICAL(), "softmax", one_hot(N, 2, 2), PIXELS, SOFTMAX),
    Case("binary", "binary_crossentropy", "sigmoid", bits(N), (N, 1), SIGMOID),
    Case("binary_labels", BINARY(label_smoothing=0.1), "sigmoid", bits(N, 3), row_loss=SIGMOID),
    Case("binary_logits", BINARY(from_logits=True), None, bits(N, 3), row_loss=SIGMOID),
    Case("binary_softmax", BINARY(), "softmax", bits(N, 3), row_loss=SIGMOID),
    Case("binary_pixels", BINARY(), "sigmoid", bits(N, 2, 2, 1), (N, 2, 2, 1), SIGMOID),
    # Squared error in closed form.
    Case("mse", "mse", None, reals(N, 3), row_loss=SQUARED),
    Case("mse_one", losses.MeanSquaredError(reduction="sum"), "linear", reals(N), (N, 1), SQUARED),
    Case("mse_positions", "mse", None, reals(N, T), (N, T, 1), SQUARED),
    # Everything else, by automatic differentiation.
    Case("sparse_ignore_other", SPARSE(True, 0), "tanh", classes(N, 4), (N, 4, 3)),
    Case("sparse_plain", SPARSE(), keras.activations.softplus, classes(N)),
    Case("categorical_plain", CATEGORICAL(), "softplus", one_hot(N)),
    Case("categorical_axis", CATEGORICAL(axis=1, from_logits=True), None,
         one_hot(N, 3).swapaxes(1, 2), (N, 3, 3)),
    Case("binary_plain", BINARY(), "hard_sigmoid", bits(N, 3)),
    Case("focal", losses.CategoricalFocalCrossentropy(), "softmax", one_hot(N)),
    Case("binary_focal", losses.BinaryFocalCrossentropy(), "sigmoid", bits(N, 3)),
    Case("generalized", losses.CategoricalGeneralizedCrossEntropy(), "softmax", classes(N)),
    Case("kl", "kl_divergence", "softmax", distribution(N)),
    Case("kl_positions", losses.KLDivergence(), "softmax", distribution(N, T), (N, T, 3)),
    Case("mse_softmax", "mse", "softmax", one_hot(N)),
    Case("mse_tanh", "mse", "tanh", reals(N, T, 3), (N, T, 3)),
    Case("msle", "msle", "softplus", counts(N, 3)),
    Case("mae", "mae", None, reals(N, 3)),
    Case("mape", "mape", None, reals(N, 3)),
    Case("mae_tanh", "mae", "tanh", reals(N, 3)),
    Case("huber", losses.Huber(delta=0.7), None, reals(N, 3)),
    Case("log_cosh", "log_cosh", None, reals(N, T), (N, T, 1)),
    Case("poisson", "poisson", "exponential", counts(N, 3)),
    Case("hinge", "hinge", None, signs(N, 3)),
    Case("squared_hinge", losses.SquaredHinge(), None, signs(N, 3)),
    Case("categorical_hinge", "categorical_hinge", None, one_hot(N)),
    Case("cosine", losses.CosineSimilarity(axis=1), None, reals(N, T, 3), (N, T, 3)),
    Case("dice", losses.Dice(axis=(1, 2)), "sigmoid", bits(N, T, 3), (N, T, 3)),
    Case("function", lambda y, p: (y - p) ** 2, "tanh", reals(N, 3)),
    Case("function_ranks", lambda y, p: abs(y - p) ** 3, None, reals(N), (N, 1)),
    Case("function_coupled", coupled_fourth_power, "tanh", reals(N, T, 3), (N, T, 3)),
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def flat(tensor: tf.Tensor) -> np.ndarray:
    array = np.asarray(tensor, "float64")
    return array.reshape(len(array), -1)


def gram(columns: list[tf.Tensor]) -> np.ndarray:
    """sum_k h_k h_k^T, `[N, D, D]`."""
    stacked = np.stack([flat(h) for h in columns], axis=-1)
    return stacked @ stacked.transpose(0, 2, 1)


@functools.cache
def positive_hessian(case: Case) -> np.ndarray:
    """Reference Hessian with its negative eigenvalues clipped."""
    hessian = output_hessian(case.head, case.y, case.z).numpy().astype("float64")
    eigenvalues, vectors = np.linalg.eigh((hessian + hessian.transpose(0, 2, 1)) / 2)
    return vectors * np.maximum(eigenvalues, 0)[:, None] @ vectors.transpose(0, 2, 1)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Differences are at most `tolerance` of the largest expected entry (or of 1)."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


@every_case
def test_the_mean_over_the_batch_is_the_loss_that_keras_reports(case: Case) -> None:
    assert type(case.head.row_loss) is case.row_loss
    per_sample = case.head.per_sample(case.y, case.z)
    assert per_sample.shape == (SAMPLES,)
    reported = case.compiled_model().evaluate(case.z.numpy(), case.y, verbose=0)
    assert_close(np.mean(per_sample), reported, 1e-5)


@every_case
def test_the_gradient_is_that_of_the_loss_through_keras(case: Case) -> None:
    model, z = case.compiled_model(), case.z
    with tf.GradientTape() as tape:
        tape.watch(z)
        total = SAMPLES * model.compute_loss(y=case.y, y_pred=model(z))
    expected = tape.gradient(total, z)
    if case.name == "categorical_multilabel":  # TensorFlow's fused gradient needs targets of sum 1
        expected = case.y.sum(-1, keepdims=True) * tf.nn.softmax(z) - case.y
    gradient = case.head.gradient(case.y, z)
    assert_close(gradient, expected, 1e-5)
    assert_close(gram(case.head.factors(case.y, z, "empirical")), gram([gradient]), 1e-6)


@every_case
def test_the_gradient_predicts_small_steps(case: Case) -> None:
    z, direction = case.z, reals(*case.shape)
    step = 1e-2 / np.abs(direction).max()
    ahead = case.head.per_sample(case.y, z + step * direction)
    behind = case.head.per_sample(case.y, z - step * direction)
    slope = (flat(case.head.gradient(case.y, z)) * flat(direction)).sum(-1)
    assert_close((ahead - behind) / (2 * step), slope, 2e-3)


@every_case
def test_exact_columns_make_up_the_hessian(case: Case) -> None:
    columns = case.head.factors(case.y, case.z, "exact")
    assert len(columns) == case.head.exact_columns(case.shape)
    assert all(h.shape == case.z.shape and h.dtype == tf.float32 for h in columns)
    assert_close(gram(columns), positive_hessian(case), 2e-5)


@every_case
def test_the_quadratic_is_that_of_the_hessian(case: Case) -> None:
    direction = reals(*case.shape)
    v = flat(direction)
    expected = np.einsum("na,nab,nb->n", v, positive_hessian(case), v)
    assert_close(case.head.quadratic(case.y, case.z, direction), expected, 2e-5)


@every_case
def test_products_with_exact_columns_tell_crossentropies_beyond_the_second_order(case: Case):
    """Far along random directions, samples weighed: the loss itself against what is left of it."""
    head, y, z = case.head, tf.constant(case.y), case.z
    weights = tf.constant([0.5, 2.0, 0.0])
    directions = 2.0 * np.random.default_rng(6).normal(size=(4, *case.shape)).astype("float32")
    columns = tf.stack(weigh_columns(head.factors(y, z, "exact"), weights))
    flat = tf.reshape(columns, (*columns.shape[:2], -1))
    products = tf.einsum("kni,cni->knc", flat, directions.reshape(4, SAMPLES, -1))
    found = head.beyond(y, z, products, weights)
    if case.row_loss not in (SOFTMAX, SIGMOID):
        assert found is None
        return
    assert np.abs(found).max() > 0.05
    for number, v in enumerate(directions):
        change = head.per_sample(y, z + v) - head.per_sample(y, z)
        linear = tf.reduce_sum(head.gradient(y, z) * v, axis=range(1, z.shape.rank))
        expected = weights * (change - linear - 0.5 * head.quadratic(y, z, v))
        np.testing.assert_allclose(found[:, number], expected, atol=2e-5 * np.abs(change).max())


@every_case
def test_sampled_columns_average_to_the_hessian(case: Case) -> None:
    draws, seeds = 1 + CASES.index(case) % 3, 1024
    head, y, z = case.head, case.y, case.z
    ys, zs = tf.repeat(y, seeds, axis=0), tf.repeat(z, seeds, axis=0)
    columns = head.factors(ys, zs, "sampled", draws, seed=[7, draws])
    assert len(columns) == draws
    grams = gram(columns).reshape(SAMPLES, seeds, *2 * [flat(z).shape[1]])
    expected = positive_hessian(case)
    error = np.abs(grams.mean(axis=1) - expected)
    deviation = grams.std(axis=1) / np.sqrt(seeds)
    assert np.all(error <= 5 * deviation + 3e-2 * max(1e-3, np.abs(expected).max())), error.max()


def slow_unless(*names: str) -> list[Any]:
    """The cases, all but those named marked slow (they share the code that is traced)."""
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(case, id=case.name, marks=marks[case.name in names]) for case in CASES]


@pytest.mark.parametrize(
    "case", slow_unless("sparse_ignore", "binary", "mse_positions", "huber", "function_coupled")
)
def test_tf_functions_with_an_unknown_batch_agree_with_eager(case: Case) -> None:
    y, z, head = tf.constant(case.y), case.z, case.head

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, *y.shape[1:]], y.dtype),
            tf.TensorSpec([None, *z.shape[1:]]),
        ]
    )
    def graph(y, z):
        seed = tf.constant([1, 2])
        sampled = head.factors(y, z, "sampled", 2, seed)
        exact = tf.add_n([h**2 for h in head.factors(y, z, "exact")])
        return head.per_sample(y, z), head.quadratic(y, z, z), exact, *sampled

    seed = tf.constant([1, 2])
    exact = tf.add_n([h**2 for h in head.factors(y, z, "exact")])
    eager = head.per_sample(y, z), head.quadratic(y, z, z), exact
    expected = (*eager, *head.factors(y, z, "sampled", 2, seed))
    for in_graph, alone in zip(graph(y, z), expected, strict=True):
        assert_close(np.abs(in_graph), np.abs(alone), 1e-4)


def test_crossentropies_stay_finite_and_sharp_at_extreme_logits():
    z = tf.constant([[100.0, 0.0, -100.0], [-1e4, 0.0, 1e4]])
    softmax = make_loss_head("sparse_categorical_crossentropy", "softmax")
    np.testing.assert_allclose(softmax.per_sample(np.array([2, 0]), z), [200.0, 2e4])
    sigmoid = make_loss_head("binary_crossentropy", "sigmoid")
    values = sigmoid.per_sample(np.array([[1.0], [1.0]]), tf.constant([[-80.0], [80.0]]))
    np.testing.assert_allclose(values, [80.0, 0.0], atol=1e-6)
    for head, y, at in ((softmax, np.array([2, 0]), z), (sigmoid, np.zeros((2, 3)), z)):
        columns = head.factors(y, at, "exact") + head.factors(y, at, "sampled", 3, seed=[0, 1])
        assert np.isfinite(columns).all()
    # The curvature of a saturated sigmoid is tiny, not zero.
    curvature = gram(sigmoid.factors(np.zeros((1, 1)), tf.constant([[20.0]]), "exact"))
    np.testing.assert_allclose(curvature, np.exp(-20.0), rtol=1e-4)


def test_half_precision_logits_are_computed_in_float32():
    z = tf.constant([[1.0, 2.0, 3.0]], tf.float16)
    head = make_loss_head(SPARSE(dtype="float16"), "softmax")
    y = np.array([1])
    tensors = [head.per_sample(y, z), head.gradient(y, z), *head.factors(y, z, "exact")]
    assert {tensor.dtype for tensor in tensors} == {tf.float32}
    assert_close(head.per_sample(y, z), head.per_sample(y, tf.cast(z, tf.float32)), 1e-7)


def test_different_seeds_and_positions_draw_different_columns():
    head = make_loss_head("mse")
    z = tf.zeros([2, 50, 4])
    y = np.zeros((2, 50, 4))
    (first,), (second,) = (head.factors(y, z, "sampled", 1, seed) for seed in ([0, 1], [0, 2]))
    assert_close(first, head.factors(y, z, "sampled", 1, [0, 1])[0], 0)
    assert not np.array_equal(first, second)
    assert 0.3 < np.mean(first[:, :25] == first[:, 25:]) < 0.7
    assert 0.3 < np.mean(first[0] == first[1]) < 0.7


def test_a_batch_in_which_every_label_is_ignored_costs_nothing():
    head = make_loss_head(SPARSE(ignore_class=255), "softmax")
    y, z = np.full((2, 3), 255), tf.ones([2, 3, 4])
    np.testing.assert_array_equal(head.per_sample(y, z), [0, 0])
    assert not np.any(head.factors(y, z, "exact"))
    assert not np.any(head.gradient(y, z))


def test_nan_logits_give_nan_curvature_for_their_sample_only():
    head = make_loss_head("mse", "tanh")
    z = tf.constant([[np.nan, 1.0], [0.5, 1.0]])
    quadratic = head.quadratic(np.zeros((2, 2)), z, tf.ones([2, 2]))
    np.testing.assert_array_equal(np.isnan(quadratic), [True, False])


def test_a_sampled_column_needs_no_fixed_number_of_positions():
    head = make_loss_head("sparse_categorical_crossentropy", "softmax")
    signature = [tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None, None, 3])]

    @tf.function(input_signature=signature)
    def total(y, z):
        return head.factors(y, z, "auto", 1, tf.constant([0, 1]))[0], head.quadratic(y, z, z)

    y, z = classes(2, 5), tf.constant(reals(2, 5, 3))
    column, quadratic = total(y, z)
    assert column.shape == z.shape
    assert_close(quadratic, head.quadratic(y, z, z), 1e-6)
    assert head.exact_columns((None, None, 3)) is None
    with pytest.raises(ValueError, match=r"fixed shape.*\(None, None, 3\)"):
        resolve_curvature("exact", head, (None, None, 3))


@pytest.mark.parametrize("curvature", ["exact", "sampled", "empirical"])
def test_weighed_columns_are_those_of_the_weighted_loss(curvature: str):
    head = make_loss_head("categorical_crossentropy", "softmax")
    y, z = one_hot(N, T), tf.constant(reals(N, T, 3))
    weights = np.array([0.5, 0.0, 3.0], "float32")
    columns = head.factors(y, z, curvature, 2, seed=[0, 0])
    weighed = gram(weigh_columns(columns, weights))
    assert_close(weighed, weights[:, None, None] * gram(columns), 1e-6)
    assert_close(weigh_values(head.per_sample(y, z), weights), weights * head.per_sample(y, z), 0)


def test_weights_of_positions_weigh_blocks_of_the_hessian():
    head = make_loss_head("mse")
    y, z, weights = (
        reals(N, T, 1),
        tf.zeros([N, T, 1]),
        np.array([[1, 2], [3, 4], [0, 5]], "float32"),
    )
    weighed = gram(weigh_columns(head.factors(y, z, "exact"), weights))
    assert_close(weighed, np.stack([np.diag(row) for row in weights]) * 2 / T, 1e-6)
    gradient = weigh_values(head.gradient(y, z), weights)
    assert_close(gradient, -2 / T * y * weights[..., None], 1e-6)


@pytest.mark.parametrize(
    ("loss", "shape", "chosen"),
    [
        ("mse", (None, 16), "exact"),
        ("mse", (None, 17), "sampled"),
        ("mse", (None, 5, 4), "sampled"),
        ("mse", (None, None, 4), "sampled"),
        ("huber", (None, 3), "exact"),
        ("mae", (None, 3), "empirical"),
    ],
)
def test_auto_curvature(loss: str, shape: tuple, chosen: str):
    assert resolve_curvature("auto", make_loss_head(loss), shape) == chosen


def raised(call: Callable[[], Any], error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def test_losses_that_cannot_be_estimated_are_refused():
    assert "Compile the model" in raised(lambda: make_loss_head(None))
    assert "Found 2 losses" in raised(lambda: make_loss_head(["mse", "mae"]))
    assert "Found 2 losses" in raised(lambda: make_loss_head({"a": "mse", "b": None}))
    assert "ambiguous" in raised(lambda: make_loss_head("crossentropy"))
    assert "Circle" in raised(lambda: make_loss_head(losses.Circle()))
    assert "type int" in raised(lambda: make_loss_head(3), TypeError)
    assert "nonsense" in raised(lambda: make_loss_head("nonsense"))
    assert "nonsense" in raised(lambda: make_loss_head("mse", "nonsense"))
    assert make_loss_head(["mse"]).name == "mean_squared_error"
    assert make_loss_head({"out": losses.Huber()}).name == "huber_loss"


def test_reduced_losses_and_misfitting_data_are_refused():
    z, y = tf.zeros([2, 3]), np.zeros((2, 3))
    whole = make_loss_head(lambda y, p: tf.reduce_mean((y - p) ** 2))
    assert "not yet averaged" in raised(lambda: whole.per_sample(y, z))
    assert "'dice'" in raised(lambda: make_loss_head(losses.Dice()).per_sample(y, z))
    fits = make_loss_head("mse")
    assert "(2, 4)" in raised(lambda: fits.per_sample(np.zeros((2, 4)), z))
    sparse = make_loss_head(SPARSE(), "softmax")
    assert "class indices of shape (2,)" in raised(lambda: sparse.per_sample(y, z))
    assert "first axes" in raised(
        lambda: make_loss_head("huber").per_sample(np.zeros(2), tf.zeros([2, 5, 3]))
    )
    assert "fixed number" in raised(lambda: fits.per_sample(np.zeros(2), tf.zeros([2])))


def test_arguments_of_factors_are_checked():
    head, z, y = make_loss_head("mse"), tf.zeros([2, 3]), np.zeros((2, 3))
    message = raised(lambda: head.factors(y, z, "fisher"))
    assert "'fisher'" in message
    assert "'auto', 'exact', 'sampled', 'empirical'" in message
    assert "seed" in raised(lambda: head.factors(y, z, "sampled"))
    assert "draws" in raised(lambda: head.factors(y, z, "sampled", 0, [0, 0]))


def test_a_hessian_too_large_to_build_is_refused_and_the_empirical_column_is_not():
    head, z = make_loss_head(lambda y, p: (y - p) ** 4), tf.ones([2, 40, 40, 1])
    y = np.zeros((2, 40, 40, 1))
    assert "1600" in raised(lambda: head.factors(y, z, "sampled", 1, [0, 0]))
    (column,) = head.factors(y, z, "empirical")
    assert_close(column, np.full(z.shape, 4 / 1600), 1e-6)


@pytest.mark.parametrize(
    "activation", [keras.layers.Activation("softmax"), keras.layers.Softmax(), keras.ops.softmax]
)
def test_a_softmax_in_any_guise_is_recognised(activation: Any):
    head = make_loss_head("sparse_categorical_crossentropy", activation)
    assert head.row_loss == SoftmaxCrossentropy(sparse=True)


def test_a_subclassed_loss_keeps_its_own_call():
    class Doubled(losses.MeanSquaredError):
        def call(self, y_true, y_pred):
            return 2 * super().call(y_true, y_pred)

    y, z = reals(2, 3), tf.zeros([2, 3])
    doubled, plain = make_loss_head(Doubled()), make_loss_head("mse")
    assert_close(doubled.per_sample(y, z), 2 * plain.per_sample(y, z), 1e-6)
    assert_close(gram(doubled.factors(y, z)), 2 * gram(plain.factors(y, z)), 1e-6)
