"""Depth maps: one text, every token shaded by its depth, as a self-contained page and as a figure for papers."""

import codecs
import colorsys
import html
import math
import unicodedata
import warnings
from dataclasses import dataclass

import numpy as np

import data


@dataclass
class Piece:
    """One token of the map, or the tokens that share a character. depth: their mean; nll: their sum in nats."""

    text: str
    depth: float
    nll: float
    tokens: int


# Control characters but line feed and tab: neither HTML nor fonts have them.
VISIBLE = {c: "\ufffd" for c in [*range(32), 127] if c not in (9, 10)}


def pieces(scores):
    """The `Piece`s of one document's `Scores`."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    parts = data.load_tokenizer().decode_tokens_bytes(scores.tokens.tolist())
    found, text, depths, nll = [], "", [], 0.0
    for i, part in enumerate(parts):
        text += decoder.decode(part, final=i == len(parts) - 1)
        depths.append(int(scores.depth[i]))
        nll += float(scores.nll[i])
        if not decoder.getstate()[0]:  # else it ends inside a character, and the next token belongs to the same piece
            found.append(Piece(text.translate(VISIBLE), sum(depths) / len(depths), nll, len(depths)))
            text, depths, nll = "", [], 0.0
    return found


def shade(depth, max_depth):
    """Hue in degrees and opacity of a depth: from pale blue to strong red, on a light and on a dark page."""
    x = (depth - 1) / max(max_depth - 1, 1)
    return 210 + 150 * x, 0.15 + 0.5 * x


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>%(title)s</title>
<style>
:root { color-scheme: light dark; color: #222; background: #fff }
@media (prefers-color-scheme: dark) { :root { color: #ddd; background: #161616 } }
body { max-width: 110ch; margin: 2rem auto; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif }
pre { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; font: 14px/1.6 ui-monospace, monospace }
pre span { border-radius: 3px } pre span:hover { outline: 1px solid }
.break::before { content: "↵"; opacity: .4 }
.legend span { padding: .2em .6em; margin-right: .3em; border-radius: 3px; white-space: nowrap }
%(colours)s
</style>
<h1>%(title)s</h1>
<p>%(caption)s. A token is shaded by the number of steps that its prediction took; hover for its loss.</p>
<p class="legend">%(legend)s</p>
<pre>%(text)s</pre>
</html>
"""


def html_map(scores, max_depth, title):
    """A self-contained page of one document's `Scores`, light or dark as the reader's system."""
    colours, legend, spans = [], [], []
    for k in range(1, max_depth + 1):
        hue, opacity = shade(k, max_depth)
        colours.append(f".d{k} {{ background: hsl({hue:.0f} 85% 55% / {opacity:.2f}) }}")
        legend.append(f'<span class="d{k}">{k}: {np.mean(scores.depth == k):.1%}</span>')
    for piece in pieces(scores):
        number = f" in {piece.tokens} tokens" if piece.tokens > 1 else ""
        hover = f"depth {piece.depth:.3g}{number}, loss {piece.nll:.3f} nats, probability {math.exp(-piece.nll):.3g}"
        kind = f"d{round(piece.depth)}" + (" break" if "\n" in piece.text else "")
        spans.append(f'<span class="{kind}" title="{hover}">{html.escape(piece.text)}</span>')
    parts = {"title": html.escape(title), "caption": caption(scores), "legend": "\n".join(legend)}
    return PAGE % (parts | {"colours": "\n".join(colours), "text": "".join(spans)})


def caption(scores):
    return f"{len(scores.tokens):,} tokens, mean depth {scores.depth.mean():.2f}"


def png_map(scores, max_depth, title, file, columns=100, lines=60):
    """Draw the first `lines` lines of one document's `Scores` in a monospaced layout, for papers."""
    from matplotlib.figure import Figure  # without pyplot: it needs no display
    from matplotlib.patches import Rectangle

    size, pitch = 7, 1.45  # of the font, in points; of the lines, in its size
    advance, dpi = 0.602 * size / 72, 205  # of a character of DejaVu Sans Mono, in inches: 12.0 pixels, a whole number
    cells, more = layout(pieces(scores), columns, lines)
    rows = max((row for _, _, row, _ in cells), default=0) + 4.5
    figure = Figure(((columns + 2) * advance, rows * pitch * size / 72), dpi=dpi)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-1, columns + 1), ylim=(rows - 3.5, -3.5))
    axes.axis("off")
    style = {"family": "DejaVu Sans Mono", "size": size, "va": "center_baseline", "parse_math": False}

    def draw(text, column, row, depth):
        hue, opacity = shade(depth, max_depth)
        colour = (*colorsys.hls_to_rgb(hue / 360, 0.55, 0.85), opacity)
        axes.add_patch(Rectangle((column, row - 0.47), cell_width(text), 0.94, color=colour, lw=0))
        axes.text(column, row, text.replace("\t", " "), **style)

    axes.text(0, -2.6, f"{title}: {caption(scores)}" + (f", the first {lines} lines" if more else ""), **style)
    axes.text(0, -1.3, "depth", **style)
    for k in range(1, max_depth + 1):
        draw(f" {k} ", 2 + 4 * k, -1.3, k)
    for text, column, row, depth in cells:
        draw(text, column, row, depth)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font has no such character and draws a box
        figure.savefig(file)


def layout(found, columns, lines):
    """Set `Piece`s in lines of `columns` cells: a list of (text, column, row, depth), and whether `lines` were too few.

    Lines break before a word, or inside one where it is longer than a line.
    """
    cells, column, row = [], 0, 0
    words = []  # lists of pieces between which a line may break
    for piece in found:
        if not words or piece.text[:1].isspace() or words[-1][-1].text[-1:].isspace():
            words.append([])
        words[-1].append(piece)
    for word in words:
        if column and column + sum(cell_width(piece.text.split("\n")[0]) for piece in word) > columns:
            column, row = 0, row + 1
        for piece in word:
            for i, text in enumerate(piece.text.expandtabs(4).replace("\n", "↵\n").split("\n")):
                if i:
                    column, row = 0, row + 1
                while text:
                    if row == lines:
                        return cells, True
                    n = 1
                    while n < len(text) and column + cell_width(text[: n + 1]) <= columns:
                        n += 1
                    cells.append((text[:n], column, row, piece.depth))
                    column, text = column + cell_width(text[:n]), text[n:]
                    if text:
                        column, row = 0, row + 1
    return cells, False


def cell_width(text):
    """Columns that a text takes: two for wide East Asian characters, none for combining ones."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)
