"""Best-fit decreasing: conversations into blocks with little padding."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Put items of `lengths` [n] into as few blocks of `capacity` as the heuristic finds; every item lands in exactly one.

    Longest first; each goes where it leaves the least room, so no block holds more than `capacity`. At most
    11/9 optimal + 6/9 blocks (Johnson 1974). O(n log n): open blocks are kept by the room they have left.
    An item longer than `capacity` gets a block of its own; the caller cuts it. Equal lengths keep their order.
    """
    blocks: list[list[int]] = []
    rooms: list[int] = []
    waiting: dict[int, list[int]] = {}
    for item in np.argsort(-np.asarray(lengths), kind="stable"):
        length = int(lengths[item])
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            block = waiting[room].pop()
            if not waiting[room]:
                del waiting[room]
                rooms.pop(at)
        else:
            room, block = capacity, len(blocks)
            blocks.append([])
        blocks[block].append(int(item))
        left = room - length
        if left > 0:
            if left not in waiting:
                insort(rooms, left)
                waiting[left] = []
            waiting[left].append(block)
    return blocks
