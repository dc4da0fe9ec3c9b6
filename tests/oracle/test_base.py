"""The bookkeeping of the growth oracle, tried with a scripted strategy: nothing is trained."""

import copy
import gc
import json
import math
import re
import weakref

import keras
import keras_tuner
import numpy as np
import pytest
import tensorflow as tf
from keras_tuner.engine.trial import TrialStatus

from tfgrow.oracle.base import GrowthOracle, write_json
from tfgrow.types import Cost, GrowthEvent, Plan, describe_widths


class FakeCandidate:
    """The part of a candidate that the bookkeeping reads."""

    def __init__(self, morphism):
        self.morphism = morphism


def plan_of(before=4, after=6, estimate=-0.05):
    return Plan(
        candidates=(FakeCandidate("split"), FakeCandidate("add")),
        estimated_change=estimate,
        cost=Cost(20, 200),
        widths={"conv1": (before, after), "conv2": (8, 8)},
        seconds={"learn": 1.0},
    )


def event_of(plan, epoch=0, status="applied", **fields):
    values = {
        "epoch": epoch,
        "applied": (),
        "widths": plan.widths,
        "params_before": 100,
        "params_after": 120,
        "flops_before": 1000,
        "flops_after": 1200,
        "estimated_change": plan.estimated_change,
        "measured_change": -0.04,
        "loss_before": 0.9,
        "alpha": 1.0,
        "seconds": {"learn": 1.0, "guard": 0.5},
        "newborn": {"conv1": 2},
        "status": status,
    }
    return GrowthEvent(**{**values, **fields})


class Scripted(GrowthOracle):
    """Proposes the plans it was given, one after the other, then none."""

    def __init__(self, plans=(), **kwargs):
        self.plans = list(plans)
        self.asked = []
        super().__init__(**kwargs)

    def propose_plan(self, model, data, *, epoch=0, **context):
        self.asked.append((data, epoch, context, self.next_seed()))
        return self.plans.pop(0) if self.plans else Plan((), 0.0, Cost(), {}, {}, "none pays")


@pytest.fixture
def model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(20, name="d")])  # 100 params


def step(oracle, model, epoch=0, status="applied", **fields):
    trial, plan = oracle.propose(model, "data", epoch)
    oracle.record(trial, event_of(plan, epoch, status, **fields))
    return trial


def project(tmp_path, **fields):
    return {"directory": tmp_path, "project_name": "growth", **fields}


def test_a_step_is_a_trial(model):
    oracle = Scripted([plan_of()])
    assert isinstance(oracle, keras_tuner.Oracle)
    trial, plan = oracle.propose(model, "data", epoch=3, progress="bar")
    assert oracle.asked[0][:3] == ("data", 3, {"progress": "bar"})
    assert (trial.status, list(oracle.ongoing_trials)) == (TrialStatus.RUNNING, ["tfgrow"])
    assert trial.hyperparameters.values == {
        "conv1": 6,
        "conv2": 8,
        "tfgrow/grew": "conv1 4->6",
        "tfgrow/morphisms": "add, split",
        "tfgrow/edits": 2,
        "tfgrow/epoch": 3,
        "tfgrow/parent": "",
    }
    event = oracle.record(trial, event_of(plan, 3), logs={"accuracy": 0.5, "val_loss": 0.7})
    assert event == event_of(plan, 3, trial_id="0000")
    kept = oracle.get_trial("0000")
    figures = {name: kept.metrics.get_last_value(name) for name in kept.metrics.metrics}
    assert figures == {
        "estimated_change": -0.05,
        "measured_change": -0.04,
        "loss_before": 0.9,
        "alpha": 1.0,
        "params_before": 100,
        "params": 120,
        "flops_before": 1000,
        "flops": 1200,
        "seconds": 1.5,
        "accuracy": 0.5,
        "val_loss": 0.7,
    }
    assert (kept.status, kept.score, kept.best_step) == (TrialStatus.COMPLETED, 0.7, 3)
    assert not oracle.ongoing_trials
    assert oracle.widths == {"conv1": 6, "conv2": 8}


