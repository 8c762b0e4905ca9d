"""What shards are told of peers, as a shard would take it in: every prefix has one owner at all times."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vpnd.api import messages
from vpnd.control.channels import greeting, news
from vpnd.discovery.registry import Member, difference


def member(peer_id: str, prefix: int, name: str = "") -> Member:
    return Member(peer_id=peer_id, name=name or peer_id, prefixes=(f"10.86.0.{prefix}/32",), addresses=())


class Shard:
    """Who owns what. A prefix that is given to a second owner, or taken from another's hands, is a mistake."""

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}
        self.known: dict[str, tuple[str, tuple[str, ...]]] = {}
        self.circuits: dict[str, str] = {}
        self.complete = False

    def take(self, told: list[messages.Message]) -> None:
        for message in told:
            if isinstance(message, messages.PeersComplete):
                self.complete = True
            elif isinstance(message, messages.PeerCircuit):
                assert message.peer_id in self.known
                self.circuits[message.peer_id] = message.state
            elif isinstance(message, messages.PeerForgotten):
                self.release(message.peer_id)
                del self.known[message.peer_id]
            else:
                assert isinstance(message, messages.PeerKnown)
                self.release(message.peer_id)
                for prefix in message.prefixes:
                    assert prefix not in self.owners, "two owners"
                    self.owners[prefix] = message.peer_id
                self.known[message.peer_id] = message.name, message.prefixes

    def release(self, peer_id: str) -> None:
        for prefix in self.known.get(peer_id, ("", ()))[1]:
            assert self.owners.pop(prefix) == peer_id


def test_a_shard_that_arrives_hears_the_circuits_that_are_not_closed() -> None:
    shard = Shard()
    shard.take(greeting([member("a", 1), member("b", 2)], {"b": "open"}))
    assert shard.complete and set(shard.known) == {"a", "b"} and shard.circuits == {"b": "open"}


LISTS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(1, 4), st.sampled_from(("", "other"))),
    unique_by=(lambda row: row[0], lambda row: row[1]),
    max_size=4,
).map(lambda rows: {row[0]: member(*row) for row in rows})


@given(LISTS, LISTS)
def test_whatever_changes_a_shard_ends_up_knowing_the_new_members(
    before: dict[str, Member], after: dict[str, Member]
) -> None:
    shard = Shard()
    shard.take(greeting(before.values(), {}))
    shard.take(news(difference(before, after)))
    assert shard.known == {one.peer_id: (one.name, one.prefixes) for one in after.values()}
