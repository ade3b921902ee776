"""Reading configurations: types, overrides, and errors that name the file, the key and the remedy."""

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

import config
from config import ConfigError, differences, from_dict


@dataclass
class Source:
    files: str
    limit: int | None = None


@dataclass
class Optim:
    lr: float = 0.1
    steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["linear", "cosine"] = "linear"
    nesterov: bool = True

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"'lr' must be above 0, not {self.lr}")


@dataclass
class Config:
    out: str
    optim: Optim
    sources: list[Source] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 512)])
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.out == "/":
            raise ValueError("'out' is everything")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()


def load(text="", *overrides):
    with open("configs/a.toml", "w") as file:
        file.write('out = "x"\n' + text)
    return config.load("configs/a.toml", Config, overrides)


def error(text="", *overrides):
    """The message with which a configuration is refused, after the name of its file."""
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    where, colon, message = str(caught.value).partition(": ")
    return message if where == "configs/a.toml" else where + colon + message


# -------------------------------------------------------------------------------------------------- values


def test_absent_keys_and_sections_have_their_defaults():
    assert load() == Config("x", Optim())


def test_every_kind_of_value():
    text = """
        memory = [[0, 128], [0.5, 256.0]]
        [optim]
        lr = 1
        steps = 2e7
        betas = [0, 0.5]
        schedule = "cosine"
        nesterov = false
        [weights]
        code = 2
        [[sources]]
        files = "a"
        limit = 3
        [[sources]]
        files = "b"
    """
    read = load(text)
    optim = Optim(1.0, 20_000_000, (0.0, 0.5), "cosine", False)
    assert read == Config("x", optim, [Source("a", 3), Source("b")], [(0.0, 128), (0.5, 256)], {"code": 2.0})
    assert type(read.optim.lr) is float and type(read.optim.steps) is int and type(read.memory[1][1]) is int


def test_json_reads_back_as_the_same():
    read = load('memory = [[0, 1], [0.5, 2]]\nsources = [{files = "ä"}]')
    assert from_dict(json.loads(config.to_json(read)), Config, "meta.json") == read


@pytest.mark.parametrize(
    "text, message",
    [
        ("[optim]\nsteps = 1.5", "'optim.steps' must be a whole number, not 1.5"),
        ("[optim]\nsteps = true", "'optim.steps' must be a whole number, not True"),
        ("[optim]\nlr = '3'", "'optim.lr' must be a number, not '3'"),
        ("[optim]\nlr = false", "'optim.lr' must be a number, not False"),
        ("[optim]\nnesterov = 1", "'optim.nesterov' must be true or false, not 1"),
        ("[optim]\nbetas = [0.9]", "'optim.betas' must be tuple[float, float], not [0.9]"),
        ("[optim]\nbetas = [0.9, 'x']", "'optim.betas[1]' must be a number, not 'x'"),
        ("[optim]\nschedule = 'cosin'", "must be one of 'linear', 'cosine', not 'cosin' (did you mean 'cosine'?)"),
        ("memory = [[0, 1], [1, 0.5]]", "'memory[1][1]' must be a whole number, not 0.5"),
        ("memory = 3", "'memory' must be list[tuple[float, int]], not 3"),
        ("optim = 3", "'optim' must be a section, not 3"),
        ("weights = {code = 'x'}", "'weights.code' must be a number, not 'x'"),
        ("sources = [{files = 'a', limit = 'x'}]", "'sources[0].limit' must be int | None, not 'x'"),
    ],
)
def test_wrong_values_are_named(text, message):
    assert error(text).endswith(message)


def test_unknown_keys_suggest_the_nearest():
    assert error("sourcs = []").startswith("unknown key 'sourcs' (did you mean 'sources'?); known keys: out, optim,")
    assert "unknown key 'optim.step' (did you mean 'steps'?)" in error("[optim]\nstep = 3")
    assert "unknown key 'optim.qqq'; known keys: lr, steps" in error("[optim]\nqqq = 3")
    assert "unknown key 'sources[0].file' (did you mean 'files'?)" in error("sources = [{file = 'a'}]")


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match="^here: the key 'out' is missing$"):
        from_dict({}, Config, "here")
    assert error("sources = [{limit = 1}]") == "the key 'sources[0].files' is missing"