def test_steps_know_their_parent(model):
    oracle = Scripted([plan_of(4, 6), plan_of(6, 7), plan_of(6, 8)])
    step(oracle, model)
    step(oracle, model, status="rejected", reason="it rose")
    last = step(oracle, model)
    assert [t.hyperparameters.get("tfgrow/parent") for t in oracle.trials.values()] == [
        "",
        *["0000"] * 2,
    ]
    assert oracle.get_best_trials()[0].trial_id in ("0000", last.trial_id)


def test_rejections_never_stop_the_search(model):
    """Keras Tuner raises after three failed trials in a row; a rejected step is no failure."""
    oracle = Scripted([plan_of()] * 5)
    for epoch in range(5):
        step(oracle, model, epoch, status="rejected", reason="the loss rose at every scale")
    statuses = {(trial.status, trial.message) for trial in oracle.trials.values()}
    assert statuses == {(TrialStatus.INVALID, "the loss rose at every scale")}
    assert oracle.widths == {}
    assert oracle.trials["0000"].metrics.get_last_value("params") == 100


def test_nothing_worth_doing_is_idle_and_leaves_no_trial(model):
    oracle = Scripted([])
    trial, plan = oracle.propose(model, "data")
    assert (trial.status, plan.reason) == (TrialStatus.IDLE, "none pays")
    event = event_of(plan, status="nothing")
    assert oracle.record(trial, event) == event
    assert not oracle.trials


def test_max_trials_stops(model):
    oracle = Scripted([plan_of(), plan_of()], max_trials=1)
    step(oracle, model)
    trial, plan = oracle.propose(model, "data")
    assert (trial.status, plan.reason) == (TrialStatus.STOPPED, "limit of 1 growth steps reached")
    assert len(oracle.asked) == 1  # no plan is worked out in vain
    assert oracle.populate_space("1") == {"status": TrialStatus.STOPPED}


def test_a_used_up_budget_stops(model):
    oracle = Scripted([plan_of()], max_params=100)
    trial, plan = oracle.propose(model, "data")
    assert (trial.status, plan.reason) == (TrialStatus.STOPPED, "budget of 100 parameters reached")
    assert not oracle.asked


def test_an_exceeded_budget_is_an_error(model):
    oracle = Scripted([plan_of()], max_params=99)
    with pytest.raises(ValueError, match=r"has 100 parameters, more than max_params=99"):
        oracle.propose(model, "data")


def test_a_tuner_is_told_that_it_asks_in_vain(model, tmp_path):
    """By IDLE alone it would ask again and again, in silence."""
    oracle = Scripted([plan_of()], directory=tmp_path)
    tuner = keras_tuner.Tuner(oracle=oracle, hypermodel=lambda hp: model, directory=tmp_path)
    with pytest.raises(RuntimeError, match="Scripted proposes edits of a model that trains"):
        tuner.search(np.zeros((4, 2)), np.zeros((4, 2)))
    assert not oracle.trials
    assert oracle.populate_space("0000") == {"status": TrialStatus.IDLE}
    step(oracle, model)
    assert list(oracle.trials) == ["0000"]


def test_an_unrecorded_step_is_closed_by_the_next(model):
    oracle = Scripted([plan_of(), plan_of()])
    lost, plan = oracle.propose(model, "data")
    trial, _ = oracle.propose(model, "data")
    assert (lost.trial_id, trial.trial_id) == ("0000", "0001")
    assert oracle.trials["0000"].status == TrialStatus.INVALID
    assert oracle.trials["0000"].message == "no event was recorded for this step"
    with pytest.raises(ValueError, match="not under way"):
        oracle.record(lost, event_of(plan))


def test_a_step_is_recorded_once(model):
    oracle = Scripted([plan_of()])
    trial, plan = oracle.propose(model, "data")
    oracle.record(trial, event_of(plan))
    with pytest.raises(ValueError, match="'0000' is COMPLETED and not under way"):
        oracle.record(trial, event_of(plan))


