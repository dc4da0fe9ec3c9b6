import copy

import keras
import pytest

from tfgrow import schedules
from tfgrow.schedules import EveryNEpochs, OnPlateau


def epochs_grown(schedule, values, monitor="val_loss"):
    steps = enumerate(values, start=1)
    return [epoch for epoch, value in steps if schedule.should_grow(epoch, {monitor: value})]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"n": 1}, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"n": 3}, [3, 6, 9]),
        ({"n": 3, "start": 1}, [1, 4, 7]),
        ({"n": 2, "stop": 6}, [2, 4, 6]),
        ({"n": 2, "start": 5, "stop": 5}, [5]),
        ({"n": 4, "start": 0}, [4, 8]),
    ],
)
def test_every_n_epochs(arguments, expected):
    schedule = EveryNEpochs(**arguments)
    assert [epoch for epoch in range(1, 10) if schedule.should_grow(epoch)] == expected


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"n": 0}, "n must"),
        ({"n": 2.0}, "n must"),
        ({"n": True}, "n must"),
        ({"n": 2, "start": -1}, "start must"),
        ({"n": 2, "start": 6, "stop": 4}, "stop=4 comes before start=6"),
    ],
)
def test_every_n_epochs_refuses(arguments, named):
    with pytest.raises(ValueError, match=named):
        EveryNEpochs(**arguments)


@pytest.mark.parametrize(
    ("arguments", "values", "expected"),
    [
        # improving by more than min_delta never grows
        ({"patience": 1}, [5, 4, 3, 2, 1], []),
        # smaller than min_delta is no improvement
        ({"patience": 2, "min_delta": 0.5}, [5, 4.9, 4.8, 4.7, 4.0, 3.9], [3]),
        # counts anew after growing, against the same best value
        ({"patience": 2}, [1, 1, 1, 1, 1, 1, 1], [3, 5, 7]),
        ({"patience": 1, "cooldown": 2}, [1, 1, 1, 1, 1, 1, 1, 1], [2, 5, 8]),
        # an improvement while it cools is remembered as the value to beat
        ({"patience": 1, "cooldown": 1}, [1, 1, 0.5, 0.8], [2, 4]),
        # a diverged epoch neither counts nor becomes the best
        ({"patience": 2}, [1, float("nan"), 1, 1], [4]),
    ],
)
def test_on_plateau(arguments, values, expected):
    assert epochs_grown(OnPlateau("val_loss", **arguments), values) == expected


@pytest.mark.parametrize(
    ("monitor", "mode", "rising_improves"),
    [
        ("val_accuracy", "auto", True),
        ("acc", "auto", True),
        ("sparse_categorical_accuracy", "auto", True),
        ("auc_1", "auto", True),
        ("val_loss", "auto", False),
        ("mean_squared_error", "auto", False),
        ("myth", "max", True),
        ("val_accuracy", "min", False),
    ],
)
def test_mode(monitor, mode, rising_improves):
    rising = epochs_grown(OnPlateau(monitor, patience=1, mode=mode), [1, 2, 3], monitor)
    falling = epochs_grown(OnPlateau(monitor, patience=1, mode=mode), [3, 2, 1], monitor)
    assert (rising, falling) == (([], [2, 3]) if rising_improves else ([2, 3], []))


def test_mode_that_the_name_does_not_tell():
    with pytest.raises(ValueError, match=r"'impact' does not tell .* mode='min' or mode='max'"):
        OnPlateau("impact")


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"patience": 0}, ValueError, "patience"),
        ({"cooldown": -1}, ValueError, "cooldown"),
        ({"min_delta": -1.0}, ValueError, "min_delta"),
        ({"min_delta": float("nan")}, ValueError, "min_delta"),
        ({"mode": "lowest"}, ValueError, "'min', 'max' or 'auto'"),
        ({"monitor": None}, TypeError, "monitor"),
    ],
)
def test_on_plateau_refuses(arguments, error, named):
    with pytest.raises(error, match=named):
        OnPlateau(**arguments)


@pytest.mark.parametrize("logs", [None, {}, {"val_loss": 1.0, "accuracy": 0.5}])
def test_missing_monitor_names_what_there_is(logs):
    expected = rf"'loss', which epoch 3 .*Found: \{sorted(logs or {})}"
    with pytest.raises(ValueError, match=expected):
        OnPlateau("loss").should_grow(3, logs)


def test_epochs_without_validation_are_passed_over():
    """As with `validation_freq=2`: they neither count nor fail, and are mentioned once."""
    schedule = OnPlateau("val_loss", patience=2)
    every = [{"val_loss": 1.0}, {}, {"val_loss": 1.0}, {}, {"val_loss": 1.0}]
    with pytest.warns(UserWarning, match="'val_loss', which epoch 2 did not report") as seen:
        grown = [schedule.should_grow(epoch, logs) for epoch, logs in enumerate(every, start=1)]
    assert grown == [False] * 4 + [True]
    assert len(seen) == 1


def test_reset_forgets():
    schedule = OnPlateau(patience=2, cooldown=5)
    first = epochs_grown(schedule, [1, 1, 1, 1])
    schedule.reset()
    assert first == epochs_grown(schedule, [2, 2, 2, 2]) == [3]


def test_copies_do_not_share_memory():
    schedule = OnPlateau(patience=2)
    schedule.should_grow(1, {"val_loss": 1.0})
    twin = copy.deepcopy(schedule)
    schedule.should_grow(2, {"val_loss": 1.0})
    assert not twin.should_grow(2, {"val_loss": 1.0})
    assert twin.should_grow(3, {"val_loss": 1.0})


@pytest.mark.parametrize(
    "schedule",
    [EveryNEpochs(3, start=1, stop=9), OnPlateau("val_accuracy", 4, 0.01, "max", cooldown=2)],
)
def test_serializes(schedule):
    config = keras.saving.serialize_keras_object(schedule)
    assert config["registered_name"].startswith("tfgrow>")
    again = schedules.get(config)
    assert type(again) is type(schedule)
    assert again.get_config() == schedule.get_config()


@pytest.mark.parametrize(
    ("identifier", "kind", "some_config"),
    [
        (4, EveryNEpochs, {"n": 4}),
        ("every_epoch", EveryNEpochs, {"n": 1}),
        ("every_5_epochs", EveryNEpochs, {"n": 5}),
        ("on_plateau", OnPlateau, {"monitor": "val_loss", "patience": 2}),
    ],
)
def test_get(identifier, kind, some_config):
    schedule = schedules.get(identifier)
    assert type(schedule) is kind
    assert some_config.items() <= schedule.get_config().items()


def test_get_keeps_a_schedule():
    schedule = OnPlateau()
    assert schedules.get(schedule) is schedule


@pytest.mark.parametrize(
    ("identifier", "error"),
    [
        ("weekly", ValueError),
        (0, ValueError),
        (2.5, TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
)
def test_get_refuses(identifier, error):
    with pytest.raises(error):
        schedules.get(identifier)