def test_errors_of_checks_name_file_and_section():
    assert error("[optim]\nlr = 0") == "[optim] 'lr' must be above 0, not 0.0"
    assert error("", "--out=/") == "'out' is everything"


# -------------------------------------------------------------------------------------------------- files


def test_a_missing_file_suggests_the_nearest():
    load()
    with pytest.raises(ConfigError, match=r"^config/a.toml: no such config file \(did you mean 'configs/a.toml'\?\)$"):
        config.load("config/a.toml", Config)
    with pytest.raises(ConfigError, match="^q: no such config file$"):
        config.load("q", Config)


def test_an_unreadable_file_is_named():
    assert "at line 2" in error("optim = = 1")
    for raw in (b"out = '\xff'", None):
        with open("b.toml", "wb") as file:
            file.write(raw or b"")
        with pytest.raises(ConfigError, match="^(b.toml|configs): "):
            config.load("b.toml" if raw else "configs", Config)


# -------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_toml_or_else_plain_text():
    text = "[optim]\nlr = 0.2\nsteps = 5"
    read = load(text, "--optim.steps=2e3", "optim.nesterov=false", "--memory=[[0, 8], [0.5, 16]]", "--out=runs/a=b c")
    assert read == Config("runs/a=b c", Optim(0.2, 2000, nesterov=False), memory=[(0.0, 8), (0.5, 16)])
    assert load("", "--optim.schedule=cosine", "--optim.betas=[0.8, 0.9]").optim.betas == (0.8, 0.9)
    assert load("", '--sources=[{files = "a"}]', "--weights.code=2").weights == {"code": 2.0}
    assert load("", '--out="3"').out == "3" and load("", "--out=").out == ""
    assert load("", "--optim.steps=1", "--optim.steps=2").optim.steps == 2  # the last one counts


def test_wrong_overrides_are_named():
    assert "unknown key 'optm' (did you mean 'optim'?)" in error("", "--optm.lr=1")
    assert "unknown key 'optim.l' (did you mean 'lr'?)" in error("", "--optim.l=1")
    assert error("", "--optim.lr=fast") == "'optim.lr' must be a number, not 'fast'"
    assert error("", "--optim.lr") == "override '--optim.lr' has no value; write --optim.lr=VALUE"
    assert error("", "--out.lr=1") == "override '--out.lr': 'out' is a value, not a section"


# -------------------------------------------------------------------------------------------------- differences


def test_differences_name_every_changed_key():
    old = {"out": "a", "model": {"width": 32, "heads": 2}, "train": {"memory": [[0, 1]]}, "gone": 1}
    new = {"out": "a", "model": {"width": 64, "heads": 2}, "train": {"memory": [[0, 2]]}, "new": {"x": 1}}
    assert list(differences(old, new)) == [
        "gone: 1 -> None",
        "model.width: 32 -> 64",
        "new: None -> {'x': 1}",
        "train.memory: [[0, 1]] -> [[0, 2]]",
    ]
    assert list(differences(old, json.loads(json.dumps(old)))) == []
    assert list(differences({"a": 1}, {"a": 2}, "model.")) == ["model.a: 1 -> 2"]


def test_a_file_extends_another(tmp_path):
    def write(name, text):
        (tmp_path / "configs" / name).write_text(text)

    (tmp_path / "configs/rows").mkdir()
    write("base.toml", 'out = "a"\n[optim]\nlr = 0.5\nsteps = 7\n')
    write("rows/row.toml", 'extends = "../base.toml"\nout = "b"\n[optim]\nsteps = 8\n')
    write("rows/next.toml", 'extends = "row.toml"\n[weights]\ncode = 1\n')
    found = config.load("configs/rows/next.toml", Config, ["--optim.schedule=cosine"])
    assert found == Config("b", Optim(0.5, 8, schedule="cosine"), weights={"code": 1.0})
    write("loop.toml", 'extends = "loop.toml"\n')
    with pytest.raises(ConfigError, match="loop.toml: 'extends' must be the path of another file"):
        config.load("configs/loop.toml", Config)
    write("lost.toml", 'extends = "nowhere.toml"\n')
    with pytest.raises(ConfigError, match="nowhere.toml: no such config file"):
        config.load("configs/lost.toml", Config)
