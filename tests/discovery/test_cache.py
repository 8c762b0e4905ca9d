"""What look-ups found, and for how long it is believed."""

from __future__ import annotations

from vpnd.discovery.lookup import AnswerCache

POSITIVE_S, NEGATIVE_S = 60.0, 5.0


def cache(most: int = 10) -> AnswerCache[str]:
    return AnswerCache(POSITIVE_S, NEGATIVE_S, most)


def test_an_answer_is_believed_for_its_lifetime() -> None:
    found = cache()
    found.put("a", "here", 100.0)
    entry = found.get("a", 159.9)
    assert entry is not None
    assert (entry.value, entry.found_s) == ("here", 100.0)
    assert found.get("a", 160.0) is None
    assert len(found) == 0, "what is not believed any more is not kept"


def test_that_there_is_nothing_is_believed_for_less() -> None:
    found = cache()
    found.put("a", None, 100.0)
    entry = found.get("a", 104.9)
    assert entry is not None
    assert entry.value is None
    assert found.get("a", 105.0) is None


def test_a_later_answer_counts() -> None:
    found = cache()
    found.put("a", None, 100.0)
    found.put("a", "here", 101.0)
    entry = found.get("a", 110.0)
    assert entry is not None
    assert entry.value == "here"


def test_in_another_world_all_is_asked_for_again() -> None:
    found = cache()
    found.put("a", "here", 100.0)
    found.clear()
    assert found.get("a", 100.0) is None


def test_it_holds_so_many_and_forgets_the_oldest() -> None:
    found = cache(most=2)
    for place, name in enumerate("abac"):
        found.put(name, name, float(place))
    assert [found.get(name, 4.0) is not None for name in "abc"] == [True, False, True]
