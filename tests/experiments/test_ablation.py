"""Ablations: each variant is what it says, and they are laid out as the comparison's methods."""

import json

import numpy as np
import pytest
from absl import flags

import tfgrow
from experiments import ablated, ablation, compare, contest, standings
from tests.experiments.here import spare_the_process
from tests.integration.fitting import arrays, compiled, mlp

TINY = (
    "--datasets=digits", "--models=mlp", "--widths=3,3", "--budgets=450", "--max_train=400",
    "--epochs=3", "--every=1", "--settle=0.3", "--seeds=1", "--threads=1",
)  # fmt: skip


def options(*arguments):
    values = flags.FlagValues()
    ablation.define_flags(values)
    values(["program", *TINY, *arguments])
    return values


def learned(**changes):
    """An oracle's own look at learned candidates of a small model, and the estimator's."""
    model = compiled(mlp())
    oracle = ablated.Ablated(seed=0, learn_steps=2, score_batches=2, **changes)
    data = oracle.split(arrays())
    estimator = tfgrow.GaussNewtonEstimator(model, seed=0)
    edits = estimator.learn(tfgrow.candidates(model, "split", seed=0), data.learn, steps=2)
    return oracle.interaction(estimator, edits, data.score), estimator.interaction(
        edits, data.score
    )


def test_independent_candidates_share_nothing():
    found, whole = learned(joint=False)
    np.testing.assert_allclose(found.scores, whole.scores, rtol=1e-5)
    assert found.change() == pytest.approx(whole.scores.sum(), rel=1e-5)
    assert abs(found.change() - whole.change()) > 1e-6


@pytest.mark.parametrize("joint", [True, False])
def test_the_estimate_of_independent_candidates_is_the_sum_of_theirs(joint):
    model = compiled(mlp())
    oracle = ablated.Ablated(seed=0, learn_steps=2, curvature="exact", joint=joint)
    data = oracle.split(arrays())
    estimator = tfgrow.GaussNewtonEstimator(model, seed=0)
    edits = estimator.learn(tfgrow.candidates(model, "add", seed=0), data.learn, steps=2)
    whole = estimator.interaction(edits, data.score)
    expected = whole.change() if joint else whole.scores.sum()
    assert oracle.estimate(model, edits, data.score) == pytest.approx(expected, rel=1e-4)
    assert abs(whole.change() - whole.scores.sum()) > 1e-4


def test_with_nothing_taken_out_it_is_the_oracle():
    found, whole = learned()
    np.testing.assert_allclose(found.gram, whole.gram, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("cross_fitted", [True, False])
def test_same_samples(cross_fitted):
    data = ablated.Ablated(seed=0, cross_fitted=cross_fitted).split(arrays())
    same = all(one is other for one, other in zip(data.learn, data.score, strict=False))
    assert same is not cross_fitted


def test_only_gauss_newton_has_variants():
    with pytest.raises(ValueError, match="uniform"):
        ablated.make("uniform", None, 0)


def test_every_variant_is_explained_and_differs_in_what_growing_heeds():
    assert set(ablation.SAID) == set(ablation.VARIANTS) - {ablation.STRATEGY}
    known = {*compare.COMMON, *contest.CHANGES, "guard", "schedule", "strategy"}
    for changes in ablation.VARIANTS.values():
        assert set(changes) <= known
    cells = list(ablation.cells_of(options()))
    assert len({cell.path for cell in cells}) == len(cells) == 2 * len(ablation.VARIANTS)
    keys = {json.dumps(cell.key, sort_keys=True) for cell in cells}
    assert len(keys) == len(ablation.VARIANTS)
    assert {cell.method for cell in cells if cell.strategy != "gauss_newton"} == {"first_order"}


def test_an_unknown_variant_is_refused():
    with pytest.raises(flags.IllegalFlagValueError, match="expected some of gauss_newton, raw"):
        options("--variants=magic")


def test_a_sweep_of_variants(tmp_path, monkeypatch):
    chosen = options(
        f"--results_dir={tmp_path}", "--variants=gauss_newton,independent,no_guard,few_steps"
    )
    made = []

    def here(work, cell, grown):
        made.append(cell)
        return work(cell, grown)

    spare_the_process(monkeypatch)
    monkeypatch.setattr(compare, "in_fresh_process", here)
    compare.sweep(list(ablation.cells_of(chosen)))
    assert [(cell.method, cell.claim) for cell in made] == [
        (name, claim) for name in chosen.variants for claim in ("grown", "from_scratch")
    ]
    page = tmp_path / "ablation.md"
    results = standings.collect(tmp_path)
    written = standings.write(results, tmp_path, str(page), ablation.introduction(results))
    assert not [path for path in written if path.suffix == ".png"]
    text = page.read_text()
    assert text.startswith("# What matters")
    assert "- `few_steps`: 2 learning steps" in text
    assert "- `many_steps`" not in text, "there is no cell of it"
    assert "few_steps: `--learn_steps=2`." in text, "what differs"
    for name in chosen.variants:
        assert text.count(f"| {name} |") >= 2, "a line for either claim"
