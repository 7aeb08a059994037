"""The look of figures: sizes in print, colours, axes, legends. figures.py decides what they show.

matplotlib's settings are changed only inside `styled`; pyplot is never used.
"""

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

COLUMN, PAGE = 3.25, 6.75  # widths in print, inches
# Okabe and Ito 2008, distinguishable for colour-blind readers; without yellow, which is too pale for a line on white.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#8C8C8C')
DASHES = ('-', (0, (5, 1.5)), (0, (1, 1.2)))  # the second and third are for lines beyond the number of colours
INK = '#333333'
STYLE: dict[Any, Any] = {
    'font.family': 'sans-serif',
    'font.sans-serif': ['Arial', 'Helvetica', 'Liberation Sans', 'DejaVu Sans'],
    'font.size': 7.5,
    'axes.labelsize': 7.5,
    'axes.titlesize': 8,
    'axes.titlepad': 4,
    'axes.labelpad': 2.5,
    'axes.linewidth': 0.5,
    'axes.edgecolor': INK,
    'axes.labelcolor': INK,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.unicode_minus': True,
    'text.color': INK,
    'xtick.color': INK,
    'ytick.color': INK,
    'xtick.labelsize': 7,
    'ytick.labelsize': 7,
    'xtick.major.width': 0.5,
    'ytick.major.width': 0.5,
    'xtick.minor.width': 0.35,
    'ytick.minor.width': 0.35,
    'xtick.major.size': 2.5,
    'ytick.major.size': 2.5,
    'xtick.minor.size': 1.5,
    'ytick.minor.size': 1.5,
    'legend.fontsize': 7,
    'legend.frameon': False,
    'legend.handlelength': 1.6,
    'legend.borderaxespad': 0.2,
    'lines.linewidth': 1.1,
    'lines.markersize': 2.2,
    'figure.dpi': 150,
    'figure.facecolor': 'white',
    'mathtext.fontset': 'custom',  # powers of ten are set in the font of the text
    'mathtext.rm': 'sans',
    'mathtext.it': 'sans:italic',
    'mathtext.cal': 'sans',
    'svg.fonttype': 'path',  # the same on machines without the font
    'svg.hashsalt': 'mixln_jax',
}


styled = matplotlib.rc_context(STYLE)
Result = Mapping[str, Any]
Quantity = tuple[np.ndarray, np.ndarray | None]  # mean [n] and standard error [n]


class BarAxis(NamedTuple):
    """The y axis that several panels of bars share."""

    low: float
    high: float
    threshold: float | None  # the axis is logarithmic beyond plus and minus this number; None: linear


def panels(
    count: int, square: bool = False, sharey: bool = False, most_columns: int = 4
) -> tuple[Figure, list[Axes], int]:
    """Returns (figure, axes, number of columns) of a figure with `count` panels."""
    columns = count if count <= most_columns else math.ceil(count / 2) if count <= 8 and square else most_columns
    rows, width = math.ceil(count / columns), COLUMN if count == 1 else PAGE
    height = (width - 0.75) / columns + 0.25 if square else 1.9 if count == 1 else 1.5
    figure, axes = chart(rows, columns, width, height, sharey=sharey)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count], columns


