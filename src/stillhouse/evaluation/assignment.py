"""Assignment problem: pair the items of two lists so that the sum of scores is as large as
possible."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def largest_total(scores_MN: NDArray[np.int64]) -> int:
    """The largest sum of scores over pairs (m, n) in which no m and no n occurs twice.

    Uses the Hungarian method (Kuhn 1955) with shortest augmenting paths: O(min(M, N)² max(M, N)).

    scores_MN: must not be negative, so that more pairs are never worse.
    """
    if scores_MN.shape[0] > scores_MN.shape[1]:
        scores_MN = scores_MN.T
    rows, columns = scores_MN.shape
    if not rows:
        return 0
    # Column 0 is a placeholder for the row being added. Potentials keep reduced costs >= 0.
    cost_MN = -scores_MN
    of_row, of_column = np.zeros(rows + 1, np.int64), np.zeros(columns + 1, np.int64)
    row_of = np.zeros(columns + 1, np.int64)
    for row in range(1, rows + 1):
        row_of[0], column = row, 0
        least = np.full(columns + 1, np.iinfo(np.int64).max)
        before = np.zeros(columns + 1, np.int64)
        done = np.zeros(columns + 1, bool)
        while True:
            done[column] = True
            here = row_of[column]
            reduced = cost_MN[here - 1] - of_row[here] - of_column[1:]
            nearer = ~done[1:] & (reduced < least[1:])
            least[1:][nearer], before[1:][nearer] = reduced[nearer], column
            open_columns = np.flatnonzero(~done)
            column = int(open_columns[least[open_columns].argmin()])
            step = least[column]
            of_row[row_of[done]] += step
            of_column[done] -= step
            least[~done] -= step
            if row_of[column] == 0:
                break
        while column:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    matched = np.flatnonzero(row_of[1:])
    return int(scores_MN[row_of[1:][matched] - 1, matched].sum())
