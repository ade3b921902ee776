"""`python bench.py decode`: tokens a second of one text and of many, beside the bytes that must be read for them.

The roofline of one text reads every weight that a token touches once: those of the block at each of its steps, and the
head. Where the block fits into a GPU's L2 cache it need not come from memory each time: `own blocks`, the same model
with eight blocks of its own, reads as many bytes but cannot keep them; the difference is what residency gives.

Weights are random, and where a depth is adaptive the halting head is random, too, with a bias for the mean depth that
is asked for; tables show what was taken. <|endoftext|> is never drawn. Greedy.
"""

from dataclasses import replace
from statistics import median

import torch

from bench_common import aim, align, check_depth, clock, finish, load, note
from decoding import generate
from device import pick_dtype
from engine import Engine
from model import LAST, RecurrentTransformer


def run_decode(args, overrides):
    cfg, device = load(args, overrides)
    on_cuda = device.type == "cuda"
    torch.manual_seed(0)
    bench = Bench(args, cfg.model, device)
    result = {"model": vars(cfg.model), "context": args.context, "tokens": args.tokens, "rows": args.rows}
    result["copy_gb_per_second"] = bandwidth(device)
    for name in args.sections:
        if name == "profile" and not on_cuda:
            note("section profile is left out: it is of a GPU's kernels")
            continue
        note(f"section {name}")
        try:
            result[name] = getattr(bench, name)(result["copy_gb_per_second"])
        except Exception as error:  # a section that fails does not cost the others
            if not on_cuda:
                raise
            note(f"{type(error).__name__}: {error}")
            result[name] = {"failed": str(error)[:300]}
    print(render(result))
    return finish("decode", device, result)


def bandwidth(device, size=2**30, repeats=10):
    """GB/s read and written by copies of `size` bytes (a sixteenth of them on a CPU)."""
    size = size if device.type == "cuda" else size // 16
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in "st")
    seconds = []
    for _ in range(repeats):
        start = clock(device)
        target.copy_(source)
        seconds.append(clock(device) - start)
    return 2 * size / median(seconds) / 1e9


