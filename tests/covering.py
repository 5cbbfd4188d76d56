"""Few of many combinations, with nothing left out that a fault may hang on: covering arrays."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterator, Sequence


def covering(rows: Sequence[Sequence[Hashable]], strength: int) -> set[int]:
    """The indices of few rows with every combination of values, in any ``strength`` columns, that occurs in some row.

    A fault mostly hangs on the values of two or three parameters (Kuhn, Wallace and Gallo, "Software Fault Interactions
    and Implications for Software Testing", 2004), so such rows find what all would. Greedy: the row that adds the most
    combinations is next. What a row adds only shrinks, so a row is looked at again only when it comes up.
    """

    def combinations(row: Sequence[Hashable]) -> Iterator[tuple]:
        return itertools.combinations(enumerate(row), strength)

    chosen: set[int] = set()
    covered: set[tuple] = set()
    queue = [(-sum(1 for _ in combinations(row)), index) for index, row in enumerate(rows)]
    heapq.heapify(queue)
    while queue and queue[0][0]:
        _, index = queue[0]
        new = sum(combination not in covered for combination in combinations(rows[index]))
        if -new == heapq.heapreplace(queue, (-new, index))[0] and new:
            heapq.heappop(queue)
            chosen.add(index)
            covered.update(combinations(rows[index]))
    return chosen
