"""How figures look: sizes in print, colours, axes, legends. What they show stands in figures.py.

matplotlib's settings are changed only inside `styled`; nothing touches pyplot.
"""

import itertools
import math
import textwrap
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure

COLUMN, PAGE = 3.25, 6.75  # widths in print, inches
# Okabe and Ito 2008, which the colour-blind tell apart, without their yellow, too pale for a line on white.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#8C8C8C')
DASHES = ('-', (0, (5, 1.5)), (0, (1, 1.2)))  # a second and third round of the same colours
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
    'mathtext.fontset': 'custom',  # powers of ten in the font of the text
    'mathtext.rm': 'sans',
    'mathtext.it': 'sans:italic',
    'mathtext.cal': 'sans',
    'svg.fonttype': 'path',  # the same on machines that lack the font
    'svg.hashsalt': 'mixln_jax',
}


styled = matplotlib.rc_context(STYLE)


def panels(count, square=False, sharey=False, most_columns=4):
    """A figure with a panel a result: (figure, axes, columns)."""
    columns = count if count <= most_columns else math.ceil(count / 2) if count <= 8 and square else most_columns
    rows, width = math.ceil(count / columns), COLUMN if count == 1 else PAGE
    each = (width - 0.75) / columns + 0.25 if square else 1.9 if count == 1 else 1.5
    figure, axes = chart(rows, columns, width, each, sharey=sharey)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count], columns


def chart(rows=1, columns=1, width=COLUMN, each=2.1, **share):
    """A figure of axes, `each` inches high: (figure, list of them)."""
    figure = Figure(figsize=(width, rows * each), layout='constrained')
    return figure, list(figure.subplots(rows, columns, squeeze=False, **share).flat)


def look(result, number):
    """(colour, dash) of a result."""
    number = result.get('colour', number)
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def layers(result):
    """The numbers of a result's layers [L]; those of a pruned network have gaps."""
    return np.array(result['layer_index'])


def lines(ax, quantities, results, over=layers):
    """Draws quantities in bands of one standard error over what `over` gives of a result; the lines, for a legend."""
    handles = []
    for number, ((mean, error), result) in enumerate(zip(quantities, results, strict=True)):
        colour, dash = look(result, number)
        x = over(result)
        if error is not None:
            ax.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
        handles += ax.plot(x, mean, color=colour, linestyle=dash, marker='o' if len(mean) <= 40 else None)
    integers(ax.xaxis)
    return handles


def scale(ax, quantities, log=None):
    """The y axis of lines: logarithmic where they span more than a decade (or as `log` says), and on both sides of 0
    where the largest is a hundred times the median, as in `bar_axis`."""
    numbers = np.concatenate([np.ravel(mean) for mean, _ in quantities])
    numbers = numbers[np.isfinite(numbers)]
    spread = numbers.size and numbers.min() > 0 and numbers.max() > 10 * numbers.min()
    if spread if log is None else log:
        ax.set_yscale('log')
        decades(ax)
    elif log is None and (threshold := linear_up_to(numbers)):
        ax.set_yscale('symlog', linthresh=threshold, linscale=0.6)
        ax.axhline(0, color=INK, linewidth=0.5)


def linear_up_to(numbers):
    """Where an axis should become logarithmic, as one number ruins the scale for the others: a power of ten near their
    median; None where none does, that is where the largest is not above a hundred times the median."""
    sizes = np.abs(numbers[np.isfinite(numbers) & (numbers != 0)])
    if not sizes.size or sizes.max() <= 100 * np.median(sizes):
        return None
    return 10.0 ** math.floor(math.log10(np.median(sizes)))


def decades(ax):
    """Labels of a logarithmic axis: decades, and numbers between them where there are few."""
    ax.yaxis.set_major_locator(ticker.LogLocator(numticks=6))
    ax.yaxis.set_minor_formatter(ticker.LogFormatterSciNotation(minor_thresholds=(1.2, 0.5)))
    ax.tick_params(axis='y', which='minor', labelsize=6)


