"""The table and the figure of several runs."""

import json
import math

import pytest

import compare


def write(folder, name, nats, depths, forced=None, **changes):
    parts = {domain: {"nats": nats, "bits_per_byte": nats / 3, "depth": d, "tokens": 9} for domain, d in depths.items()}
    macro = {"nats": nats, "bits_per_byte": nats / 3, "depth": sum(depths.values()) / len(depths)}
    validation = {"macro": macro, "domains": parts}
    if forced:
        validation["forced"] = {str(k): {"nats": x, "bits_per_byte": x / 3, "depth": k} for k, x in forced.items()}
    run = {"name": name, "stage": "pretrain", "commit": "abc", "seed": 1, "parameters": 110_248_977, "flops": 1e18}
    run |= {"executed_flops": 2e18, "tokens": 60_000_000, "tokens_per_second": 180_000.0, "validation": validation}
    (folder / name).mkdir()
    (folder / name / "summary.json").write_text(json.dumps(run | changes))
    return str(folder / name)


def test_runs_are_ranked_and_drawn(tmp_path, capsys):
    runs = [
        write(tmp_path, "fixed2", 4.2, {"code": 2, "books": 2}),
        write(tmp_path, "act", 4.0, {"code": 3, "books": 5}, {1: 5.0, 8: 4.0}),
        write(tmp_path, "fixed8", 4.1, {"code": 8, "books": 8}),
        write(tmp_path, "fixed6", 4.3, {"code": 6, "books": 6}, parameters=431_248_977),
        write(tmp_path, "fixed5", 4.4, {"code": 5, "books": 5}, data="data/other"),
    ]
    figure, markdown = tmp_path / "f.png", tmp_path / "t.md"
    assert compare.main([*runs, "--domains", "--figure", str(figure), "--markdown", str(markdown)]) == 0
    out, err = capsys.readouterr()
    head, *rows = [line.split() for line in out.splitlines()]
    assert "data of different names: data/other, unknown" in err
    assert [row[0] for row in rows] == ["act", "fixed8", "fixed2", "fixed6", "fixed5"]
    assert head[:2] == ["run", "perplexity"]
    assert rows[0][1:5] == [f"{math.exp(4):.2f}", "1.000", f"{4 / 3:.4f}", "4.00"]
    assert rows[2][2] == f"{math.exp(0.2):.3f}" and "1.333 @ 3.0" in " ".join(rows[0])
    assert figure.read_bytes()[:4] == b"\x89PNG" and markdown.read_text().count("\n") == 7
    found = [compare.read(tmp_path / name) for name in ("act", "fixed8", "fixed2", "fixed6", "fixed5")]
    # fixed6 is of another shape, fixed5 of other text
    assert compare.lines(found) == [("fixed", [found[2], found[1]])]


@pytest.mark.parametrize(
    "change, message",
    [
        (None, "no such file; train.py writes it"),
        ({"stage": "sft"}, "of the stage sft"),
        ({"validation": None}, "without held-out text"),
        ({"validation": {"macro": {}}}, "not a summary of train.py"),
        ({"validation": {"macro": {"nats": 1.0}, "domains": {}}}, "evaluated on other text"),
        ({"validation": {"macro": {"nats": 1.0}}}, "not a summary of train.py"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, capsys, change, message):
    good = write(tmp_path, "good", 4.0, {"code": 3, "books": 5})
    bad = tmp_path / "bad" if change is None else write(tmp_path, "bad", 4.0, {"code": 3}, **change)
    assert compare.main([good, str(bad)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
