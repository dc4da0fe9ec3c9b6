"""Which names `include` and `exclude` leave."""

import pytest

from tfgrow.oracle.names import matching_names

NAMES = ["conv1", "conv2", "conv10", "dense"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, NAMES),
        (["conv1"], None, ["conv1"]),
        (["conv.*"], None, ["conv1", "conv2", "conv10"]),
        ([r"conv\d"], ["conv2"], ["conv1"]),
        (None, ["conv.*"], ["dense"]),
        ([], None, []),
    ],
)
def test_matching_names(include, exclude, expected):
    assert matching_names(NAMES, include, exclude) == expected


def test_a_name_with_special_characters_matches_itself():
    assert matching_names(["a+b", "ab"], include=["a+b"]) == ["a+b", "ab"]
    assert matching_names(["block(1)"], include=["block(1)"]) == ["block(1)"]


def test_unknown_names_are_listed_all():
    with pytest.raises(ValueError, match=r"\['conv3', 'head'\].*Found: \['conv1', 'conv2'"):
        matching_names(NAMES, include=["conv1", "conv3"], exclude=["head"])


def test_a_site_of_several_names_is_matched_by_each():
    names = [("conv1", "shortcut"), ("conv2",), "head"]
    assert matching_names(names, include=["short.*", "head"]) == ["conv1", "head"]
    assert matching_names(names, exclude=["shortcut"]) == ["conv2", "head"]