def test_a_full_disk_leaves_the_oracle_usable(model, tmp_path, monkeypatch):
    oracle = Scripted([plan_of()] * 2, **project(tmp_path))

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("tfgrow.oracle.base.write_json", fail)
        with pytest.raises(OSError, match="disk full"):
            oracle.propose(model, "data")
    assert step(oracle, model).status == TrialStatus.COMPLETED
    assert len(Scripted(**project(tmp_path)).trials) == len(oracle.trials) == 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_strategy_leaves_the_oracle_usable(model, error):
    oracle = Scripted([plan_of()])
    broken = copy.deepcopy(oracle)
    broken.propose_plan = lambda *_args, **_kwargs: (_ for _ in ()).throw(error())
    with pytest.raises(error):
        broken.propose(model, "data")
    del broken.propose_plan
    assert step(broken, model).status == TrialStatus.COMPLETED


@pytest.mark.parametrize(
    ("plan", "error", "named"),
    [
        ("grow!", TypeError, "Scripted.propose_plan must return a Plan. Found: 'grow!'"),
        (plan_of(estimate=math.nan), ValueError, "Scripted estimated a change of nan"),
    ],
)
def test_bad_plans_are_refused(model, plan, error, named):
    oracle = Scripted([plan])
    with pytest.raises(error, match=named):
        oracle.propose(model, "data")
    assert not oracle.trials


def test_scores(model):
    """The objective if there is one, before that the held-out loss after the step, else last."""
    oracle = Scripted([plan_of()] * 3)
    step(oracle, model, 0, measured_change=-0.1)
    step(oracle, model, 1, measured_change=None)
    step(oracle, model, 2, measured_change=-0.2)
    assert [t.score for t in oracle.trials.values()] == pytest.approx([0.8, math.inf, 0.7])
    assert [t.trial_id for t in oracle.get_best_trials(3)] == ["0002", "0000", "0001"]
    oracle.report("0001", {"val_loss": 0.5, "newborn_alive": 0.9, "lr": None}, epoch=3)
    best = oracle.get_best_trials(1)[0]
    assert (best.trial_id, best.score, best.best_step) == ("0001", 0.5, 3)
    assert best.metrics.get_last_value("newborn_alive") == 0.9
    with pytest.raises(ValueError, match=r"trial id '7'. Found: \['0000', '0001', '0002'\]"):
        oracle.report("7", {})


@pytest.mark.parametrize(
    ("objective", "logs", "score"),
    [
        ("val_accuracy", {"val_accuracy": 0.6}, 0.6),
        ("val_accuracy", {}, -math.inf),
        (keras_tuner.Objective("f", "max"), {"f": np.float32(0.5)}, 0.5),
        (["val_loss", "val_accuracy"], {"val_loss": 1.0, "val_accuracy": 0.25}, 0.75),
        (["val_loss", "val_accuracy"], {"val_loss": 1.0}, math.inf),
        (None, {}, 0.86),
        ("val_loss", {"val_loss": math.nan}, 0.86),
    ],
)
def test_objectives(model, objective, logs, score):
    oracle = Scripted([plan_of()], objective=objective)
    trial, plan = oracle.propose(model, "data")
    oracle.record(trial, event_of(plan), logs)
    assert oracle.trials["0000"].score == pytest.approx(score)


