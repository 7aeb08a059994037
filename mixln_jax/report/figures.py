"""Figures of measurements: from results to matplotlib's Figure, for a column (3.25 inches) or a page (6.75).

A result is one element of `results` in the result.json of an analysis; `layer_index` numbers its layers. A quantity in
it is {'mean': list, 'standard_error': list or None}. None or nan is a number that is unknown or not finite; it is left
blank or marked with a cross. A result may have a `colour`, an index into style.COLOURS; otherwise its position is used.
"""

import contextlib
import io
import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from mixln_jax.report import style
from mixln_jax.system import outputs

MATRICES = ('attention/q', 'attention/k', 'attention/v', 'attention/o', 'mlp/gate', 'mlp/up', 'mlp/down')
Result = Mapping[str, Any]
UNITS = {'loss': 'nats', 'exact_match': '%', 'f1': '%'}


def image(figure: Figure) -> np.ndarray:
    """Returns the pixels of a figure, [H, W, 3] uint8."""
    with matplotlib.rc_context(style.STYLE):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.array(canvas.buffer_rgba())[..., :3]


def svg(figure: Figure) -> bytes:
    """Returns the content of an SVG file of a figure: the same bytes for the same figure."""
    return _encoded(figure, 'svg', {'Date': None, 'Creator': None})


def save(figure: Figure, folder: str | pathlib.Path, name: str) -> None:
    """Writes <folder>/<name>.svg and <name>.png (300 dots per inch), without a date: equal figures give equal files."""
    folder = pathlib.Path(folder)
    outputs.write(folder / f'{name}.svg', svg(figure))  # first: `is_drawn` recognises this one
    outputs.write(folder / f'{name}.png', _encoded(figure, 'png', {'Software': None}))


def is_drawn(path: pathlib.Path) -> bool:
    """Returns whether a file is an SVG that `save` has written: one of matplotlib's, without a date."""
    with contextlib.suppress(OSError):
        with open(path, 'rb') as file:
            head = file.read(3000)
        return b'<g id="figure_1">' in head and b'<dc:date>' not in head
    return False


@style.styled
def angular(results: Sequence[Result], among: Sequence[Result] | None = None) -> Figure:
    """Draws the angular distance of the residual stream over n layers from depth l: one heat map for each result.

    All maps share one scale, which starts at 0. Depth l comes after l layers; in a pruned network these are not the
    layers with the first l numbers.

    The axes are those of Gromov et al. 2024 (arXiv 2403.17887), figure 4, and of Mix-LN, figures 2, 3 and 5: cell (l,
    n) is d(x_l, x_{l+n}), which exists for l + n <= L; yellow is small.

    Args:
        results: from `analysis.angular`.
        among: all results that share the scale; None: `results`.
    """
    cells = [span_cells(result['distance']['mean']) for result in results]
    largest = _largest(span_cells(result['distance']['mean']) for result in among or results)
    figure, axes, columns = style.panels(len(results), square=True)
    for number, (ax, result, values) in enumerate(zip(axes, results, cells, strict=True)):
        L = len(values)
        shown = style.cells(ax, values, Normalize(0, largest), (-0.5, L - 0.5, 0.5, L + 0.5))
        ax.set_box_aspect(1)
        style.integers(ax.xaxis)
        style.integers(ax.yaxis)
        ax.set_xlabel('start depth $l$' if number + columns >= len(results) else '')
        ax.set_ylabel('layers spanned $n$' if number % columns == 0 else '')
        style.title(ax, result['label'], figure, columns)
    bar = figure.colorbar(shown, ax=axes, fraction=0.05, aspect=25, pad=0.02)
    bar.set_label('angular distance (share of π)')
    style.plain_bar(bar)
    return figure


def heat_map(matrix: ArrayLike, title: str = '') -> Figure:
    """Draws one matrix of angular distances [L+1, L+1] between the depths of a network; see `angular`."""
    return angular([{'label': title, 'distance': {'mean': matrix}}])


