"""Runs side by side, from the summary.json that train.py leaves at the end of each.

    python compare.py runs/yardstick/*                               a table, the best first
    python compare.py runs/yardstick/* --figure frontier.png         perplexity against mean depth
    python compare.py runs/yardstick/* --markdown table.md --domains

In the figure runs of fixed depths and as many parameters, with the same `data`, whose names differ in the number at
the end alone, such as fixed4 and fixed8, are a line: what adaptive depth in a model of that shape has to beat. Every
other run is a point of its own; the forced depths that it was evaluated at (`eval.depths`) are a thin line, depth as a
dial, and may leave the frame.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

from evaluate import as_markdown, as_text, check_files
from sample import InputError

USED = ("name", "seed", "commit", "parameters", "tokens", "executed_flops", "tokens_per_second")


def read(path):
    """The summary of a run folder of the stage pretrain. Raises `InputError`."""
    file = path if path.suffix == ".json" else path / "summary.json"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        if run["stage"] != "pretrain" or run["validation"] is None:
            raise InputError(f"{file}: of the stage {run['stage']}, or without held-out text; nothing to compare")
        run["validation"]["macro"]["nats"], *map(run.__getitem__, USED)
        run.setdefault("data", "unknown")  # once it was not recorded
        [part["tokens"] for part in run["validation"]["domains"].values()]
        return run
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; train.py writes it at the end of a run") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not a summary of train.py ({type(error).__name__}: {error})") from None


def table(runs, domains=False):
    """Header and rows; ratios are of perplexities, to the best run."""
    names = list(runs[0]["validation"]["domains"]) if domains else []
    head = ["run", "perplexity", "ratio", "bits/byte", "depth", "M params", "M tokens", "PFLOP", "tokens/s", "seed",
            "commit", "data"]  # fmt: skip
    rows = [[*head, *names]]
    best = runs[0]["validation"]["macro"]["nats"]
    for run in runs:
        macro, of = run["validation"]["macro"], run["validation"]["domains"]
        rows.append([
            run["name"], f"{np.exp(macro['nats']):.2f}", f"{np.exp(macro['nats'] - best):.3f}",
            f"{macro['bits_per_byte']:.4f}", f"{macro['depth']:.2f}", f"{run['parameters'] / 1e6:.1f}",
            f"{run['tokens'] / 1e6:,.3g}", f"{run['executed_flops'] / 1e15:,.1f}", f"{run['tokens_per_second']:,.0f}",
            str(run["seed"]), run["commit"] or "", run["data"],
            *(f"{of[name]['bits_per_byte']:.3f} @ {of[name]['depth']:.1f}" for name in names),
        ])  # fmt: skip
    return rows


def is_fixed(run):
    """Whether all tokens of a run take the same number of steps."""
    return all(part["depth"] == run["validation"]["macro"]["depth"] for part in run["validation"]["domains"].values())


def lines(runs):
    """Runs of fixed depths by the shape of their model, as names (without the number at the end) and parameters (to two
    digits) tell it, after as many tokens of the same data: [(name, runs, the shallowest first)] of every shape with
    several."""
    found = {}
    for run in sorted(filter(is_fixed, runs), key=lambda run: run["validation"]["macro"]["depth"]):
        name = run["name"].rstrip("0123456789").rstrip("_")
        found.setdefault((name, f"{run['parameters']:.2g}", run["tokens"], run["data"]), []).append(run)
    return [(name, line) for (name, *_), line in found.items() if len(line) > 1]


def draw(runs, file):
    """Perplexity against mean depth; runs: the best first."""
    from matplotlib import pyplot, ticker

    pyplot.switch_backend("Agg")
    figure, axis = pyplot.subplots(figsize=(9, 4.5))
    place = lambda macro: (macro["depth"], np.exp(macro["nats"]))  # noqa: E731
    of_shapes, texts = lines(runs), {run["data"] for run in runs}
    for style, (name, line) in zip(itertools.cycle(("ko-", "ks--", "k^-.", "kD:", "kv-", "kP--", "kX-.")), of_shapes):
        points = [place(run["validation"]["macro"]) for run in line]
        label = f"{name}, fixed depths" + f", {line[0]['data']}" * (len(texts) > 1)
        axis.plot(*zip(*points), style, markersize=4, linewidth=1, label=label)
    drawn = [id(run) for _, line in of_shapes for run in line]
    for i, run in enumerate(run for run in runs if id(run) not in drawn):
        x, y = place(run["validation"]["macro"])
        axis.plot([x], [y], "osD^"[i // 10 % 4], color=f"C{i % 10}", label=run["name"])
        if forced := sorted(place(macro) for macro in run["validation"].get("forced", {}).values()):
            axis.plot(*zip(*forced), "-", color=f"C{i % 10}", linewidth=0.6)
    axis.set(xlabel="mean depth (steps a token)", ylabel="perplexity, mean over domains", yscale="log")
    axis.yaxis.set_major_formatter(ticker.ScalarFormatter())
    axis.yaxis.set_minor_formatter(ticker.ScalarFormatter())
    heights = [place(run["validation"]["macro"])[1] for run in runs]
    axis.set_ylim(min(heights) * 0.97, max(heights) * 1.1)  # forced depths may be far beyond any run's own
    legend = axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.set_figheight(max(4.5, 0.25 * len(legend.get_texts())))
    pyplot.tight_layout()
    pyplot.savefig(file, dpi=150)
    pyplot.close()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or their summary.json")
    parser.add_argument("--domains", action="store_true", help="add bits per byte and mean depth of every domain")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw perplexity against mean depth")
    args = parser.parse_args(argv)
    try:
        check_files(args.figure, args.markdown)
        runs = sorted(map(read, args.runs), key=lambda run: run["validation"]["macro"]["nats"])
        text = lambda run: {name: part["tokens"] for name, part in run["validation"]["domains"].items()}  # noqa: E731
        if odd := [run["name"] for run in runs if text(run) != text(runs[0])]:
            raise InputError(f"{odd[0]} and {runs[0]['name']} were evaluated on other text; compare like with like")
        rows = table(runs, args.domains)
        print(as_text(rows))
        if len(texts := {run["data"] for run in runs}) > 1:
            print(f"note: trained on data of different names: {', '.join(sorted(texts))}", file=sys.stderr)
        if args.markdown:
            args.markdown.write_text(as_markdown(rows) + "\n")
        if args.figure:
            draw(runs, args.figure)
        return 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
