"""Figures of what was measured: results in, matplotlib's Figure out, for a column (3.25 inches) or a page (6.75).

A result is one element of `results` in the result.json of an analysis; its layers have the numbers `layer_index`. A
quantity in it is {'mean': list, 'standard_error': list or None}; None or nan is a number that is not known or not
finite, and is left blank or marked with a cross. Beside its own keys a result may have `colour`, its number in
drawing.COLOURS; else its place counts.
"""

import contextlib
import io
import itertools
import pathlib

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize

from mixln_jax.report import style
from mixln_jax.system import outputs

MATRICES = ('attention/q', 'attention/k', 'attention/v', 'attention/o', 'mlp/gate', 'mlp/up', 'mlp/down')
UNITS = {'loss': 'nats', 'exact_match': '%', 'f1': '%'}


def image(figure):
    """The pixels of a figure, [H,W,3] uint8."""
    with matplotlib.rc_context(style.STYLE):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.array(canvas.buffer_rgba())[..., :3]


def svg(figure):
    """A figure as the bytes of an SVG file: the same bytes for the same figure."""
    return _saved(figure, 'svg', {'Date': None, 'Creator': None})


def save(figure, folder, name):
    """Writes <folder>/<name>.png (300 dots an inch) and <name>.svg; without a date, so that equal figures are equal."""
    folder = pathlib.Path(folder)
    outputs.write(folder / f'{name}.svg', svg(figure))  # first: it shows whose both are
    outputs.write(folder / f'{name}.png', _saved(figure, 'png', {'Software': None}))


def is_drawn(path: pathlib.Path) -> bool:
    """Whether a file is an SVG of `save`: matplotlib's, without a date."""
    with contextlib.suppress(OSError):
        with open(path, 'rb') as file:
            head = file.read(3000)
        return b'<g id="figure_1">' in head and b'<dc:date>' not in head
    return False


@style.styled
def angular(results, among=None):
    """Angular distance of the residual stream over n layers from depth l, a heat map a result, on one scale from 0.

    Depth l is behind l layers; in a pruned network they are not those of the first l numbers.

    The axes of Gromov et al. 2024 (arXiv 2403.17887), figure 4, and Mix-LN, figures 2, 3 and 5: cell (l, n) is
    d(x_l, x_{l+n}), which exists for l + n <= L; yellow is small.

    Args:
        results: of `analysis.angular`.
        among: all results that share the scale; None: these.
    """
    cells = [span_cells(result['distance']['mean']) for result in results]
    largest = _largest(span_cells(result['distance']['mean']) for result in among or results)
    figure, axes, columns = style.panels(len(results), square=True)
    for number, (ax, result, values) in enumerate(zip(axes, results, cells, strict=True)):
        L = len(values)
        shown = style.cells(ax, values, Normalize(0, largest), (-0.5, L - 0.5, 0.5, L + 0.5))
        ax.set_box_aspect(1)
        style.integers(ax.xaxis), style.integers(ax.yaxis)
        ax.set_xlabel('start depth $l$' if number + columns >= len(results) else '')
        ax.set_ylabel('layers spanned $n$' if number % columns == 0 else '')
        style.title(ax, result['label'], figure, columns)
    bar = figure.colorbar(shown, ax=axes, fraction=0.05, aspect=25, pad=0.02)
    bar.set_label('angular distance (share of π)')
    style.plain_bar(bar)
    return figure


def heat_map(matrix, title=''):
    """The heat map of one matrix of angular distances [L+1,L+1] between the depths of a network; see `angular`."""
    return angular([{'label': title, 'distance': {'mean': matrix}}])


def span_cells(matrix):
    """A matrix of distances between depths, [L+1,L+1], as [L,L]: row n - 1 and column l is d(x_l, x_{l+n}).

    Cells with l + n > L do not exist: they are masked. Those that are not finite are nan.
    """
    matrix = np.array(matrix, float)
    l, n = np.meshgrid(np.arange(len(matrix) - 1), np.arange(1, len(matrix)))
    exists = l + n < len(matrix)
    return np.ma.array(matrix[l, np.where(exists, l + n, 0)], mask=~exists)


