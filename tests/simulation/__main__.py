"""Replay or search: `python -m simulation FIRST [LAST]`, from tests/, plays the runs of these seeds.

The log of one seed is printed; of several, those that fail.
"""

from __future__ import annotations

import sys
import time
import traceback

from simulation.node import Node
from simulation.schedule import Run


def _show(node: Node) -> None:
    """What a node has at the end."""
    print(node.name, "dropped", {reason: count for reason, count in node.plane.counts.drops.items() if count})
    for peer in node.plane.peers:
        print(
            f"  {peer.name}: circuit {peer.circuit}, {peer.queued()} packets wait, {peer.pool.scaled} wanted"
        )
        for link in peer.pool.carriers:
            lanes = [f"{lane.stream.id}{' leaving' * lane.leaving}" for lane in link.lanes]
            state = "leaving" if link.leaving else "suspect" if link.suspect else "stays"
            print(f"    session {link.session_id & 0xFFFF} {state}, streams {lanes}, {link.opening} opening")


def main(first: int, last: int) -> int:
    failed = packets = 0
    begun_s = time.monotonic()
    for seed in range(first, last + 1):
        run = Run(seed, faulty=bool(seed % 2))
        try:
            run.play()
        except Exception as error:
            failed += 1
            frame = traceback.extract_tb(error.__traceback__)[-1]
            print(f"{seed}: {type(error).__name__}: {error} ({frame.name}:{frame.lineno})", flush=True)
            if first == last:
                traceback.print_exc()
        if first == last:
            print(*run.world.log, sep="\n")
            for node in run.world.nodes.values():
                _show(node)
        packets += run.world.packets
    passed_s = time.monotonic() - begun_s
    print(f"{last - first + 1} runs, {failed} failed, {packets} packets, {passed_s:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    begin = int(sys.argv[1])
    sys.exit(main(begin, int(sys.argv[2]) if len(sys.argv) > 2 else begin))
