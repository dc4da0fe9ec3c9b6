"""The long run: it stops, is killed, goes on, ends; in this process, on a tiny network."""

import json

import keras
import pytest
from absl import flags

from experiments import headline, headline_page, training

TINY = (
    "--dataset=digits", "--model=mlp", "--widths=3,3", "--max_params=400", "--epochs=5",
    "--every=2", "--max_train=300", "--rounds=1", "--new_units=2", "--growth_per_step=0.4",
    "--threads=1",
)  # fmt: skip


def settings(folder, *arguments):
    values = flags.FlagValues()
    headline.define_flags(values)
    values(["program", *TINY, f"--output_dir={folder}", *arguments])
    return headline.settings_of(values)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(training, "make_repeatable", keras.utils.set_random_seed)


def state_in(folder):
    return json.loads((folder / "headline" / "state.json").read_text())


def test_a_run_that_is_stopped_goes_on_to_its_end(tmp_path):
    stopping = settings(tmp_path, "--hours=0")
    done = []
    while (result := headline.Run(stopping).go_on()) is None:
        done.append(len(state_in(tmp_path)["epochs"]))
    assert done == [1, 3, 4], "not after epoch 2, which a growth follows"
    state, folder = state_in(tmp_path), tmp_path / "headline"
    assert len(state["epochs"]) == 5
    (event,) = (event for epoch in state["epochs"] for event in epoch["events"])
    assert event["status"] == "applied"
    sizes = [epoch["params"] for epoch in state["epochs"]]
    assert sizes[0] == sizes[1] < sizes[2] == sizes[4] == result["params"] <= 400
    plain = keras.models.load_model(folder / "model.keras")
    assert plain.count_params() == result["params"]
    assert json.loads((folder / "result.json").read_text()) == result
    assert sorted(path.name for path in folder.glob("*.keras")) == ["epoch-5.keras", "model.keras"]
    assert (folder / "1" / "saved_model.pb").exists()
    again = headline.Run(stopping).go_on()
    assert again["test_accuracy"] == result["test_accuracy"]


def test_sgd_decays_weights_before_and_after_a_stop(tmp_path):
    chosen = settings(tmp_path, "--hours=0", "--optimizer=sgd", "--weight_decay=0.01")
    while headline.Run(chosen).go_on() is None:
        kept = keras.models.load_model(tmp_path / "headline" / state_in(tmp_path)["model"])
        assert isinstance(kept.optimizer, keras.optimizers.SGD)
        assert kept.optimizer.weight_decay == 0.01
        assert (kept.optimizer.momentum, kept.optimizer.nesterov) == (0.9, True)


def test_the_page_of_a_run_that_has_ended_and_of_one_that_has_not(tmp_path):
    sgd = "--optimizer=sgd"
    run = headline.Run(settings(tmp_path, "--hours=0", sgd))
    assert run.go_on() is None
    kept, docs = tmp_path / "kept.json", tmp_path / "docs" / "headline.md"
    headline_page.write(run.state, None, kept, str(docs), headline.EARLIER)
    assert "The run is not finished: 1 of 5 epochs" in docs.read_text()
    result = headline.Run(settings(tmp_path, sgd)).go_on()
    run = headline.Run(settings(tmp_path, sgd))
    written = headline_page.write(run.state, result, kept, str(docs), headline.EARLIER)
    assert all(path.stat().st_size > 500 for path in written)
    page = docs.read_text()
    assert f"**{100 * result['test_accuracy']:.2f} %** of the test images of digits" in page
    assert page.count(" %\u0020|") == 5 + 1, "a line per epoch, and one for the run"
    assert "--max_params=400" in page
    assert json.loads(kept.read_text())["result"] == result
    other = {**result, "test_accuracy": 0.125, "settings": {**result["settings"], "epochs": 9}}
    del other["settings"]["optimizer"]  # as of a run that is older than the flag
    (tmp_path / "other.json").write_text(json.dumps({"result": other}))
    (tmp_path / "unfinished.json").write_text(json.dumps({"result": None}))
    headline_page.write(run.state, result, kept, str(docs), headline.EARLIER)
    lines = docs.read_text().split("All runs that have ended")[1].splitlines()
    (mine,) = (line for line in lines if line.startswith("| kept |"))
    (others,) = (line for line in lines if line.startswith("| other |"))
    assert mine.endswith("|  |"), "nothing differs"
    assert "12.50 %" in others
    assert others.endswith("| `--epochs=9 --optimizer=adamw` |")
    assert "unfinished" not in "".join(lines)


def test_a_run_that_is_killed_goes_on_after_what_was_written(tmp_path, monkeypatch):
    write, writes = headline._Keeper._write, []

    def killed(self, model):
        writes.append(1)
        if len(writes) == 2:
            model.save(self._run.folder / "epoch-3.keras")  # written, but not yet said
            raise KeyboardInterrupt
        write(self, model)

    monkeypatch.setattr(headline._Keeper, "_write", killed)
    chosen = settings(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        headline.Run(chosen).go_on()
    assert len(state_in(tmp_path)["epochs"]) == 1
    result = headline.Run(chosen).go_on()
    assert len(state_in(tmp_path)["epochs"]) == 5
    assert 247 < result["params"] <= 400


def test_other_settings_are_refused_and_other_places_are_not(tmp_path):
    headline.Run(settings(tmp_path, "--hours=0")).go_on()
    with pytest.raises(ValueError, match="other --max_params, --epochs"):
        headline.Run(settings(tmp_path, "--max_params=500", "--epochs=6"))
    assert headline.Run(settings(tmp_path, "--hours=3", "--threads=2")).done == 1
    older = state_in(tmp_path)
    del older["settings"]["optimizer"]  # there was no such flag, and it was AdamW
    (tmp_path / "headline" / "state.json").write_text(json.dumps(older))
    assert headline.Run(settings(tmp_path)).done == 1
    with pytest.raises(ValueError, match="a run with other --optimizer"):
        headline.Run(settings(tmp_path, "--optimizer=sgd"))


def test_the_rate_falls_when_it_has_grown():
    chosen = {"grow": 0.5, "epochs": 8, "learning_rate": 0.1}
    rates = [headline.rate_at(epoch, chosen) for epoch in range(9)]
    assert rates[:5] == [0.1] * 5
    assert rates[6] == pytest.approx(0.05)
    assert rates[8] == pytest.approx(0)
    assert headline.growing_until({"grow": 1.0, "epochs": 8}) == 7