def chart(
    rows: int = 1,
    columns: int = 1,
    width: float = COLUMN,
    height: float = 2.1,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Returns (figure, axes) of a grid of charts.

    Args:
        rows: of the grid.
        columns: of the grid.
        width: of the figure, inches.
        height: of one row, inches.
        sharex: whether all charts have one x axis.
        sharey: the same for the y axis.
    """
    figure = Figure(figsize=(width, rows * height), layout='constrained')
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).flat)


def look(result: Result, number: int) -> tuple[str, Any]:
    """Returns (colour, dash) of a result; `number` is its position, which counts if it has no `colour`."""
    number = result.get('colour', number)
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def layers(result: Result) -> np.ndarray:
    """Returns the numbers of a result's layers, [L]; in a pruned network some are missing."""
    return np.array(result['layer_index'])


def lines(
    ax: Axes,
    quantities: Sequence[Quantity],
    results: Sequence[Result],
    positions: Sequence[Sequence[float] | np.ndarray] | None = None,
) -> list[Artist]:
    """Draws a line for each quantity in a band of one standard error; returns the lines, for a legend.

    Args:
        ax: to draw on.
        quantities: one for each result.
        results: decide the colours.
        positions: the places on the x axis, [n] for each quantity; None: the numbers of the results' layers.
    """
    handles: list[Artist] = []
    places: Iterable[Any] = map(layers, results) if positions is None else positions
    for number, ((mean, error), result, x) in enumerate(zip(quantities, results, places, strict=True)):
        colour, dash = look(result, number)
        if error is not None:
            ax.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
        handles += ax.plot(x, mean, color=colour, linestyle=dash, marker='o' if len(mean) <= 40 else None)
    integers(ax.xaxis)
    return handles


def scale(ax: Axes, quantities: Sequence[Quantity], log: bool | None = None) -> None:
    """Sets the scale of a y axis for lines.

    It is logarithmic if the numbers are positive and span more than a decade. It is logarithmic on both sides of 0 if
    the largest number is more than a hundred times the median, as in `bar_axis`. `log` overrides both.
    """
    numbers = np.concatenate([np.ravel(mean) for mean, _ in quantities])
    numbers = numbers[np.isfinite(numbers)]
    spread = numbers.size and numbers.min() > 0 and numbers.max() > 10 * numbers.min()
    if spread if log is None else log:
        ax.set_yscale('log')
        decades(ax)
    elif log is None and (threshold := linear_up_to(numbers)):
        ax.set_yscale('symlog', linthresh=threshold, linscale=0.6)
        ax.axhline(0, color=INK, linewidth=0.5)


def linear_up_to(numbers: np.ndarray) -> float | None:
    """Returns up to which number an axis should be linear, a power of ten near the median; None: everywhere.

    An axis needs a logarithmic part if the largest number is more than a hundred times the median.
    """
    sizes = np.abs(numbers[np.isfinite(numbers) & (numbers != 0)])
    if not sizes.size or sizes.max() <= 100 * np.median(sizes):
        return None
    return 10.0 ** math.floor(math.log10(np.median(sizes)))


def decades(ax: Axes) -> None:
    """Labels a logarithmic axis: its decades, and numbers between them if the axis has few decades."""
    ax.yaxis.set_major_locator(ticker.LogLocator(numticks=6))
    ax.yaxis.set_minor_formatter(ticker.LogFormatterSciNotation(minor_thresholds=(1.2, 0.5)))
    ax.tick_params(axis='y', which='minor', labelsize=6)


def bar_axis(quantities: Sequence[Quantity]) -> BarAxis:
    """Returns the axis that bars share.

    It becomes logarithmic if the largest number is more than a hundred times the median: one layer that ruins the
    network must not hide the others.
    """
    errors = [0 if error is None else np.nan_to_num(error) for _, error in quantities]
    ends = [mean + sign * error for (mean, _), error in zip(quantities, errors, strict=True) for sign in (-1, 1)]
    numbers = np.concatenate([*ends, [0]])
    numbers = numbers[np.isfinite(numbers)]
    low, high = numbers.min(), numbers.max()
    if threshold := linear_up_to(np.concatenate([mean for mean, _ in quantities])):
        return BarAxis(2 * low, 2 * high, threshold)
    margin = 0.05 * ((high - low) or 1)
    return BarAxis(low - margin * (low < 0), high + margin, None)


def norm(arrays: Sequence[np.ndarray]) -> Normalize:
    """Returns a scale of colours for numbers: logarithmic if they are positive and span more than a decade."""
    numbers = np.concatenate([array[np.isfinite(array)] for array in arrays])
    low, high = (numbers.min(), numbers.max()) if numbers.size else (0, 1)
    if low > 0 and high > 10 * low:
        return LogNorm(low, high)
    median = np.median(np.abs(numbers)) if numbers.size else 0
    if 0 < 100 * median < max(high, -low):
        return SymLogNorm(10.0 ** math.floor(math.log10(median)), vmin=low, vmax=high)
    return Normalize(min(low, 0), high if high > low else low + 1)


def cells(ax: Axes, values: np.ma.MaskedArray, norm: Normalize, extent: tuple[float, float, float, float]) -> AxesImage:
    """Draws a masked array as cells: small is yellow, large is purple, not finite is grey, masked cells are empty."""
    lost = np.ma.array(np.ones(values.shape), mask=values.mask | np.isfinite(values.data))
    options: dict[str, Any] = {'origin': 'lower', 'extent': extent, 'aspect': 'auto', 'interpolation': 'nearest'}
    if lost.count():
        ax.imshow(lost, cmap='gray', vmin=0, vmax=1.15, **options)
    return ax.imshow(np.ma.masked_invalid(values), cmap='viridis_r', norm=norm, **options)


def placements(ax: Axes, result: Result) -> bool:
    """Marks the placements of the layers of a panel, if the layers form two to four runs; returns whether they do."""
    numbered = zip(layers(result), result['norm_position'], strict=True)
    layer_runs = [[layer for layer, _ in group] for _, group in itertools.groupby(numbered, lambda pair: pair[1])]
    names = [name for name, _ in itertools.groupby(result['norm_position'])]
    if not 2 <= len(layer_runs) <= 4:
        return False
    ends = [(before[-1] + after[0]) / 2 for before, after in itertools.pairwise(layer_runs)]
    first, last = layer_runs[0][0] - 0.5, layer_runs[-1][-1] + 0.5
    for name, start, end in zip(names, [first, *ends], [*ends, last], strict=True):
        if start in ends:
            ax.axvline(start, color=INK, linewidth=0.4, linestyle=(0, (2, 2)))
        ax.annotate(
            name, ((start + end) / 2, 1), (0, 1), xycoords=('data', 'axes fraction'), textcoords='offset points',
            ha='center', va='bottom', fontsize=6.5, color='#666666',
        )  # fmt: skip
    return True


def integers(axis: Axis) -> None:
    """Sets the ticks of an axis at whole numbers, for layers."""
    axis.set_major_locator(ticker.MaxNLocator(7, integer=True, steps=[1, 2, 4, 5, 10]))


def plain_bar(bar: Colorbar) -> None:
    """Removes the frame of a colour bar."""
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)