def files(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_files(model, tmp_path):
    step(Scripted([plan_of()], **project(tmp_path)), model)
    assert files(tmp_path) == [
        "growth/oracle.json",
        "growth/trial_0000/trial.json",
        "growth/widths.json",
    ]
    assert json.loads((tmp_path / "growth/widths.json").read_text()) == {"conv1": 6, "conv2": 8}


def test_in_memory_writes_nothing(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step(Scripted([plan_of()]), model)
    assert files(tmp_path) == []


def test_directory_and_project_name_have_keras_tuners_defaults(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step(Scripted([plan_of()], directory=tmp_path / "runs"), model)
    step(Scripted([plan_of()], project_name="named"), model)
    assert {name.rsplit("/trial_0000")[0] for name in files(tmp_path) if "trial_" in name} == {
        "runs/untitled_project",
        "named",
    }


def test_reload(model, tmp_path, capsys):
    first = Scripted([plan_of(), plan_of()], seed=5, **project(tmp_path))
    step(first, model, 1)
    step(first, model, 2, status="rejected", reason="it rose", measured_change=None)
    again = Scripted([plan_of(6, 7)], **project(tmp_path))
    assert f"Reloading Oracle from {tmp_path}/growth/oracle.json" in capsys.readouterr().out
    assert {i: t.get_state() for i, t in again.trials.items()} == {
        i: t.get_state() for i, t in first.trials.items()
    }
    assert again.get_state() == first.get_state()
    assert (again.widths, again.next_seed()) == (first.widths, first.next_seed())
    assert step(again, model, 3).trial_id == "0002"
    assert again.trials["0002"].hyperparameters.get("tfgrow/parent") == "0000"


def test_reloaded_trials_stand_in_their_order(model, tmp_path, monkeypatch):
    """Whatever the order in which the file system lists their folders."""
    first = Scripted([plan_of(), plan_of(), plan_of()], **project(tmp_path))
    for _ in range(3):
        step(first, model)
    glob = tf.io.gfile.glob
    monkeypatch.setattr(tf.io.gfile, "glob", lambda path: sorted(glob(path), reverse=True))
    assert list(Scripted(**project(tmp_path)).trials) == ["0000", "0001", "0002"]


def test_reload_without_a_score_ranks_last(model, tmp_path):
    first = Scripted([plan_of(), plan_of()], **project(tmp_path))
    step(first, model, loss_before=None)
    step(first, model)
    assert "Infinity" not in (tmp_path / "growth/trial_0000/trial.json").read_text()
    again = Scripted(**project(tmp_path))
    assert [t.trial_id for t in again.get_best_trials(2)] == ["0001", "0000"]


@pytest.mark.parametrize("oracle_file_lost", [False, True])
def test_a_step_cut_off_is_closed_on_reload(model, tmp_path, oracle_file_lost):
    """As after a kill: the trial is RUNNING on disk, oracle.json may be older than it."""
    first = Scripted([plan_of(), plan_of()], **project(tmp_path))
    step(first, model)
    before = (tmp_path / "growth/oracle.json").read_text()
    first.propose(model, "data")
    if oracle_file_lost:
        (tmp_path / "growth/oracle.json").write_text(before)
    again = Scripted([plan_of()], **project(tmp_path))
    cut_off = again.trials["0001"]
    assert (cut_off.status, cut_off.message) == (
        TrialStatus.INVALID,
        "the process ended in this step",
    )
    assert again.widths == {"conv1": 6, "conv2": 8}
    assert step(again, model).trial_id == "0002"
    assert again.start_order == again.end_order == ["0000", "0001", "0002"]


@pytest.mark.parametrize(
    ("text", "message"), [('{"a":', "is damaged"), ('{"a": 1}', "is of another kind of oracle")]
)
def test_a_project_that_is_damaged_or_not_ours_is_left_alone(tmp_path, text, message):
    path = tmp_path / "growth/oracle.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"oracle.json' {message}.*overwrite=True"):
        Scripted(**project(tmp_path))
    assert path.read_text() == text


def test_overwrite_starts_anew(model, tmp_path):
    step(Scripted([plan_of(), plan_of()], **project(tmp_path)), model)
    again = Scripted([plan_of()], **project(tmp_path, overwrite=True))
    assert (again.trials, files(tmp_path)) == ({}, [])
    assert step(again, model).trial_id == "0000"


@pytest.mark.parametrize("failing", ["write", "rename"])
def test_write_json_is_all_or_nothing(tmp_path, monkeypatch, failing):
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})

    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    if failing == "write":
        monkeypatch.setattr(tf.io.gfile.GFile, "write", fail)
    else:
        monkeypatch.setattr(tf.io.gfile, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"new": 2})
    assert files(tmp_path) == ["file.json"]
    assert json.loads(path.read_text()) == {"old": 1}