def span_cells(matrix: ArrayLike) -> np.ma.MaskedArray:
    """Returns distances between depths, [L+1, L+1], as cells [L, L]: row n - 1 and column l is d(x_l, x_{l+n}).

    Cells with l + n > L do not exist and are masked. Cells that are not finite are nan.
    """
    matrix = np.array(matrix, float)
    l, n = np.meshgrid(np.arange(len(matrix) - 1), np.arange(1, len(matrix)))
    exists = l + n < len(matrix)
    return np.ma.array(matrix[l, np.where(exists, l + n, 0)], mask=~exists)


@style.styled
def drop(results: Sequence[Result], metric: str, block: int = 1, among: Sequence[Result] | None = None) -> Figure:
    """Draws the change of a metric when a block of layers is removed: bars over the layers, a panel for each result.

    Args:
        results: from `analysis.drop`; all have `metric`.
        metric: the name of a metric in the results.
        block: how many neighbouring layers are removed together.
        among: all results that share the axis; None: `results`.
    """
    axis = style.bar_axis([_measured(result['metrics'][metric]['drop'][f'{block}']) for result in among or results])
    figure, axes, columns = style.panels(len(results), sharey=True, most_columns=2)
    marked = [style.placements(ax, result) for ax, result in zip(axes, results, strict=True)]
    ends = [number for result in results for number in result['layer_index']]
    unit = f' ({UNITS[metric]})' if metric in UNITS else ''
    scale = f'\nlogarithmic beyond ±{axis.threshold:g}' if axis.threshold else ''
    for number, (ax, result) in enumerate(zip(axes, results, strict=True)):
        _bars(ax, result, _measured(result['metrics'][metric]['drop'][f'{block}']), style.look(result, number)[0])
        if axis.threshold:
            ax.set_yscale('symlog', linthresh=axis.threshold, linscale=0.6)
        ax.set(ylim=(axis.low, axis.high), xlim=(min(ends) - 0.7, max(ends) + 0.7))
        style.integers(ax.xaxis)
        removed = 'layer left out' if block == 1 else f'first of {block} layers left out'
        ax.set_xlabel(removed if number + columns >= len(results) else '')
        ax.set_ylabel(style.plain(f'change in {metric}{unit}{scale}') if number % columns == 0 else '')
        style.title(ax, result['label'], figure, columns, pad=10 if any(marked) else 4)
    return figure


def _bars(ax: Axes, result: Result, quantity: style.Quantity, colour: str) -> None:
    """Draws bars with their standard errors; a cross marks what is not finite."""
    mean, error = quantity
    layers = style.layers(result)[: len(mean)]
    ax.bar(layers, np.nan_to_num(mean, posinf=0, neginf=0), 0.78, color=colour, linewidth=0)
    if error is not None:
        ax.errorbar(layers, mean, error, fmt='none', ecolor=style.INK, elinewidth=0.6)
    ax.axhline(0, color=style.INK, linewidth=0.5)
    if not np.isfinite(mean).all():
        lost = layers[~np.isfinite(mean)]
        ax.plot(lost, np.zeros(len(lost)), 'x', color=style.INK, markersize=3.5, clip_on=False)
        ax.annotate('× not finite', (1, 1), xycoords='axes fraction', ha='right', va='top', fontsize=6.5)


@style.styled
def gradients(results: Sequence[Result]) -> Figure:
    """Draws the norm of the loss's gradient by layer, with standard errors: a line for each result.

    Args:
        results: from `analysis.gradients`.
    """
    figure, [ax] = style.chart()
    quantities = [_measured(result['layers']) for result in results]
    handles = style.lines(ax, quantities, results)
    style.scale(ax, quantities)
    ax.set(xlabel='layer', ylabel='gradient norm')
    return style.legend(figure, handles, results)