def title(ax: Axes, label: str, figure: Figure, columns: int, pad: float | None = None) -> None:
    """Sets a title that fits over its panel, in at most two lines; `pad` is its distance from the axes in points."""
    letters = int(figure.get_figwidth() / columns * 15)
    lines = textwrap.wrap(label, letters, max_lines=2, placeholder=' …')
    ax.set_title(plain('\n'.join(lines)), pad=pad)


def plain(text: str) -> str:
    """Returns a text that matplotlib shows as it is; it would read text between dollars as mathematics."""
    return text.replace('$', r'\$')


def legend(figure: Figure, handles: Sequence[Artist], results: Sequence[Result]) -> Figure:
    """Adds a legend with the labels of results above the axes and makes the figure higher for it; returns the
    figure."""
    labels = [result['label'] for result in results]
    labels = [label if len(label) <= 48 else f'{label[:23]}…{label[-24:]}' for label in labels]
    width, height = figure.get_size_inches()
    columns = max(1, min(len(labels), int(width / (0.35 + 0.058 * max(map(len, labels))))))
    columns = math.ceil(len(labels) / math.ceil(len(labels) / columns))  # rows of about equal length
    figure.set_size_inches(width, height + 0.14 * math.ceil(len(labels) / columns))
    legend = figure.legend(handles, ['-'] * len(labels), loc='outside upper center', ncols=columns, columnspacing=1.2)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(plain(label))  # not in the call above, which leaves out names that begin with an underscore
    return figure
