"""Questions to children, and their answers, which may come in several messages (vpnd.api.parts)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from supervisor.children import Child
from vpnd.api import messages, parts
from vpnd.errors import ProtocolViolation, VpndError, of_kind

#: What an argument of a command may be.
Argument = str | int | float | bool | None

#: Of one answer; the longest, of all members there may be, has a few hundred (vpnd.api.parts.MAX_PART_BYTES each).
MOST_PARTS = 512
_ANSWERS = messages.ControlStatus | messages.ShardStatus | messages.ProbeAnswer | messages.Answer


class _Question:
    """One that waits for its answer; `parts` of it have come."""

    def __init__(self, child: Child[Any], answer: asyncio.Future[Any]) -> None:
        self.child, self.answer = child, answer
        self.parts: list[Any] = []


class Questions:
    """Owner: supervisor loop. `heard` is given what children say, `gone` those whose process has ended."""

    def __init__(self) -> None:
        self._next = 1
        self._waiting: dict[int, _Question] = {}

    def heard(self, child: Child[Any], message: messages.Message) -> None:
        """Pass an answer to who waits for it. Anything else, and what nobody waits for any more, is passed over.

        Raises ProtocolViolation for an answer to no question, and for one without an end.
        """
        if not isinstance(message, _ANSWERS):
            return
        if not 0 < message.serial < self._next:
            raise ProtocolViolation(f"{type(message).__name__} to what was never asked")
        question = self._waiting.get(message.serial)
        if question is None or question.child is not child or question.answer.done():
            return
        if not isinstance(message, messages.ProbeAnswer):
            question.parts.append(message)
            if len(question.parts) > MOST_PARTS:
                raise ProtocolViolation(f"{type(message).__name__} in more than {MOST_PARTS} parts")
            if message.more:
                return
            message = parts.joined(question.parts)
        question.answer.set_result(message)

    def gone(self, child: Child[Any]) -> None:
        """Nobody need wait for what it was asked."""
        for question in self._waiting.values():
            if question.child is child and not question.answer.done():
                question.answer.set_result(None)

    def last_words(self, child: Child[Any]) -> None:
        """Have it say once more how it is; nobody waits for the answer."""
        child.send(messages.StatusRequest(serial=self._serial()))

    def _serial(self) -> int:
        self._next += 1
        return self._next - 1

    async def ask(self, child: Child[Any], timeout_s: float) -> Any:
        """How a child is: its ControlStatus or ShardStatus, None when it is not up or does not say."""
        return await self._exchange(child, lambda serial: messages.StatusRequest(serial=serial), timeout_s)

    async def probe(
        self, shard: Child[Any], destination: str, timeout_s: float, protocol: int = 0, port: int = 0
    ) -> messages.ProbeAnswer | None:
        """What a shard measures for `vpnd ping` and `vpnd why`; None as for `ask`."""
        answer: messages.ProbeAnswer | None = await self._exchange(
            shard,
            lambda serial: messages.ProbeRequest(
                serial=serial, destination=destination, protocol=protocol, port=port
            ),
            timeout_s,
        )
        return answer

    async def request(
        self, control: Child[Any], command: str, arguments: dict[str, Argument], timeout_s: float
    ) -> bytes:
        """Have control carry out a command: its answer, JSON. Raises the error it refuses with, or VpndError when it
        is away or does not answer in time; it may have been carried out then."""
        answer = await self._exchange(
            control,
            lambda serial: messages.Request(serial=serial, command=command, arguments=arguments),
            timeout_s,
        )
        if answer is None:
            raise VpndError(f"control has not answered ({control.state.value}); see `vpnd status`")
        if answer.error:
            raise of_kind(answer.kind, answer.error)
        result: bytes = answer.result
        return result

    async def _exchange(
        self, child: Child[Any], question: Callable[[int], messages.Message], timeout_s: float
    ) -> Any:
        if not child.works:
            return None
        serial = self._serial()
        asked = self._waiting[serial] = _Question(child, asyncio.get_running_loop().create_future())
        child.send(question(serial))
        try:
            return await asyncio.wait_for(asked.answer, timeout_s)
        except TimeoutError:
            return None
        finally:
            del self._waiting[serial]