@style.styled
def gradient_matrices(results: Sequence[Result]) -> Figure:
    """Draws the norm of the gradient by layer, in a panel for each matrix that all networks have, with one axis.

    Args:
        results: from `analysis.gradients`.
    """
    figure, axes = style.chart(2, 4, style.PAGE, 1.3, sharex=True, sharey=True)
    names = [name for name in MATRICES if all(name in result['matrices'] for result in results)]
    quantities = [_measured(result['matrices'][name]) for name in names for result in results]
    for ax, name in zip(axes, names, strict=False):
        handles = style.lines(ax, [_measured(result['matrices'][name]) for result in results], results)
        ax.set_title(name)
    style.scale(axes[0], quantities)
    for empty in range(len(names), len(axes)):
        axes[empty].set_axis_off()
        axes[empty - 4].xaxis.set_tick_params(labelbottom=True)  # of the panel above it
    figure.supxlabel('layer', fontsize=7.5)
    figure.supylabel('gradient norm', fontsize=7.5)
    return style.legend(figure, handles, results)


@style.styled
def variance(results: Sequence[Result]) -> Figure:
    """Draws the variance of the residual stream with depth: a line for each result, the theory dash-dotted.

    Args:
        results: from `analysis.variance`.
    """
    figure, [ax] = style.chart()
    depths = [np.arange(len(result['variance']['mean'])) for result in results]
    handles = style.lines(ax, [_measured(result['variance']) for result in results], results, depths)
    line: dict[str, Any] = {'linewidth': 0.9, 'dashes': (4, 1.5, 1, 1.5)}  # unlike the dashes of a second seed
    theory = []
    for number, result in enumerate(results):
        expected = np.array(result.get('theory') or [], float)
        if np.isfinite(expected).any():
            colour, _ = style.look(result, number)
            theory = ax.plot(np.arange(len(expected)), expected, color=colour, **line)
    ax.set_yscale('log')
    style.decades(ax)
    measured = np.concatenate([result['variance']['mean'] for result in results]).astype(float)
    measured = measured[measured > 0]  # nan is excluded too
    if measured.size:  # a theory far away from the measurements must not flatten their lines
        bottom, top = ax.get_ylim()
        ax.set_ylim(max(bottom, measured.min() / 10), min(top, measured.max() * 10))
    ax.set(xlabel='depth (layers passed)', ylabel='variance of the residual stream')
    if theory:
        handles.append(matplotlib.lines.Line2D([], [], color=style.INK, **line))
    return style.legend(figure, handles, [*results, {'label': 'theory, one constant fitted'}][: len(handles)])


@style.styled
def contribution(results: Sequence[Result]) -> Figure:
    """Draws |F(x)| / |x|, what attention and MLP add relative to the residual stream, by layer.

    Args:
        results: from `analysis.variance`.
    """
    figure, axes = style.chart(2, 1, style.COLUMN, 1.45, sharex=True, sharey=True)
    quantities = {
        name: [_measured(result['contribution'][name]) for result in results] for name in ('attention', 'mlp')
    }
    for ax, (name, part) in zip(axes, quantities.items(), strict=True):
        handles = style.lines(ax, part, results)
        ax.set_title({'attention': 'attention', 'mlp': 'MLP'}[name])
        ax.set_ylabel('$|F(x)|\\,/\\,|x|$')
    style.scale(axes[0], [*itertools.chain(*quantities.values())])
    axes[-1].set_xlabel('layer')
    return style.legend(figure, handles, results)


@style.styled
def curves(series: Sequence[Mapping[str, Any]], xlabel: str, ylabel: str, log: bool | None = None) -> Figure:
    """Draws numbers over the training, a line for each of `series`.

    Args:
        series: {'label', 'x': list, 'y': list, 'points': None or (x, y) of a few numbers that are marked in addition};
            `x` may be empty.
        xlabel: the label of the x axis.
        ylabel: the label of the y axis.
        log: whether the y axis is logarithmic; None: if the numbers span more than a decade.
    """
    figure, [ax] = style.chart()
    handles, heights = [], []
    for number, curve in enumerate(series):
        colour, dash = style.look(curve, number)
        marker = 'o' if len(curve['x']) <= 40 else None  # a single point is not a line
        handles += ax.plot(curve['x'], np.array(curve['y'], float), color=colour, linestyle=dash, marker=marker)
        points = np.array(curve.get('points') or ((), ()), float)
        if points.size:
            ax.plot(*points, 'o', color=colour, mec='white', markersize=4.5, mew=0.6)
        heights.append((np.array([*curve['y'], *points[1]], float), None))
    style.scale(ax, heights, log)
    ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return style.legend(figure, handles, series)


