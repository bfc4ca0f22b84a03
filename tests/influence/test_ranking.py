"""Rankings kept on the way against sorting everything at the end."""

import numpy as np
import pytest

from jhessians.influence.ranking import Ranking


@pytest.mark.parametrize("count", [1, 4, 50])
def test_kept_on_the_way_is_sorted_at_the_end(count):
    random = np.random.default_rng(0)
    scores = random.integers(-3, 4, (23, 5)).astype(np.float32)  # with many equal ones
    ranking = Ranking(5, count)
    order = random.permutation(23)
    for documents in np.array_split(order, 6):
        ranking.add(documents, scores[documents, :2])
        ranking.add(documents, scores[documents, 2:], first_query=2)
    for query in range(5):
        column = scores[:, query]
        best = sorted(range(23), key=lambda n: (-column[n], n))[:count]
        worst = sorted(range(23), key=lambda n: (column[n], -n))[:count]
        assert [each.document for each in ranking.best(query)] == best
        assert [each.document for each in ranking.worst(query)] == worst
        assert [each.rank for each in ranking.worst(query)] == [-n - 1 for n in range(len(worst))]
        assert [each.score for each in ranking.best(query)] == list(column[best])
    assert len(list(ranking.all())) == 5 * 2 * min(count, 23)
