"""Figures: the right cells, axes and scales; any number of results, depth and numbers that are not known."""

import matplotlib
import numpy as np
import pytest

from mixln_jax.report import figures, style

MIX = ['post', 'pre', 'pre', 'pre']


def matrix(L, factor=0.1):
    """Distances that grow with the number of layers between, and a little with the depth."""
    depth = np.arange(L + 1)
    return (factor * np.abs(depth[:, None] - depth) + 0.001 * np.minimum(depth[:, None], depth)).tolist()


def measured(values, error=0.1):
    return {'mean': list(values), 'standard_error': [error for _ in values] if error else None}


def angular(label, L, factor=0.1):
    return {'label': label, 'distance': {'mean': matrix(L, factor), 'standard_error': None}}


def numbered(label, values):
    return {'label': label, 'layer_index': list(range(1, len(values) + 1))}


def dropped(label, values, names=None, error=0.1):
    drop = {'1': measured(values, error), '2': measured(values[:-1], error)}
    names = names or ['pre'] * len(values)
    return numbered(label, values) | {
        'norm_position': names,
        'metrics': {'loss': {'drop': drop}, 'perplexity': {'drop': drop}},
    }


def gradient(label, values, error=0.1):
    quantity = measured(values, error)
    return numbered(label, values) | {'layers': quantity, 'matrices': {name: quantity for name in figures.MATRICES}}


def stream(label, values, theory, error=0.01):
    layers = measured(values[1:], error)
    return numbered(label, values[1:]) | {
        'variance': measured(values, error),
        'contribution': {'attention': layers, 'mlp': layers},
        'theory': theory,
    }


def panels(figure):
    """The axes of a figure, without those of bars of colours."""
    return [ax for ax in figure.axes if ax.get_label() != '<colorbar>']


def heights(ax):
    return [bar.get_height() for bar in ax.patches]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


class TestAngular:
    def test_cells_are_the_papers(self):
        """Row n, column l is d(x_l, x_{l+n}), and nothing beyond l + n = L."""
        given = np.array(matrix(3))
        cells = figures.span_cells(given)
        for n in (1, 2, 3):
            for l in (0, 1, 2):
                assert cells.mask[n - 1, l] == (l + n > 3)
                assert l + n > 3 or cells[n - 1, l] == given[l, l + n]

    def test_one_scale_from_zero_and_one_bar(self):
        figure = figures.angular([angular('a', 4), angular('b', 6, 0.05)])
        first, second = panels(figure)
        assert [ax.get_title() for ax in (first, second)] == ['a', 'b']
        for ax, L in ((first, 4), (second, 6)):
            [image] = ax.images
            assert image.get_clim() == (0, pytest.approx(0.4)) and image.get_cmap().name == 'viridis_r'
            assert image.get_array().count() == L * (L + 1) / 2
            assert image.get_extent() == [-0.5, L - 0.5, 0.5, L + 0.5]
        assert len(figure.axes) == 3 and figure.axes[2].get_ylabel() == 'angular distance (share of π)'
        assert first.get_ylabel() == 'layers spanned $n$' and first.get_xlabel() == 'start depth $l$'

    def test_a_panel_alone_on_the_scale_of_all(self):
        both = [angular('a', 4), angular('b', 6, 0.05)]
        [ax] = panels(figures.angular(both[1:], among=both))
        assert ax.images[0].get_clim()[1] == pytest.approx(0.4)

    def test_not_finite_is_grey(self):
        result = angular('a', 4)
        result['distance']['mean'][1][2] = None
        [ax] = panels(figures.angular([result]))
        grey, shown = ax.images
        assert np.argwhere(~grey.get_array().mask).tolist() == [[0, 1]]
        assert shown.get_array().count() == 9

    def test_heat_map(self):
        [ax] = panels(figures.heat_map(np.array(matrix(5))))
        assert ax.images[0].get_array().count() == 15