@style.styled
def rate_curves(series: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the loss against the learning rate, both logarithmic where that helps: a line in a band for each of
    `series`, and every run as a dot, or as a cross if it is lost.

    Args:
        series: {'label', 'x': rates, 'y': means, 'error': standard errors, 'points': [(rate, loss, lost)]}.
    """
    figure, [ax] = style.chart()
    handles = []
    for number, curve in enumerate(series):
        colour, dash = style.look(curve, number)
        x, y, error = (np.array(curve[name], float) for name in ('x', 'y', 'error'))
        ax.fill_between(x, y - error, y + error, color=colour, alpha=0.2, linewidth=0)
        handles += ax.plot(x, y, color=colour, linestyle=dash)
        for marker, wanted in (('o', False), ('x', True)):
            points = [(rate, loss) for rate, loss, lost in curve['points'] if lost == wanted]
            if points:
                size = 3.5 if wanted else 2.2
                ax.plot(*zip(*points, strict=True), marker, color=colour, markersize=size, mew=0.8, alpha=0.8)
    ax.set_xscale('log')
    style.scale(ax, [(np.array([loss for curve in series for _, loss, _ in curve['points']], float), None)])
    ax.set(xlabel='learning rate', ylabel='loss (nats)')
    return style.legend(figure, handles, series)


@style.styled
def by_layer(values: Sequence[Sequence[float] | np.ndarray], results: Sequence[Result], quantity: str) -> Figure:
    """Draws one number for each layer of whole networks: a line for each result.

    Args:
        values: [L] of each result, from the first layer on.
        results: {'label'}, optionally with `colour`.
        quantity: the label of the y axis.
    """
    figure, [ax] = style.chart()
    quantities = [(np.array(numbers, float), None) for numbers in values]
    layers = [range(1, len(numbers) + 1) for numbers in values]
    handles = style.lines(ax, quantities, results, layers)
    style.scale(ax, quantities)
    ax.set(xlabel='layer', ylabel=quantity)
    return style.legend(figure, handles, results)


@style.styled
def evolution(
    values: ArrayLike,
    steps: Sequence[int],
    label: str,
    quantity: str,
    among: Sequence[ArrayLike] | None = None,
) -> Figure:
    """Draws one number for each layer over the training: a heat map with a row for each layer, a column for each step.

    Args:
        values: [S, L].
        steps: [S], the steps that were measured.
        label: the title.
        quantity: the label of the colour bar.
        among: all `values` that share the scale; None: these alone.
    """
    norm = style.norm([np.array(others, float) for others in among or [values]])
    cells = np.array(values, float).T
    figure, [ax] = style.chart()
    extent = (0.5, len(steps) + 0.5, 0.5, len(cells) + 0.5)
    shown = style.cells(ax, np.ma.array(cells, mask=False), norm, extent)
    style.integers(ax.yaxis)
    some = range(0, len(steps), -(-len(steps) // 5))
    ax.set_xticks([i + 1 for i in some], [f'{steps[i]:,}' for i in some])
    ax.set(xlabel='step', ylabel='layer')
    style.title(ax, label, figure, 1)
    style.plain_bar(figure.colorbar(shown, ax=ax, fraction=0.06, aspect=20, pad=0.02, label=quantity))
    return figure


def _encoded(figure: Figure, form: str, metadata: Mapping[str, Any]) -> bytes:
    body = io.BytesIO()
    with matplotlib.rc_context(style.STYLE):
        figure.savefig(body, format=form, dpi=300, metadata=metadata)
    return body.getvalue()


def _measured(quantity: Mapping[str, Any]) -> style.Quantity:
    """Returns (mean, standard error or None) of a quantity as arrays; unknown numbers are nan."""
    error = quantity.get('standard_error')
    return np.array(quantity['mean'], float), None if error is None else np.array(error, float)


def _largest(arrays: Iterable[np.ma.MaskedArray]) -> float:
    finite = [array.compressed()[np.isfinite(array.compressed())] for array in arrays]
    return max(itertools.chain(*finite), default=0) or 1