def bar_axis(quantities):
    """Limits and scale that bars share: (low, high, 'linear' or 'symlog', up to where symlog is linear).

    symlog where the largest is a hundred times the median: one layer that ruins the network must not hide the others.
    """
    errors = [0 if error is None else np.nan_to_num(error) for _, error in quantities]
    ends = [mean + sign * error for (mean, _), error in zip(quantities, errors, strict=True) for sign in (-1, 1)]
    ends = np.concatenate([*ends, [0]])
    ends = ends[np.isfinite(ends)]
    low, high = ends.min(), ends.max()
    if threshold := linear_up_to(np.concatenate([mean for mean, _ in quantities])):
        return 2 * low, 2 * high, 'symlog', threshold
    margin = 0.05 * ((high - low) or 1)
    return low - margin * (low < 0), high + margin, 'linear', None


def norm(arrays):
    """A scale of colours for numbers: logarithmic where they span more than a decade."""
    numbers = np.concatenate([array[np.isfinite(array)] for array in arrays])
    low, high = (numbers.min(), numbers.max()) if numbers.size else (0, 1)
    if low > 0 and high > 10 * low:
        return LogNorm(low, high)
    median = np.median(np.abs(numbers)) if numbers.size else 0
    if 0 < 100 * median < max(high, -low):
        return SymLogNorm(10.0 ** math.floor(math.log10(median)), vmin=low, vmax=high)
    return Normalize(min(low, 0), high if high > low else low + 1)


def cells(ax, values, norm, extent):
    """Draws a masked array as cells, small yellow and large purple; grey where it is not finite, none where masked."""
    lost = np.ma.array(np.ones(values.shape), mask=values.mask | np.isfinite(values.data))
    place = {'origin': 'lower', 'extent': extent, 'aspect': 'auto', 'interpolation': 'nearest'}
    if lost.count():
        ax.imshow(lost, cmap='gray', vmin=0, vmax=1.15, **place)
    return ax.imshow(np.ma.masked_invalid(values), cmap='viridis_r', norm=norm, **place)


def placements(ax, result):
    """Marks which layers of a panel have which placement where there are several, in few runs; whether it did."""
    numbered = zip(layers(result), result['norm_position'], strict=True)
    runs = [[at for at, _ in group] for _, group in itertools.groupby(numbered, lambda pair: pair[1])]
    names = [name for name, _ in itertools.groupby(result['norm_position'])]
    if not 2 <= len(runs) <= 4:
        return False
    ends = [(before[-1] + behind[0]) / 2 for before, behind in itertools.pairwise(runs)]
    for name, start, end in zip(names, [runs[0][0] - 0.5, *ends], [*ends, runs[-1][-1] + 0.5], strict=True):
        if start in ends:
            ax.axvline(start, color=INK, linewidth=0.4, linestyle=(0, (2, 2)))
        ax.annotate(
            name, ((start + end) / 2, 1), (0, 1), xycoords=('data', 'axes fraction'), textcoords='offset points',
            ha='center', va='bottom', fontsize=6.5, color='#666666',
        )  # fmt: skip
    return True


def integers(axis):
    """Ticks at whole numbers, as layers are."""
    axis.set_major_locator(ticker.MaxNLocator(7, integer=True, steps=[1, 2, 4, 5, 10]))


def plain_bar(bar):
    """A bar of colours without a frame."""
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)


def title(ax, label, figure, columns, pad=None):
    """A title that fits over its panel, in two lines at most."""
    room = int(figure.get_figwidth() / columns * 15)
    lines = textwrap.wrap(label, room, max_lines=2, placeholder=' …')
    ax.set_title(plain('\n'.join(lines)), pad=pad)


def plain(text):
    """Text of others as it is, which matplotlib would read as mathematics between dollars."""
    return text.replace('$', r'\$')


def legend(figure, handles, results):
    """Adds a legend above the axes and makes the figure higher for it; the figure."""
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
