import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf

from tfgrow.journal import Journal
from tfgrow.types import GrowthEvent


def event(epoch=2, **fields):
    values = {
        "epoch": epoch,
        "applied": (
            {"site": "conv1", "morphism": "split", "units": 1, "estimated_change": -0.02},
            {"site": "conv1", "morphism": "add", "units": 1, "estimated_change": -0.03},
        ),
        "widths": {"conv1": (4, 6), "conv2": (8, 8)},
        "params_before": 100,
        "params_after": 140,
        "flops_before": 1000,
        "flops_after": 1400,
        "estimated_change": -0.05,
        "measured_change": -0.04,
        "loss_before": 0.9,
        "alpha": 1.0,
        "seconds": {"learn": 1.5, "guard": 0.5},
        "newborn": {"conv1": 2},
    }
    return GrowthEvent(**{**values, **fields})


def three_events():
    return [
        event(2),
        event(4, widths={"conv2": (8, 9)}, status="rejected", alpha=0.0, reason="it rose"),
        event(6, widths={"dense": (3, 4), "conv1": (6, 7)}, seconds={"score": 1.0}),
    ]


def test_file_holds_every_event_after_each_append(tmp_path):
    path = tmp_path / "journal.json"
    journal = Journal(path)
    for count, grown in enumerate(three_events(), start=1):
        journal.append(grown)
        assert Journal.load(path).events == journal.events == three_events()[:count]
    assert [file.name for file in tmp_path.iterdir()] == ["journal.json"]


def test_loaded_journal_goes_on_in_its_file(tmp_path):
    path = tmp_path / "journal.json"
    Journal(path).append(event(2))
    Journal.load(path).append(event(4))
    assert [grown.epoch for grown in Journal.load(path)] == [2, 4]


def test_in_memory_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal(events=[event()])
    journal.append(event(4))
    assert len(journal) == 2
    assert not list(tmp_path.iterdir())


def test_numpy_values_become_strict_json(tmp_path):
    grown = event(
        params_after=np.int64(140), estimated_change=np.float32(-0.5), measured_change=float("nan")
    )
    path = tmp_path / "journal.json"
    Journal(events=[grown]).save(path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    saved = json.loads(path.read_text(), parse_constant=refuse)["events"][0]
    assert (saved["params_after"], saved["estimated_change"]) == (140, -0.5)
    assert saved["measured_change"] is None


@pytest.mark.parametrize("failing", ["write", "rename"])
def test_failed_write_keeps_the_old_file_and_the_old_events(tmp_path, monkeypatch, failing):
    path = tmp_path / "journal.json"
    journal = Journal(path)
    journal.append(event(2))
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    if failing == "write":
        monkeypatch.setattr(tf.io.gfile.GFile, "write", fail)
    else:
        monkeypatch.setattr(tf.io.gfile, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        journal.append(event(4))
    assert path.read_bytes() == before
    assert [grown.epoch for grown in journal] == [2]
    assert [file.name for file in tmp_path.iterdir()] == ["journal.json"]


def test_widths_history():
    assert Journal(events=three_events()).widths_history() == [
        {"epoch": 0, "conv1": 4, "conv2": 8, "dense": 3},
        {"epoch": 2, "conv1": 6, "conv2": 8, "dense": 3},
        {"epoch": 4, "conv1": 6, "conv2": 8, "dense": 3},
        {"epoch": 6, "conv1": 7, "conv2": 8, "dense": 4},
    ]


def test_rows_are_flat_and_alike():
    rows = Journal(events=three_events()).to_rows()
    assert len({tuple(row) for row in rows}) == 1
    plain = (int, float, str, type(None))
    assert all(isinstance(value, plain) for row in rows for value in row.values())
    first, second, third = rows
    assert (first["grew"], first["morphisms"]) == ("conv1 4->6", "split, add")
    assert (first["edits"], first["newborn"], first["seconds"]) == (2, 2, 2.0)
    assert (first["seconds/learn"], first["seconds/score"], third["seconds/score"]) == (
        1.5,
        None,
        1,
    )
    assert (second["status"], second["reason"], second["grew"]) == ("rejected", "it rose", "")
    assert (third["width/conv1"], third["width/conv2"], third["width/dense"]) == (7, 8, 4)


def test_rows_of_an_empty_journal():
    assert Journal().to_rows() == []


def test_newborn_alive_is_the_one_late_figure(tmp_path):
    path = tmp_path / "journal.json"
    journal = Journal(path)
    journal.append(event(2))
    journal.append(event(4))
    journal.note_newborn_alive(-1, 0.75)
    assert Journal.load(path).events == [
        event(2),
        dataclasses.replace(event(4), newborn_alive=0.75),
    ]
    with pytest.raises(ValueError, match=r"share from 0 to 1. Found: 1.5"):
        journal.note_newborn_alive(0, 1.5)


def test_events_is_a_copy():
    journal = Journal(events=[event()])
    journal.events.clear()
    assert len(journal) == 1
    assert journal[0] == event()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "is not a growth journal"),
        ("[1]", "is not a growth journal"),
        ('{"version": 1}', "is not a growth journal"),
        ('{"version": 99, "events": []}', "version 99"),
        ('{"version": 1, "events": [{"epoch": 1}]}', "event that cannot be read"),
    ],
)
def test_load_refuses_other_files(tmp_path, text, named):
    path = tmp_path / "journal.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=named):
        Journal.load(path)


def test_load_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no journal at .*gone.json"):
        Journal.load(tmp_path / "gone.json")


def test_only_events():
    with pytest.raises(TypeError, match="Found: dict"):
        Journal().append({"epoch": 1})
