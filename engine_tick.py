"""The launches of a tick (engine.py) by the kernels of engine_kernels.py, and the vectors between them."""

import torch
import torch.nn.functional as F

import engine_kernels
from engine_kernels import triton
from kernels import INTERPRETED, swiglu_rounded

# Of the kernels of one row, each with its number of warps: rows of the matrix that a warp has, one after the other (and
# `down`: that a program has), keys that a program reads at once. Of several: logits. FP8 weights take half the room.
TILES = {"qkv": (4, 4), "attend": (64, 4), "output": (1, 8), "gate_up": (2, 4), "down": (2, 4), "head": (1, 8),
         "pick": (4096, 4)}  # fmt: skip
FP8_TILES = TILES | {"output": (2, 4), "down": (4, 4), "head": (2, 8)}
PROGRAMS = 264  # of the head
SPLITS = 4  # the most programs that share the keys of a head
WIDE = 2048  # columns that `down` reads at once


def available(model):
    """Whether the kernels run where this model is."""
    d = model.config.width // model.config.heads
    on_device = model.embedding.weight.is_cuda and triton is not None or INTERPRETED
    return on_device and 4 <= d <= engine_kernels.CHUNK.value and d & (d - 1) == 0


def launches_early(device):
    """Whether the GPU knows programmatic dependent launch."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def attend(engine, qkv):
    """`Engine.attend` for rows of qkv (R, 3 D), where the rest of a tick is not by kernels."""
    parts, angle = _parts(engine), engine.state.position[:, None] * engine.frequency
    _launch_attend(engine, qkv, torch.cat([angle.cos(), angle.sin()], 1).float(), *parts, EARLY=False)
    acc, high, total = parts
    share = torch.exp2(high - high.amax(-1, keepdim=True))
    return ((acc * share[..., None]).sum(2) / (total * share).sum(-1)[..., None]).flatten(1)


def _parts(engine):
    """acc, high, total of `_attend`: the keys are shared where there are few heads and rows."""
    c, rows = engine.model.config, engine.rows
    splits = max(1, min(SPLITS, 256 // (rows * c.heads)))
    empty = lambda *shape: torch.empty(rows, c.heads, splits, *shape, device=engine.keys.device)  # noqa: E731
    return empty(c.width // c.heads), empty(), empty()


def _launch_attend(engine, qkv, turn, acc, high, total, **options):
    s, c, (tile, warps) = engine.state, engine.model.config, TILES["attend"]
    splits = high.shape[-1]
    engine_kernels._attend[(engine.rows * c.heads, splits)](
        qkv, turn, engine.keys, engine.values, s.step, s.position, s.first, acc, high, total, engine.rows, c.heads,
        engine.columns, engine.slots, HALF=c.width // c.heads // 2, TILE=tile, PARTS=splits, num_warps=warps, **options,
    )  # fmt: skip


class Tick:
    """The launches of a tick of an `Engine`, and the vectors between them."""

    def __init__(self, engine):
        self.engine = engine
        c, device, R = engine.model.config, engine.keys.device, engine.rows
        vector = lambda size, dtype=torch.float32: torch.zeros(R, size, dtype=dtype, device=device)  # noqa: E731
        self.x, self.y, self.qkv, self.product = map(vector, (c.width, c.width, 3 * c.width, c.hidden))
        self.low = vector(c.width, engine.model.compute_dtype)  # what the next product of matrices reads
        self.parts = [x.zero_() for x in _parts(engine)]
        self.tiling = FP8_TILES if engine.weights.head[1] is not None else TILES
        rows, warps = self.tiling["head"]
        tiles = triton.cdiv(c.vocab_size, rows * warps if R == 1 else TILES["pick"][0])
        self.many = min(tiles, PROGRAMS) if R == 1 else tiles
        self.best, self.which = vector(self.many), vector(self.many, torch.int32)
        self.before = vector(c.width), vector(1), vector(1, torch.int64)  # out, remainder and step before a tick
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)
        self.threshold = torch.full((1,), 1 - c.halting_eps, device=device)
        self.width, self.size = dict(WIDTH=c.width), dict(WIDTH=c.width, BLOCK=triton.next_power_of_2(c.width))
        half = c.width // c.heads // 2
        self.turn, self.rotation = vector(2 * half), dict(HALF=half)
        self.merging = dict(HEAD=c.width // c.heads, PARTS=self.parts[1].shape[-1])
        self.early = launches_early(device)
        self.rule = dict(HALTING=c.halting, ADAPTIVE=engine.adaptive)
        self.accepting = dict(
            END=c.document_start, MANY=triton.next_power_of_2(self.many), LAST=c.finish * (c.max_depth - 1)
        )
        halting = engine.model.halting
        self.head = [engine.state.h, engine.state.remainder]  # not read
        if halting is not None:
            self.head = [halting.weight.detach(), halting.bias.detach()]
        if c.halting == "exit":  # a row for every step: it says infinity where no token may halt
            self.head = [F.pad(x, (*(0, 0) * (x.dim() - 1), 0, int(c.finish))) for x in self.head]
            self.head[1][: c.first_exit] = torch.inf

    @property
    def options(self):
        return dict(EARLY=True, launch_pdl=True) if self.early else dict(EARLY=False)

    def run(self):
        (self.one if self.engine.rows == 1 else self.several)()

    def one(self):
        engine, s, width, size = self.engine, self.engine.state, self.width, self.size
        model, c = engine.model, engine.model.config
        D, F = c.width, c.hidden
        own, inject, gains = dict(OWN=not c.share), engine.inject, engine.gains

        def launch(kernel, name, programs, before, after, **constants):
            matrix, scale = getattr(engine.weights, name)
            scaled = scale is not None
            kernel[(programs,)](
                *before, matrix, scale if scaled else matrix, *after, **constants, SCALED=scaled,
                num_warps=self.tiling[name][1], **self.options,
            )  # fmt: skip

        def groups(name, rows):
            groups, warps = self.tiling[name]
            return triton.cdiv(rows, groups * warps), dict(GROUPS=groups, WARPS=warps)

        after = self.qkv, self.x, s.out, s.remainder, *self.before, 3 * D
        before = s.h, s.e, s.step, inject, gains, s.position, engine.frequency, self.turn
        programs, tiles = groups("qkv", 3 * D)
        launch(engine_kernels._qkv, "qkv", programs + 1, before, after, **size, **self.rotation, **tiles, **own)
        _launch_attend(engine, self.qkv, self.turn, *self.parts, **self.options)
        programs, tiles = groups("output", D)
        before = *self.parts, self.x, s.step, gains
        launch(engine_kernels._output, "output", programs, before, (self.y, D), **width, **self.merging, **tiles, **own)
        programs, tiles = groups("gate_up", F)
        launch(
            engine_kernels._gate_up,
            "gate_up",
            programs,
            (self.y, s.step, gains),
            (self.product, F),
            **size,
            **tiles,
            **own,
        )
        tiles = dict(HIDDEN=F, BLOCK=min(WIDE, triton.next_power_of_2(F)), TILE=self.tiling["down"][0])
        before, programs = (self.product, self.y, s.step, gains), triton.cdiv(D, tiles["TILE"])
        launch(engine_kernels._down, "down", programs, before, (s.h, D), **width, **tiles, **own)
        before = (
            s.h, *self.before, s.left, *self.head, model.tolerance, engine.steps, self.threshold, engine.end,
            engine.seed, self.arrived, model.padding, engine.temperature,
        )  # fmt: skip
        after = (
            c.vocab_size, s.halted, self.best, self.which, s.token, s.position, s.first, s.step, s.e, s.out,
            s.remainder, s.written, s.tokens, s.depths, *self._texts(),
        )  # fmt: skip
        tiles = groups("head", c.vocab_size)[1] | dict(RANDOM=engine.sampling[0] > 0)
        launch(engine_kernels._head, "head", self.many, before, after, **size, **self.rule, **self.accepting, **tiles)

    def several(self):
        engine, s, size, options, rows = self.engine, self.engine.state, self.size, self.options, (self.engine.rows,)
        c, gains, low = engine.model.config, engine.gains, self.low
        engine_kernels._enter[rows](
            s.h, s.e, s.step, engine.inject, gains, s.position, engine.frequency, self.turn, self.x, low,
            **size, **self.rotation, **options,
        )  # fmt: skip
        _launch_attend(engine, engine.multiply(low, "qkv"), self.turn, *self.parts, **options)
        engine_kernels._merge[(*rows, triton.cdiv(c.width, engine_kernels.CHUNK.value))](
            *self.parts, low, **self.width, **self.merging, **options
        )
        branch = engine.multiply(low, "output")
        engine_kernels._residual[rows](self.x, branch, s.step, gains, self.x, low, **size, GAIN=1, NORM=True, **options)
        branch = engine.multiply(swiglu_rounded(engine.multiply(low, "gate_up")), "down")
        engine_kernels._residual[rows](self.x, branch, s.step, gains, s.h, low, **size, GAIN=3, NORM=False, **options)
        engine_kernels._halt[rows](
            s.h, s.out, s.remainder, s.step, s.left, *self.head, engine.model.tolerance, engine.steps, self.threshold,
            s.halted, low, s.written, s.depths, s.tokens.shape[1], LAST=self.accepting["LAST"],
            **size, **self.rule, **options,
        )  # fmt: skip
        logits, (tile, warps) = engine.multiply(low, "head"), TILES["pick"]
        engine_kernels._pick[(*rows, self.many)](
            logits, s.halted, s.position, engine.seed, engine.model.padding, self.best, self.which, c.vocab_size,
            logits.shape[1], engine.temperature, TILE=tile, RANDOM=engine.sampling[0] > 0, num_warps=warps, **options,
        )  # fmt: skip
        engine_kernels._next[rows](
            s.halted, self.best, self.which, s.token, s.position, s.first, s.step, s.h, s.e, s.out, s.remainder, s.left,
            s.written, s.tokens, s.depths, *self._texts(), engine.end, **size, **self.accepting, **options,
        )  # fmt: skip

    def _texts(self):
        engine = self.engine
        return engine.model.embedding.weight, self.many, engine.state.tokens.shape[1], engine.length
