"""The figures of an analysis where a model is small: what is drawn stays inside, and names do not lie on each other."""

import pytest

from twicing.experiments.analyze.figures import products
from twicing.experiments.analyze.keep import Analysis


def analysis_of(layers, first):
    """Ranks that fall with depth, from `first` on."""
    rows = [
        {"label": "tiny", "kind": f"{kind}, {way}", "depth": depth, "effective_rank": 1 + (first - 1) / depth}
        for kind in ("A", "2A - A^2", "as the layers do")
        for way in ("mean over heads", "chains of heads")
        for depth in range(1, layers + 1)
    ]
    return Analysis(models={"tiny": {"shown": True, "label": "tiny"}}, products=rows)


@pytest.mark.parametrize("layers", [1, 2, 12])
@pytest.mark.parametrize("first", [1.2, 60.0])
def test_guides_of_products_end_at_rank_one_and_are_named_in_the_key(layers, first):
    for panel in products(analysis_of(layers, first)).panels:
        # Labels inside would lie on each other where the lines begin.
        assert not panel.axes.texts
        names = [text.get_text() for text in panel.axes.get_legend().get_texts()]
        assert names == ["A", "2A - A^2", "as the layers do", "n^-1/2", "n^-1"]
        half, whole = panel.axes.lines[-2:]
        for line, power in ((half, -0.5), (whole, -1)):
            (start, end), (top, bottom) = line.get_data()
            assert (start, top) == (1, first)
            assert bottom == pytest.approx(max(first * layers**power, 1))
            assert bottom == pytest.approx(first * float(end) ** power)


def test_where_all_tokens_are_the_same_there_is_nothing_to_fall():
    panel = products(analysis_of(3, 1.0)).panels[0]
    assert [text.get_text() for text in panel.axes.get_legend().get_texts()] == ["A", "2A - A^2", "as the layers do"]