def test_write_json_of_the_unwritable_touches_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "file.json", {"model": object()})
    assert files(tmp_path) == []


def test_every_file_is_written_whole(model, tmp_path, monkeypatch):
    """No file of a project is written except by renaming a finished one onto it."""
    opened = []
    real = tf.io.gfile.GFile

    def spy(name, mode="r"):
        opened.extend([str(name)] if "w" in mode else [])
        return real(name, mode)

    monkeypatch.setattr(tf.io.gfile, "GFile", spy)
    step(Scripted([plan_of()], **project(tmp_path)), model)
    assert opened
    assert all(name.endswith(".tmp") for name in opened)
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]


def test_copies_are_independent(model):
    oracle = Scripted([plan_of(), plan_of()], seed=3)
    step(oracle, model)
    twin = copy.deepcopy(oracle)
    step(twin, model)
    assert (len(oracle.trials), len(twin.trials)) == (1, 2)
    assert step(oracle, model).trial_id == "0001"
    assert oracle.asked[1][3] == twin.asked[1][3]


def test_the_oracle_keeps_no_model_alive():
    oracle = Scripted([plan_of()])
    oracle.plans = []
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    alive = weakref.ref(model)
    oracle.propose(model, None)
    del model
    gc.collect()
    assert alive() is None


def test_seeds():
    def draws(seed):
        oracle = Scripted(seed=seed)
        return [oracle.next_seed() for _ in range(3)]

    assert draws(0) == draws(0) == [1, 2, 3]
    assert draws(7) != draws(0)
    keras.utils.set_random_seed(1)
    first = draws(None)
    keras.utils.set_random_seed(1)
    assert draws(None) == first


@pytest.mark.parametrize(
    ("fields", "arguments", "expected"),
    [
        ({}, (100,), (None, None, None)),
        ({"max_params": 150}, (100,), (50, None, None)),
        ({"max_params": 150}, (160,), (0, None, None)),
        ({"growth_per_step": 0.25}, (100,), (25, None, None)),
        ({"growth_per_step": 0.25, "max_params": 110}, (100,), (10, None, None)),
        ({"growth_per_step": 8}, (100,), (None, None, 8)),
        ({"max_flops": 1000}, (100, 400), (None, 600, None)),
    ],
)
def test_limits(fields, arguments, expected):
    limits = Scripted(**fields, min_gain_per_param=1e-6, round_to=4).limits(*arguments)
    assert (limits.params, limits.flops, limits.edits) == expected
    assert (limits.min_gain_per_param, limits.round_to) == (1e-6, 4)


@pytest.mark.parametrize(
    ("fields", "prices"),
    [
        ({}, None),
        ({"max_params": 150}, None),
        ({"max_flops": 1000, "growth_per_step": 0.25}, (0.0, 1.0)),  # a step is no budget
        ({"max_flops": 1000, "max_params": 400}, None),
    ],
)
def test_what_counts_is_the_budget(fields, prices):
    assert Scripted(**fields).limits(100, 400).prices == prices


def test_limits_ask_for_flops():
    with pytest.raises(ValueError, match="max_flops=10 needs"):
        Scripted(max_flops=10).limits(100)


def test_include_exclude():
    names = ["conv1", "conv2", "dense"]
    assert Scripted(include="conv.*", exclude=["conv2"]).site_names(names) == ["conv1"]
    with pytest.raises(ValueError, match=r"\['head'\]"):
        Scripted(exclude="head").site_names(names)