class Bench:
    def __init__(self, args, c, device):
        self.args, self.device, self.dtype = args, device, pick_dtype("auto", device)
        self.c = replace(c, halting="act" if c.halting == "fixed" else c.halting)
        check_depth(self.c, args.depth)
        self.models = {}

    def model(self, share=True, depth=None):
        """A random model, kept; depth: the mean that its halting head is to give, or None."""
        key = share, depth
        if key not in self.models:
            torch.manual_seed(0)
            c = self.c if share else replace(self.c, share=False)
            with torch.device(self.device):
                model = RecurrentTransformer(c, self.dtype).eval()
            for name, parameter in model.named_parameters():
                if name.endswith(("output.weight", "down.weight")):  # zero at first: every step would be the identity
                    torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            model.padding[c.document_start] = -torch.inf
            if depth is not None:
                tokens = self.text(self.args.context)[None]
                aim(model, depth, tokens, tokens)
            self.models[key] = model
        return self.models[key]

    def text(self, length, seed=0):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(1, self.c.vocab_size, (length,), generator=generator)
        text[text == self.c.document_start] = 1
        text[0] = self.c.document_start
        return text

    def engine(self, rows, model, **options):
        longest = self.args.tokens * 4 + 64
        return Engine(model, rows, self.args.context + longest, longest=longest, **options)

    def single(self, copy):
        """One text: the engine at depth N and at a mean depth, with both kinds of weights; own blocks; the peers."""
        N, d, low = self.c.max_depth, self.args.depth, torch.float8_e4m3fn
        shared, adaptive, own = self.model(), self.model(depth=d), self.model(share=False)
        variants = {
            f"depth {N}": (shared, N, None), f"depth {N}, FP8 weights": (shared, N, low),
            f"depth {N}, own blocks": (own, N, None), f"depth {N}, own blocks, FP8 weights": (own, N, low),
            f"mean depth {d:g}": (adaptive, None, None), f"mean depth {d:g}, FP8 weights": (adaptive, None, low),
        }  # fmt: skip
        engines = {name: self.engine(1, m, depth=k, weights=w) for name, (m, k, w) in variants.items()}
        rows = {name: [] for name in variants}
        for turn in range(self.args.rounds + 1):
            for name, machine in engines.items():
                measured = self.stream(machine)
                rows[name] += [measured] if turn else []
        found = {}
        for name, machine in engines.items():
            speed = median(tokens / seconds for tokens, seconds, _ in rows[name])
            depth = rows[name][0][2]
            bytes_ = sum(self.bytes_of(machine.weights, part) for part in ("qkv", "output", "gate_up", "down"))
            bytes_ = bytes_ * depth + self.bytes_of(machine.weights, "head")
            limit = copy * 1e9 / bytes_
            found[name] = {"tokens_per_second": speed, "depth": depth, "megabytes": bytes_ / 1e6,
                           "roofline": limit, "share": speed / limit}  # fmt: skip
        return found

    @staticmethod
    def bytes_of(weights, name):
        matrix, _ = getattr(weights, name)
        return matrix[0].numel() * matrix.element_size()

    def stream(self, machine):
        """(tokens, seconds, mean depth) of one text in its stride."""
        s, tokens = machine.state, self.args.tokens
        machine.join(0, self.text(self.args.context).tolist(), s.tokens.shape[1])
        machine.ticks(32)
        before, start = int(s.written[0]), clock(self.device)
        while True:
            machine.ticks(64)
            count = int(s.written[0])  # waits
            if count - before >= tokens:
                break
        seconds = clock(self.device) - start
        return count - before, seconds, s.depths[0, before:count].float().mean().item()

    def peers(self, copy):
        """The same text by decoding.py, by reading all of it for every token, and by transformers."""
        model, context = self.model(), self.text(self.args.context).tolist()
        N, found = self.c.max_depth, {}

        def timed(name, function, tokens):
            function(2)
            start = clock(self.device)
            function(tokens)
            found[name] = {"tokens_per_second": tokens / (clock(self.device) - start)}

        few = max(2, self.args.tokens // 8)
        timed("decoding.generate", lambda n: list(generate(model, context, n, 0, depth=N, memory_length=1024)), few)

        @torch.no_grad()
        def uncached(n):
            text = list(context)
            for _ in range(n):
                text.append(int(model(torch.tensor([text]), depth=N, keep=LAST).logits[0, -1].argmax()))

        timed("no cache", uncached, max(2, few // 4))
        try:
            timed("transformers generate", self.of_transformers(model, context), few)
        except ImportError as error:
            note(f"transformers is left out: {error}")
        return found

    def of_transformers(self, model, context):
        import modeling_recurrent as exported

        fields = vars(model.config) | {"memory_length": 1024, "segment": 512, "eos_token_id": None}
        with torch.device(self.device):
            other = exported.RecurrentForCausalLM(exported.RecurrentConfig(**fields)).to(self.dtype).eval()
        other.model.load_state_dict(model.state_dict())
        ids = torch.tensor([context], device=self.device)
        options = dict(do_sample=False, pad_token_id=self.c.document_start, depth=self.c.max_depth)
        return lambda n: other.generate(ids, max_new_tokens=n, min_new_tokens=n, **options)

    def batch(self, copy):
        """Many rows with prompts of different lengths: everyone at its own depth, against all at the depth of the
        slowest, which is what a batch pays that waits at every token."""
        R, N, d = self.args.rows, self.c.max_depth, self.args.depth
        lengths = [16 + (self.args.context - 16) * i // max(R - 1, 1) for i in range(R)]
        prompts = [self.text(length, seed).tolist() for seed, length in enumerate(lengths)]
        found = {}
        for name, model, depth in ((f"mean depth {d:g}", self.model(depth=d), None), (f"depth {N}", self.model(), N)):
            machine = self.engine(R, model, depth=depth)
            s = machine.state
            for row, prompt in enumerate(prompts):
                machine.join(row, prompt, s.tokens.shape[1])
            machine.ticks(32)
            speeds = []
            for _ in range(self.args.rounds):
                before, start = s.written.clone(), clock(self.device)
                machine.ticks(128)
                speeds.append((s.written - before).sum().item() / (clock(self.device) - start))
            least = int(s.written.min())
            depths = s.depths[:, 1:least].float()
            found[name] = {"tokens_per_second": median(speeds), "depth": depths.mean().item(),
                           "deepest": depths.amax(0).mean().item()}  # fmt: skip
        own, all_ = found.values()
        waiting = all_["tokens_per_second"] * N / own["deepest"]
        found["waiting for the slowest"] = {"tokens_per_second": waiting, "depth": own["depth"]}
        return found

    def check(self, copy):
        """Greedy tokens of the engine against decoding.py, in float32: they must be the same."""
        torch.manual_seed(0)
        c = replace(self.c, width=320, heads=5, hidden=2560)
        with torch.device(self.device):
            model = RecurrentTransformer(c, torch.float32).eval()
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    torch.nn.init.normal_(parameter, std=0.05)
        prompt, found = self.text(100).tolist(), {}
        for depth in (None, 3):
            expected = list(generate(model, prompt, 24, 0, depth=depth))
            for rows in (1, 3):
                made = Engine(model, rows, 512, depth, longest=24).run([prompt] * rows, [24] * rows)
                same = [list(zip(one.tokens, one.depths)) == expected for one in made]
                found[f"depth {depth}, {rows} rows"] = all(same)
        return found

    def profile(self, copy):
        """Microseconds of the kernels of a tick that does not halt, of one that does, and of one of many rows, each
        started when the one before has ended: else they would count their waiting."""
        found, R, N, least = {}, self.args.rows, self.c.max_depth, self.c.depths[0]
        for name, rows, depth in (("a tick", 1, N), ("a tick that halts", 1, least), (f"a tick of {R} rows", R, N)):
            machine = self.engine(rows, self.model(), depth=depth)
            if machine.kernels:
                machine.kernels.early = False
            for row in range(rows):
                machine.join(row, self.text(self.args.context).tolist(), machine.state.tokens.shape[1])
            machine.tick()
            clock(self.device)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                for _ in range(6):
                    machine.tick()
                clock(self.device)
            events = [e for e in profiler.key_averages() if e.device_type.name == "CUDA" and not e.is_user_annotation]
            found[name] = {e.key[:60]: e.self_device_time_total / 6 for e in events}
        return found


SECTIONS = ("check", "single", "batch", "peers", "profile")


def render(result):
    text = f"copy: {result['copy_gb_per_second']:.0f} GB/s\n\n"
    for name, found in result.items():
        if name in SECTIONS and isinstance(found, dict):
            columns = list(dict.fromkeys(key for row in found.values() if isinstance(row, dict) for key in row))
            lines = [[name, *columns]]
            for key, row in found.items():
                cells = [row.get(c) for c in columns] if isinstance(row, dict) else [row]
                lines.append(
                    [key, *("" if x is None else f"{x:,.4g}" if isinstance(x, float) else str(x) for x in cells)]
                )
            text += align(lines)
    return text
