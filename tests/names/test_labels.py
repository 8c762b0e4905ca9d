"""Names of members become labels: good ones, one each, the same on every node."""

from __future__ import annotations

import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpnd.names.members import MAX_LABEL, assign, is_label

names = st.text(min_size=1, max_size=63) | st.text("aAbB-._ü", min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("given_names", "label"),
    [
        pytest.param(["box"], "box", id="a host label stays as it is"),
        pytest.param(["MacBook-Pro"], "macbook-pro", id="capitals become small letters"),
        pytest.param(["4", "x"], "4", id="a digit alone is a host label"),
        pytest.param(["a" * 63], "a" * 63, id="a label may be 63 long"),
        pytest.param(["büro.pc"], "b-ro-pc-", id="what no host label has becomes a hyphen, marked"),
        pytest.param(["-x-"], "x-", id="a hyphen at an end is none of a host label"),
        pytest.param(["☃"], "member-", id="a name without a letter is a member"),
        pytest.param(
            ["xn--bro-hoa"], "xn-bro-hoa-", id="what looks like an encoding is not passed off as one"
        ),
        pytest.param(["\u212aelvin"], "elvin-", id="only A to Z have small letters here"),
        pytest.param(["."], "member-", id="a dot alone"),
    ],
)
def test_a_name_becomes_a_label(given_names: list[str], label: str) -> None:
    got = assign(given_names)[given_names[0]]
    if label.endswith("-"):
        assert got.startswith(label) and len(got) == len(label) + 6
    else:
        assert got == label


def test_who_is_spelt_like_the_label_has_it() -> None:
    labels = assign(["Box", "BOX", "box"])
    assert labels["box"] == "box"
    assert labels["Box"].startswith("box-") and labels["BOX"].startswith("box-")
    assert assign(["Box", "BOX"])["BOX"] == "box", "of capitals alone, the first of the alphabet"


def test_a_name_chosen_to_be_anothers_label_does_not_take_it_over_silently() -> None:
    marked = assign(["büro"])["büro"]
    labels = assign(["büro", marked])
    assert labels[marked] == marked and labels["büro"] != marked and is_label(labels["büro"])


@given(st.lists(names, max_size=20), st.randoms())
def test_labels_are_good_differ_and_do_not_depend_on_order(several: list[str], rng: random.Random) -> None:
    labels = assign(several)
    assert labels.keys() == set(several)
    assert len(set(labels.values())) == len(labels)
    for label in labels.values():
        assert is_label(label) and len(label) <= MAX_LABEL
        assert set(label) <= set(string.ascii_lowercase + string.digits + "-")
    rng.shuffle(several)
    assert assign(several) == labels