@style.styled
def drop(results, metric='perplexity', block=1, among=None):
    """What a metric becomes without a block of layers minus what it is with all: bars over layers, a panel a result.

    Args:
        results: of `analysis.drop` that have `metric`.
        block: how many layers are left out together.
        among: all results that share the axis; None: these.
    """
    low, high, scale, threshold = style.bar_axis(
        [_measured(r['metrics'][metric]['drop'][f'{block}']) for r in among or results]
    )
    figure, axes, columns = style.panels(len(results), sharey=True, most_columns=2)
    marked = [style.placements(ax, result) for ax, result in zip(axes, results, strict=True)]
    ends = [number for result in results for number in result['layer_index']]
    for number, (ax, result) in enumerate(zip(axes, results, strict=True)):
        mean, error = _measured(result['metrics'][metric]['drop'][f'{block}'])
        layers = style.layers(result)[: len(mean)]
        colour, _ = style.look(result, number)
        ax.bar(layers, np.nan_to_num(mean, posinf=0, neginf=0), 0.78, color=colour, linewidth=0)
        if error is not None:
            ax.errorbar(layers, mean, error, fmt='none', ecolor=style.INK, elinewidth=0.6)
        ax.axhline(0, color=style.INK, linewidth=0.5)
        if not np.isfinite(mean).all():
            lost = layers[~np.isfinite(mean)]
            ax.plot(lost, np.zeros(len(lost)), 'x', color=style.INK, markersize=3.5, clip_on=False)
            ax.annotate('× not finite', (1, 1), xycoords='axes fraction', ha='right', va='top', fontsize=6.5)
        if scale == 'symlog':
            ax.set_yscale('symlog', linthresh=threshold, linscale=0.6)
        ax.set(ylim=(low, high), xlim=(min(ends) - 0.7, max(ends) + 0.7))
        style.integers(ax.xaxis)
        left_out = 'layer left out' if block == 1 else f'first of {block} layers left out'
        ax.set_xlabel(left_out if number + columns >= len(results) else '')
        unit = f' ({UNITS[metric]})' if metric in UNITS else ''
        scaled = f'\nlogarithmic beyond ±{threshold:g}' if scale == 'symlog' else ''
        ax.set_ylabel(style.plain(f'change in {metric}{unit}{scaled}') if number % columns == 0 else '')
        style.title(ax, result['label'], figure, columns, pad=10 if any(marked) else 4)
    return figure


@style.styled
def gradients(results):
    """Norm of the gradient of the loss by layer, a line a result, with its standard error; `analysis.gradients`."""
    figure, [ax] = style.chart()
    quantities = [_measured(result['layers']) for result in results]
    handles = style.lines(ax, quantities, results)
    style.scale(ax, quantities)
    ax.set(xlabel='layer', ylabel='gradient norm')
    return style.legend(figure, handles, results)


@style.styled
def gradient_matrices(results):
    """Norm of the gradient by layer for each matrix that all networks have, on one axis; `analysis.gradients`."""
    figure, axes = style.chart(2, 4, style.PAGE, 1.3, sharex=True, sharey=True)
    names = [name for name in MATRICES if all(name in result['matrices'] for result in results)]
    quantities = [_measured(result['matrices'][name]) for name in names for result in results]
    for ax, name in zip(axes, names, strict=False):
        of_matrix = [_measured(result['matrices'][name]) for result in results]
        handles = style.lines(ax, of_matrix, results)
        ax.set_title(name)
    style.scale(axes[0], quantities)
    for empty in range(len(names), len(axes)):
        axes[empty].set_axis_off()
        axes[empty - 4].xaxis.set_tick_params(labelbottom=True)  # of the panel above it
    figure.supxlabel('layer', fontsize=7.5)
    figure.supylabel('gradient norm', fontsize=7.5)
    return style.legend(figure, handles, results)


@style.styled
def variance(results):
    """Variance of the residual stream with depth, a line a result, the theory dash-dotted; `analysis.variance`."""
    figure, [ax] = style.chart()
    depths = lambda result: np.arange(len(result['variance']['mean']))  # noqa: E731
    handles = style.lines(ax, [_measured(result['variance']) for result in results], results, depths)
    line = {'linewidth': 0.9, 'dashes': (4, 1.5, 1, 1.5)}  # unlike the dashes of a second seed
    theory = []
    for number, result in enumerate(results):
        expected = np.array(result.get('theory') or [], float)
        if np.isfinite(expected).any():
            colour, _ = style.look(result, number)
            theory = ax.plot(np.arange(len(expected)), expected, color=colour, **line)
    ax.set_yscale('log')
    style.decades(ax)
    measured = np.concatenate([result['variance']['mean'] for result in results]).astype(float)
    measured = measured[measured > 0]  # also no nan
    if measured.size:  # a theory that leaves them far behind must not flatten the lines
        bottom, top = ax.get_ylim()
        ax.set_ylim(max(bottom, measured.min() / 10), min(top, measured.max() * 10))
    ax.set(xlabel='depth (layers passed)', ylabel='variance of the residual stream')
    if theory:
        handles.append(matplotlib.lines.Line2D([], [], color=style.INK, **line))
    return style.legend(figure, handles, [*results, {'label': 'theory, one constant fitted'}][: len(handles)])