class TestDrop:
    def test_bars_errors_and_shared_axis(self):
        results = [dropped('a', [3.0, 1.0, 2.0, -1.0], MIX), dropped('b', [6.0, 1.0, 2.0, 1.0])]
        first, second = panels(figures.drop(results, 'loss'))
        assert heights(first) == [3, 1, 2, -1] and first.get_ylabel() == 'change in loss (nats)'
        assert first.get_ylim() == second.get_ylim() == pytest.approx((-1.46, 6.46), abs=0.01)
        bars = first.collections[0].get_segments()
        assert bars[0].tolist() == [[1, pytest.approx(2.9)], [1, pytest.approx(3.1)]]
        assert {text.get_text() for text in first.texts} == {'post', 'pre'} and not second.texts
        assert panels(figures.drop(results[:1], 'loss', among=results))[0].get_ylim() == first.get_ylim()

    def test_blocks(self):
        [ax] = panels(figures.drop([dropped('a', [3.0, 1.0, 2.0])], 'perplexity', block=2))
        assert heights(ax) == [3, 1] and ax.get_xlabel() == 'first of 2 layers left out'

    def test_a_layer_that_ruins_the_network_hides_no_other(self):
        [ax] = panels(figures.drop([dropped('a', [5000.0, 1.5, 2.0, -0.5])], 'perplexity'))
        assert ax.get_yscale() == 'symlog' and ax.get_ylabel().endswith('logarithmic beyond ±1')
        [ax] = panels(figures.drop([dropped('a', [50.0, 1.5, 2.0, -0.5])], 'perplexity'))
        assert ax.get_yscale() == 'linear' and 'logarithmic' not in ax.get_ylabel()

    def test_not_finite_is_a_cross(self):
        [ax] = panels(figures.drop([dropped('a', [3.0, None, float('inf'), 1.0])], 'perplexity'))
        assert ax.get_ylim()[1] < 4
        [cross] = [line for line in ax.lines if line.get_marker() == 'x']
        assert cross.get_xdata().tolist() == [2, 3]
        assert '× not finite' in [text.get_text() for text in ax.texts]


def test_layers_keep_their_numbers_in_a_pruned_network():
    pruned = {'layer_index': [1, 4, 5], 'norm_position': ['post', 'pre', 'pre']}
    [ax] = panels(figures.drop([dropped('a', [1.0, 2.0, 3.0]) | pruned], 'perplexity'))
    assert [bar.get_x() + bar.get_width() / 2 for bar in ax.patches] == pytest.approx([1, 4, 5])
    assert [line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1] == [2.5]  # post | pre
    [ax] = panels(figures.drop([dropped('a', [1.0, 2.0, 3.0]) | pruned], 'perplexity', block=2))
    assert [bar.get_x() + bar.get_width() / 2 for bar in ax.patches] == pytest.approx([1, 4])
    [ax] = panels(figures.gradients([gradient('a', [1.0, 2.0, 3.0]) | pruned]))
    assert ax.lines[0].get_xdata().tolist() == [1, 4, 5]