@pytest.mark.parametrize(
    ("fields", "error", "named"),
    [
        ({"max_params": 0}, ValueError, "max_params must be None or a whole number >= 1. Found: 0"),
        ({"max_params": 1e5}, ValueError, "max_params"),
        ({"max_flops": -1}, ValueError, "max_flops"),
        ({"max_trials": 0}, ValueError, "max_trials"),
        ({"growth_per_step": 0}, ValueError, "growth_per_step .* Found: 0"),
        ({"growth_per_step": True}, ValueError, "growth_per_step"),
        ({"growth_per_step": -0.5}, ValueError, "growth_per_step"),
        ({"min_gain_per_param": -1}, ValueError, "min_gain_per_param"),
        ({"round_to": 2.5}, ValueError, "round_to"),
        ({"include": "conv("}, ValueError, r"include='conv\(' is no regular expression"),
        ({"exclude": [3]}, TypeError, "exclude takes .* Found: 3"),
        ({"seed": "x"}, ValueError, "seed"),
        ({"objective": "wibble"}, ValueError, "wibble"),
        ({"directry": "x"}, TypeError, "directry"),
    ],
)
def test_bad_arguments(fields, error, named):
    with pytest.raises(error, match=named):
        Scripted(**fields)


def test_the_strategy_is_abstract():
    with pytest.raises(TypeError, match="propose_plan"):
        GrowthOracle()


def test_results_summary(model, capsys):
    oracle = Scripted([plan_of(), plan_of(6, 9, -0.25), plan_of(9, 10)])
    step(oracle, model, 2)
    step(oracle, model, 4, status="rejected", reason="the loss rose", params_before=120)
    oracle.propose(model, "data", epoch=6)
    oracle.report("0000", {"val_loss": 0.5}, epoch=3)
    oracle.results_summary()
    *head, titles, rule, first, second, third, note = capsys.readouterr().out.splitlines()
    assert head == [
        "Results summary",
        "Results in memory only",
        "Showing the last 3 of 3 growth steps",
        'Objective(name="val_loss", direction="min")',
    ]
    table = [re.split(" {2,}", line) for line in (titles, first, second, third)]
    grew = ["conv1 4->6 (add, split)", "conv1 6->9 (add, split)", "conv1 9->10 (add, split)"]
    assert table == [
        "trial epoch status grew parameters estimated measured val_loss".split(),
        ["0000", "2", "COMPLETED", grew[0], "100 -> 120", "-0.0500", "-0.0400", "0.5000"],
        ["0001", "4", "INVALID", grew[1], "120 -> 120", "-0.2500", "-0.0400", "-"],
        ["0002", "6", "RUNNING", grew[2], "-", "-", "-", "-"],
    ]
    assert note == "0001: the loss rose"
    starts = [match.start() for match in re.finditer("-+", rule)]
    assert all(
        line[start - 1] == " " != line[start] for line in (titles, first) for start in starts[1:]
    )
    oracle.results_summary(num_trials=1)
    assert "Showing the last 1 of 3 growth steps" in capsys.readouterr().out


def test_it_is_quiet_in_fit(model, capsys):
    step(Scripted([plan_of()]), model)
    assert capsys.readouterr().out == ""
    loud = Scripted([plan_of()])
    loud.verbose = 1
    step(loud, model)
    assert "tfgrow/grew" in capsys.readouterr().out


class Guessing(keras_tuner.Tuner):
    """A stock tuner that hands its oracle on; only what a project of Keras Tuner needs."""

    def run_trial(self, trial, **_kwargs):
        raise AssertionError("no trial is ready")


def test_a_stock_tuner_takes_it(model, tmp_path):
    """It finds the project, prints the summary and reloads, as with any other oracle."""
    oracle = Scripted([plan_of()])
    tuner = Guessing(oracle, hypermodel=lambda _hp: model, directory=tmp_path, project_name="t")
    step(oracle, model)
    tuner.save()
    again = Guessing(Scripted(), hypermodel=lambda _hp: model, directory=tmp_path, project_name="t")
    assert list(again.oracle.trials) == ["0000"]
    assert again.get_best_hyperparameters()[0].get("conv1") == 6


def test_describe_widths():
    assert describe_widths({"a": (1, 2), "b": (3, 3), "c": (5, 4)}) == "a 1->2, c 5->4"