@style.styled
def contribution(results):
    """|F(x)| / |x|, what attention and MLP add relative to the residual stream, by layer; `analysis.variance`."""
    figure, axes = style.chart(2, 1, style.COLUMN, 1.45, sharex=True, sharey=True)
    quantities = {name: [_measured(r['contribution'][name]) for r in results] for name in ('attention', 'mlp')}
    for ax, (name, of_part) in zip(axes, quantities.items(), strict=True):
        handles = style.lines(ax, of_part, results)
        ax.set_title({'attention': 'attention', 'mlp': 'MLP'}[name])
        ax.set_ylabel('$|F(x)|\\,/\\,|x|$')
    style.scale(axes[0], [q for of_part in quantities.values() for q in of_part])
    axes[-1].set_xlabel('layer')
    return style.legend(figure, handles, results)


@style.styled
def curves(series, xlabel, ylabel, log=None):
    """Numbers over the training, a line each.

    Args:
        series: {'label', 'x': list, 'y': list, 'points': None or (x, y) of a few numbers marked beside the line};
            `x` may be empty.
        log: whether the y axis is logarithmic; None: where it spans more than a decade.
    """
    figure, [ax] = style.chart()
    handles = []
    for number, one in enumerate(series):
        colour, dash = style.look(one, number)
        marker = 'o' if len(one['x']) <= 40 else None  # one point alone is no line
        handles += ax.plot(one['x'], np.array(one['y'], float), color=colour, linestyle=dash, marker=marker)
        if one.get('points'):
            ax.plot(*np.array(one['points'], float), 'o', color=colour, mec='white', markersize=4.5, mew=0.6)
    ys = [np.array([*one['y'], *(one.get('points') or ((), ()))[1]], float) for one in series]
    style.scale(ax, [(y, None) for y in ys], log)
    ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return style.legend(figure, handles, series)


@style.styled
def by_layer(values, results, quantity):
    """A number a layer, all layers of a network: a line a result.

    Args:
        values: [L] of each result, by layer from 1 on.
        results: {'label'}, with `colour` or not.
        quantity: the label of the y axis.
    """
    figure, [ax] = style.chart()
    quantities = [(np.array(of, float), None) for of in values]
    numbered = [result | {'layer_index': range(1, len(of) + 1)} for result, of in zip(results, values, strict=True)]
    handles = style.lines(ax, quantities, numbered)
    style.scale(ax, quantities)
    ax.set(xlabel='layer', ylabel=quantity)
    return style.legend(figure, handles, results)


@style.styled
def evolution(values, steps, label, quantity, among=None):
    """A number a layer over the training: a heat map, a row a layer, a column a step that was measured.

    Args:
        values: [S,L], of `steps` [S].
        quantity: what the colour bar says.
        among: all such `values` that share the scale; None: these alone.
    """
    norm = style.norm([np.array(v, float) for v in among or [values]])
    values = np.array(values, float).T
    figure, [ax] = style.chart()
    extent = (0.5, len(steps) + 0.5, 0.5, len(values) + 0.5)
    shown = style.cells(ax, np.ma.array(values, mask=False), norm, extent)
    style.integers(ax.yaxis)
    some = range(0, len(steps), -(-len(steps) // 5))
    ax.set_xticks([i + 1 for i in some], [f'{steps[i]:,}' for i in some])
    ax.set(xlabel='step', ylabel='layer')
    style.title(ax, label, figure, 1)
    style.plain_bar(figure.colorbar(shown, ax=ax, fraction=0.06, aspect=20, pad=0.02, label=quantity))
    return figure


def _saved(figure, form, metadata):
    body = io.BytesIO()
    with matplotlib.rc_context(style.STYLE):
        figure.savefig(body, format=form, dpi=300, metadata=metadata)
    return body.getvalue()


def _measured(quantity):
    """(mean, standard error or None) as arrays; what is not known is nan."""
    error = quantity.get('standard_error')
    return np.array(quantity['mean'], float), None if error is None else np.array(error, float)


def _largest(arrays):
    finite = [array.compressed()[np.isfinite(array.compressed())] for array in arrays]
    return max(itertools.chain(*finite), default=0) or 1