class TestLines:
    def test_gradients_in_a_band(self):
        figure = figures.gradients([gradient('a', [1.0, 2.0]), gradient('b', [3.0, 4.0, 5.0], None)])
        [ax] = figure.axes
        assert [line.get_ydata().tolist() for line in ax.lines] == [[1, 2], [3, 4, 5]]
        assert ax.lines[1].get_xdata().tolist() == [1, 2, 3] and len(ax.collections) == 1
        assert ax.collections[0].get_datalim(ax.transData).bounds == pytest.approx((1, 0.9, 1, 1.2))
        assert legend(figure) == ['a', 'b'] and ax.get_yscale() == 'linear'

    @pytest.mark.parametrize('values, scale', [([1.0, 9.0], 'linear'), ([1.0, 11.0], 'log'), ([0.0, 11.0], 'linear')])
    def test_logarithmic_beyond_a_decade(self, values, scale):
        assert figures.gradients([gradient('a', values)]).axes[0].get_yscale() == scale

    def test_matrices(self):
        axes = figures.gradient_matrices([gradient('a', [1.0, 20.0])]).axes
        assert [ax.get_title() for ax in axes[:7]] == list(figures.MATRICES)
        assert len({ax.get_ylim() for ax in axes[:7]}) == 1 and axes[6].get_yscale() == 'log'
        assert not axes[7].axison

    def test_variance_and_theory(self):
        figure = figures.variance([stream('a', [1.0, 2.0, 4.0], [1, None, 1e9]), stream('b', [1.0, 1.0, 1.0], None)])
        [ax] = figure.axes
        a, b, theory = ax.lines
        assert ax.get_yscale() == 'log' and a.get_xdata().tolist() == [0, 1, 2]
        assert theory.get_linestyle() == '--' and theory.get_color() == a.get_color() != b.get_color()
        assert legend(figure) == ['a', 'b', 'theory, one constant fitted'] and ax.get_ylim()[1] <= 40
        assert legend(figures.variance([stream('b', [1.0, 1.0, 1.0], [None] * 3)])) == ['b']

    def test_contribution(self):
        first, second = figures.contribution([stream('a', [1.0, 0.5, 0.25], None)]).axes
        assert (first.get_title(), second.get_title()) == ('attention', 'MLP')
        assert second.lines[0].get_ydata().tolist() == [0.5, 0.25]

    def test_colour_stays_with_a_run(self):
        [line] = figures.gradients([gradient('b', [1.0, 2.0]) | {'colour': 3}]).axes[0].lines
        assert line.get_color() == style.COLOURS[3]

    def test_curves(self):
        series = [
            {'label': 'a', 'x': [10, 20], 'y': [3.0, None], 'points': ([20], [2.5])},
            {'label': '_b', 'x': [], 'y': []},
        ]
        figure = figures.curves(series, 'tokens', 'loss (nats)')
        assert [line.get_xdata().tolist() for line in figure.axes[0].lines] == [[10, 20], [20], []]
        assert legend(figure) == ['a', '_b']

    def test_by_layer(self):
        results = [{'label': 'a', 'colour': 2}, {'label': 'b'}]
        figure = figures.by_layer([[1.0, None, 3.0], [2.0, 4.0]], results, 'variance')
        [ax] = figure.axes
        np.testing.assert_equal([line.get_ydata() for line in ax.lines], [[1, np.nan, 3], [2, 4]])
        assert [line.get_xdata().tolist() for line in ax.lines] == [[1, 2, 3], [1, 2]]
        assert ax.lines[0].get_color() == style.COLOURS[2] and legend(figure) == ['a', 'b']
        assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ('layer', 'variance', 'linear')

    def test_a_layer_that_ruins_the_network_hides_no_other(self):
        """On an axis with both signs, which no logarithm has."""
        [ax] = figures.by_layer([[5000.0, 1.5, 2.0, -0.5]], [{'label': 'a'}], 'change in perplexity').axes
        assert ax.get_yscale() == 'symlog' and ax.yaxis.get_transform().linthresh == 1
        assert figures.by_layer([[50.0, 1.5, 2.0, -0.5]], [{'label': 'a'}], '').axes[0].get_yscale() == 'linear'

    def test_evolution(self):
        [ax] = panels(figures.evolution([[1.0, 2.0, None], [1.0, 2.0, 30.0]], [100, 200], 'a', 'gradient norm'))
        shown = ax.images[-1].get_array()
        assert shown.shape == (3, 2) and shown[2, 1] == 30 and shown.mask[2, 0]
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ['100', '200']


@pytest.mark.parametrize('count, L', [(1, 2), (8, 3), (3, 96)])
@pytest.mark.filterwarnings('error')
def test_any_number_of_results_and_layers(count, L):
    """Also where nothing is known, and with a name that is mathematics to matplotlib."""
    values = [None, *(float(l) for l in range(L))] if count > 1 else [None] * (L + 1)
    names = [f'_a $very_long$ name {"of a run " * 5}{i}' for i in range(count)]
    drawn = [
        figures.angular([angular(name, L) for name in names]),
        figures.drop([dropped(name, values[1:]) for name in names], 'perplexity'),
        figures.gradients([gradient(name, values[1:]) for name in names]),
        figures.variance([stream(name, values, values) for name in names]),
        figures.contribution([stream(name, values, None) for name in names]),
    ]
    assert [len(panels(figure)) for figure in drawn] == [count, count, 1, 1, 2]
    assert all(figure.get_figwidth() in (3.25, 6.75) for figure in drawn)
    for figure in drawn if count == 1 else drawn[2:3]:  # drawing takes long
        assert figures.image(figure).std() > 0


def test_pixels_and_files(tmp_path):
    """Equal figures are equal files, and matplotlib's settings are as before."""
    before = dict(matplotlib.rcParams)
    pixels = figures.image(figures.heat_map(matrix(3)))
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.shape[1] == 487
    for folder in ('one', 'two'):
        figures.save(figures.heat_map(matrix(3)), tmp_path / folder, 'map')
    for name in ('map.png', 'map.svg'):
        assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes()
    text = (tmp_path / 'one/map.svg').read_text()
    assert 'dc:date' not in text and '<svg' in text
    assert dict(matplotlib.rcParams) == before
