"""How directories become equal: new statements go on at once, and what that missed is found by comparing.

    push      what is new goes to every neighbour that is not known to have it: whole when it is little, otherwise its
              name only (16 bytes), for the neighbour to ask one of those that have it
    compare   on connection, and then with one random neighbour every interval (`messages` draws the exchange)

A neighbour is another member this node has a connection with; which ones, and how bytes reach them, is the owner's
affair. Bytes in, bytes out: no socket, no clock, no dice of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from vpnd.membership import messages
from vpnd.membership.directory import Directory, Refused
from vpnd.membership.index import BUCKET_HASH_BYTES, ENTRY_BYTES, VERSION_BYTES, entry
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.roster import Changes
from vpnd.membership.statements import SLOT_BYTES, Kind, Statement

#: Entries remembered as being with a neighbour, or asked for, or refused; beyond that they may be sent once more.
MAX_REMEMBERED = 1 << 15

Choose = Callable[[Sequence[str]], str]


class Outcome(msgspec.Struct):
    """What came of an event. `send`: (neighbour, message), in this order. `refused`: reasons, one each time.

    `accepted`: statements that are new here: worth storing. `changes`: how the members changed.
    """

    send: list[tuple[str, bytes]] = msgspec.field(default_factory=list)
    accepted: list[Statement] = msgspec.field(default_factory=list)
    refused: list[str] = msgspec.field(default_factory=list)
    changes: Changes = Changes()


class _Neighbour:
    """What is known of one neighbour. `has`: entries it has."""

    def __init__(self) -> None:
        self.has: set[bytes] = set()
        self.compare_at_ms = 0

    def remember(self, entries: Iterable[bytes]) -> None:
        if len(self.has) > MAX_REMEMBERED:
            self.has.clear()
        self.has.update(entries)


class Gossip:
    """The exchange of one node with its neighbours. Times are milliseconds and an argument.

    `interval_ms`: between two comparisons. `push_bytes`: more new bytes at once are named instead of sent.
    `request_ms`: how long an asked neighbour has before another may be asked. `presence_ms`: a member's presence is
    pushed on at most this often. `choose` picks one of several neighbours. Owner: control.
    """

    def __init__(
        self,
        directory: Directory,
        *,
        interval_ms: int,
        push_bytes: int,
        request_ms: int,
        presence_ms: int,
        choose: Choose,
    ) -> None:
        self._directory = directory
        self._interval_ms = interval_ms
        self._push_bytes = push_bytes
        self._request_ms = request_ms
        self._presence_ms = presence_ms
        self._choose = choose
        self._neighbours: dict[str, _Neighbour] = {}
        self._asked: dict[bytes, int] = {}  # entry -> until when its answer is waited for
        self._declined: set[bytes] = set()  # entries that were refused for good
        self._pushed_ms: dict[bytes, int] = {}  # slot of a presence -> when it was pushed on
        self._held: dict[
            bytes, int
        ] = {}  # slot of a presence that came too soon after -> when it is pushed on
        self._next_ms = 0

    def connected(self, neighbour: str, now_ms: int, *, dialed: bool) -> Outcome:
        """There is a connection with `neighbour`, a peer id: the side that `dialed` compares directories.

        It replaces the one before with that neighbour.
        """
        self._neighbours[neighbour] = _Neighbour()
        return self._compare([neighbour], now_ms) if dialed else Outcome()

    def disconnected(self, neighbour: str) -> None:
        self._neighbours.pop(neighbour, None)

    def publish(self, statements: Iterable[Statement], now_ms: int) -> Outcome:
        """Statements this node signed or was given: into the directory and to all neighbours."""
        return self.learn([statement.wire for statement in statements], now_ms)

    def learn(self, wires: Sequence[bytes], now_ms: int) -> Outcome:
        """Statements that came another way, of anybody: as if a neighbour had sent them."""
        outcome = Outcome()
        self._take(wires, None, now_ms, outcome)
        return outcome

    def tick(self, now_ms: int) -> Outcome:
        """To be called when `next_timer_ms` has come: lets members expire, compares with a random neighbour."""
        outcome = Outcome(changes=self._directory.advance(now_ms))
        due = [slot for slot, at_ms in self._held.items() if at_ms <= now_ms]
        held = [self._directory.index.get(slot) for slot in due]
        for slot in due:
            del self._held[slot]
        self._push([one for one in held if one is not None and self._may_push(one, now_ms)], None, outcome)
        if now_ms >= self._next_ms:
            self._next_ms = now_ms + self._interval_ms
            self._asked = {name: until_ms for name, until_ms in self._asked.items() if until_ms > now_ms}
            self._pushed_ms = {
                slot: at_ms for slot, at_ms in self._pushed_ms.items() if at_ms + self._presence_ms > now_ms
            }
            if self._neighbours:
                chosen = self._choose(sorted(self._neighbours))
                outcome.send += self._compare([chosen], now_ms).send
        return outcome

    def clock_set(self, now_ms: int) -> Outcome:
        """The clock was set: everything is judged anew, and what was refused as from the future asked for again."""
        outcome = Outcome(changes=self._directory.judge_anew(now_ms))
        self._asked.clear()
        self._pushed_ms.clear()
        self._held.clear()
        self._next_ms = now_ms
        outcome.send += self._compare(self._neighbours, now_ms).send
        return outcome

    def next_timer_ms(self) -> int:
        """When `tick` is due."""
        expiry_ms = self._directory.next_expiry_ms()
        return min([self._next_ms, *self._held.values(), *([] if expiry_ms is None else [expiry_ms])])

    def receive_untrusted(self, neighbour: str, data: bytes, now_ms: int) -> Outcome:
        """A message of a neighbour. Raises MembershipRefused only, after which the neighbour is best left.

        Bad statements in it do not raise but are in `refused`; a `forged` or `malformed` one is no accident.
        """
        message = messages.parse_untrusted(data)
        state = self._neighbours.get(neighbour)
        outcome = Outcome()
        if state is None:  # disconnected meanwhile
            return outcome
        match message:
            case messages.Summary():
                self._on_summary(neighbour, message, outcome)
            case messages.Buckets():
                self._on_buckets(neighbour, message, outcome)
            case messages.Entries():
                self._on_named(neighbour, state, message.entries, now_ms, outcome, message.buckets)
            case messages.Announce():
                self._on_named(neighbour, state, message.entries, now_ms, outcome)
            case messages.Wants():
                self._on_wants(neighbour, state, message, outcome)
            case messages.Statements():
                self._take(message.wires, neighbour, now_ms, outcome)
        return outcome

    def _compare(self, neighbours: Iterable[str], now_ms: int) -> Outcome:
        summary = messages.encode(
            messages.Summary(messages.VERSION, self._directory.network.id, self._directory.index.root())
        )
        outcome = Outcome()
        for neighbour in neighbours:
            self._neighbours[neighbour].compare_at_ms = now_ms + self._request_ms
            outcome.send.append((neighbour, summary))
        return outcome

    def _on_summary(self, neighbour: str, message: messages.Summary, outcome: Outcome) -> None:
        if message.network != self._directory.network.id:
            raise MembershipRefused("wrong_network", "the other node is in another network")
        if message.root != self._directory.index.root():
            buckets = messages.Buckets(self._directory.index.hashes())
            outcome.send.append((neighbour, messages.encode(buckets)))

    def _on_buckets(self, neighbour: str, message: messages.Buckets, outcome: Outcome) -> None:
        index = self._directory.index
        mine = messages.split(index.hashes(), BUCKET_HASH_BYTES)
        theirs = messages.split(message.hashes, BUCKET_HASH_BYTES)
        different = (number for number, own in enumerate(mine) if own != theirs[number])
        content = ((number, b"".join(map(entry, index.bucket(number).values()))) for number in different)
        outcome.send += [(neighbour, page) for page in messages.bucket_pages(content)]

    def _on_named(
        self,
        neighbour: str,
        state: _Neighbour,
        entries: bytes,
        now_ms: int,
        outcome: Outcome,
        buckets: bytes = b"",
    ) -> None:
        """The neighbour has these `entries`, and of the `buckets` no others."""
        theirs = messages.split(entries, ENTRY_BYTES)
        state.remember(theirs)
        # What both have in different versions is asked for; if theirs is the older one, ours is sent then.
        named = {name[:SLOT_BYTES] for name in theirs}
        offered = [
            entry(statement)
            for number in set(buckets)
            for statement in self._directory.index.bucket(number).values()
            if statement.slot not in named
        ]
        outcome.send += [(neighbour, page) for page in messages.pages(offered, messages.Announce)]
        lacking = self._lacking(theirs, now_ms)
        outcome.send += [(neighbour, page) for page in messages.pages(lacking, messages.Wants)]

    def _on_wants(self, neighbour: str, state: _Neighbour, message: messages.Wants, outcome: Outcome) -> None:
        index = self._directory.index
        found = (index.get(slot) for slot in dict.fromkeys(messages.split(message.slots, SLOT_BYTES)))
        self._send(neighbour, state, [statement for statement in found if statement is not None], outcome)

    def _lacking(self, entries: Iterable[bytes], now_ms: int) -> list[bytes]:
        """Slots of entries that are not here, nor asked for, nor refused before."""
        index, asked, declined = self._directory.index, self._asked, self._declined
        wanted = []
        for name in entries:
            held = index.get(name[:SLOT_BYTES])
            if held is not None and held.digest.startswith(name[SLOT_BYTES:]):
                continue
            if name in declined or asked.get(name, 0) > now_ms:
                continue
            if len(asked) < MAX_REMEMBERED:
                asked[name] = now_ms + self._request_ms
            wanted.append(name[:SLOT_BYTES])
        return wanted

    def _send(self, neighbour: str, state: _Neighbour, statements: list[Statement], outcome: Outcome) -> None:
        statements.sort(key=lambda statement: statement.kind)
        state.remember(map(entry, statements))
        wires = [statement.wire for statement in statements]
        outcome.send += [(neighbour, page) for page in messages.statement_pages(wires)]

    def _take(self, wires: Sequence[bytes], sender: str | None, now_ms: int, outcome: Outcome) -> None:
        """Merge, and push on what is new."""
        merged = self._directory.merge(wires, now_ms)
        outcome.accepted += merged.accepted
        outcome.changes = merged.changes
        state = self._neighbours.get(sender) if sender is not None else None
        outcome.refused += [
            refused.reason
            for refused in merged.refused
            if refused.reason != "rolled_back" or _entry(refused) not in self._asked
        ]
        for statement in merged.accepted:
            self._asked.pop(entry(statement), None)
            if statement.kind in (Kind.GRANT, Kind.REVOKE):
                self._declined.clear()  # what was void may not be any more
        if state is not None and sender is not None:
            state.remember(map(entry, merged.accepted))
            self._on_refused(sender, state, merged.refused, now_ms, outcome)
        fresh = [statement for statement in merged.accepted if self._may_push(statement, now_ms)]
        if fresh:
            self._push(fresh, sender, outcome)

    def _on_refused(
        self, sender: str, state: _Neighbour, refused: Iterable[Refused], now_ms: int, outcome: Outcome
    ) -> None:
        index = self._directory.index
        newer: list[Statement] = []
        for one in refused:
            name = _entry(one)
            if one.reason in _RESTS_ON_OTHERS:
                self._asked.pop(name, None)
                if now_ms >= state.compare_at_ms:  # the neighbour has what we lack to understand it
                    outcome.send += self._compare([sender], now_ms).send
                continue
            held = index.get(one.slot) if one.slot else None
            if one.reason == "rolled_back" and held is not None:
                newer.append(held)
            if one.reason != "not_yet_valid":
                if len(self._declined) >= MAX_REMEMBERED:
                    self._declined.clear()
                self._declined.add(name)
        self._send(sender, state, newer, outcome)

    def _may_push(self, statement: Statement, now_ms: int) -> bool:
        """A member that says where it is all the time keeps nobody but its neighbours busy. What it says last is pushed
        on when its time has come."""
        if statement.kind is not Kind.PRESENCE:
            return True
        due_ms = self._pushed_ms.get(statement.slot, -self._presence_ms) + self._presence_ms
        if now_ms < due_ms:
            self._held[statement.slot] = due_ms
            return False
        self._held.pop(statement.slot, None)
        self._pushed_ms[statement.slot] = now_ms
        return True

    def _push(self, fresh: list[Statement], sender: str | None, outcome: Outcome) -> None:
        whole = sum(len(statement.wire) for statement in fresh) <= self._push_bytes
        for neighbour, state in self._neighbours.items():
            if neighbour == sender:
                continue
            lacking = [statement for statement in fresh if entry(statement) not in state.has]
            if whole:
                self._send(neighbour, state, lacking, outcome)
                continue
            names = [entry(statement) for statement in lacking]
            state.remember(names)
            outcome.send += [(neighbour, page) for page in messages.pages(names, messages.Announce)]


#: Reasons that may be gone with something the sender has.
_RESTS_ON_OTHERS = frozenset({"unknown_authority", "not_member"})


def _entry(refused: Refused) -> bytes:
    return refused.slot + refused.digest[:VERSION_BYTES]
