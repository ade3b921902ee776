"""The benchmark: the naive peer is the model, the limit's products are its FLOPs, and the command ends in JSON."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import bench_common
import bench_decode_cpu
import bench_kernels
import data
import fp8
import halting
import optim
import packed
from config import ConfigError
from model import ModelConfig, RecurrentTransformer
from naive import Naive

V = 97
TINY = ["--model.width=32", "--model.heads=2", "--model.hidden=48", "--model.max_depth=3"]
TINY += ["--model.vocab_size=97", "--model.document_start=0"]


def build(**changes):
    """The model and its naive twin, with every weight disturbed, so that steps, gains and halting all matter."""
    torch.manual_seed(0)
    settings = dict(width=32, heads=4, hidden=48, max_depth=5, halting_bias=-1.2, vocab_size=V, document_start=0)
    model = RecurrentTransformer(ModelConfig(**settings | changes))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.15 * torch.randn_like(p)
    naive = Naive(model.config)
    naive.load_state_dict(model.state_dict())
    return model, naive


@pytest.mark.parametrize("changes", [{}, {"cross_documents": True}], ids=["documents", "no documents"])
@pytest.mark.parametrize("memory", [0, 7, 24])
def test_the_naive_peer_is_the_model(changes, memory):
    """Over three segments of 12 tokens: loss, gradients of all weights, what is visible; memory starts empty."""
    pair = build(**changes)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, V, (3, 37), generator=generator)
    tokens[torch.rand(3, 37, generator=generator) < 0.08] = 0
    losses, contexts = [], []
    for model in pair:
        state = model.new_memory(3, memory)
        losses.append([]), contexts.append([])
        for start in (0, 12, 24):
            out = model(tokens[:, start : start + 12], tokens[:, start + 1 : start + 13], state)
            out.loss.backward()
            state = out.memory
            losses[-1].append(out.loss.item()), contexts[-1].append(float(out.context))
            if isinstance(model, RecurrentTransformer):
                assert len(out.depth.unique()) > 1  # otherwise nothing would be frozen
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert contexts[1] == pytest.approx(contexts[0])
    expected, found = ({name: p.grad for name, p in model.named_parameters()} for model in pair)
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 1e-4
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("changes", [{"prelude": 1}, {"halting": "fixed"}, {"step_gains": False}])
def test_the_naive_peer_refuses_other_models(changes):
    with pytest.raises(ConfigError, match=f"model.{min(changes)} = "):
        Naive(ModelConfig(width=32, heads=4, hidden=48, **changes))


# ------------------------------------------------------------------------------------------------- the limit

MODELS = [{}, {"prelude": 1, "coda": 2, "recur": 2}, {"injection": "concat_linear"}, {"share": False}]


@pytest.mark.parametrize("changes", MODELS)
@pytest.mark.parametrize("rows", [64, 16384, 5000])
def test_the_limit_counts_the_flops_of_the_model(changes, rows):
    config = ModelConfig(width=32, heads=2, hidden=48, max_depth=3, vocab_size=V, document_start=0, **changes)
    found = sum(2 * g.m * g.n * g.k * g.calls for g in bench_kernels.model_gemms(config, rows))
    assert found == 3 * rows * RecurrentTransformer(config).flops_per_token(3, context=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_products_have_the_shapes_that_they_say(dtype, monkeypatch):
    products, matmul = [], fp8.matmul
    monkeypatch.setattr(fp8, "matmul", lambda *args: products.append((args[0], matmul(*args))))
    for kind in ("forward", "input", "weight"):
        gemm = bench_kernels.Gemm("any", kind, 16, 32, 48, 1)
        assert bench_kernels.gemm_seconds(gemm, dtype, torch.device("cpu"), repeats=1) > 0
        a, product = products[-1]
        assert a.shape == (16, 48) and product.shape == (16, 32)
        assert a.dtype == dtype


@pytest.mark.parametrize("changes", [{}, dict(halting="exit", exit_by="loss", finish=True, min_depth=3)])
def test_a_random_head_is_aimed_at_a_mean_depth(changes):
    torch.manual_seed(0)
    config = ModelConfig(**dict(width=16, heads=2, hidden=24, vocab_size=50, document_start=0) | changes)
    model, tokens = RecurrentTransformer(config).eval(), torch.randint(1, 50, (4, 64))
    for depth in (3.5, 5, 7):
        bench_common.aim(model, depth, tokens, tokens)
        found = model(tokens, tokens).depth.float()
        assert found.mean() == pytest.approx(depth, abs=0.3) and len(found.unique()) > 2


@pytest.mark.parametrize("changes", [dict(hidden=24), dict(hidden=80), dict(hidden=80, share=False, max_depth=3)])
def test_the_limit_counts_the_products_that_muon_runs(changes):
    config = ModelConfig(**dict(width=16, heads=2, vocab_size=50, document_start=0) | changes)
    model = RecurrentTransformer(config)
    muon = optim.build_optimizers(model, optim.OptimConfig())["muon"]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert counter.get_total_flops() == sum(2 * g.m * g.n * g.k * g.calls for g in bench_kernels.muon_gemms(config))


# ------------------------------------------------------------------------------------------------- the profile


def test_kernels_find_their_group():
    kernels = {
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT": (3.0, 8), "sm90_xmma_gemm_bf16bf16_bf16f32": (1.0, 1),
        "void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>": (2.0, 8), "_query_kernel": (1.0, 8),
        "triton_red_fused__scaled_dot_product_flash_attention_mm_3": (0.5, 1), "_swiglu_gradient_kernel": (0.25, 8),
        "void at::native::vectorized_elementwise_kernel<4>": (0.125, 9), "Memcpy HtoD (Pageable -> Device)": (0.125, 1),
    }  # fmt: skip
    found = bench.breakdown(kernels, step_ms=9.0)
    assert list(found["groups_ms"].values()) == [0.5, 0.25, 3.0, 4.0, 0.25, 1.0]  # the last is idle
    assert found["longest"][0] == {"name": "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "ms": 3.0, "calls": 8}


# ------------------------------------------------------------------------------------------------- the command


def run(capsys, *arguments, command="train"):
    """Exit status, stdout and stderr of a command of bench.py at a tiny size."""
    small = ["--device=cpu", "--batch=2", "--segment=16", "--rounds=2", *["--steps=1"] * (command == "train")]
    try:
        status = bench.main([command, *small, *arguments])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def test_the_last_line_has_every_figure(capsys):
    status, out, err = run(capsys, *TINY, "--memory=16,40")
    assert status == 0 and "round 2 of 2" in err
    *table, last = out.splitlines()
    for start in ("memory ", "peer ", "naive ", "limit fp8 with muon "):
        assert sum(line.startswith(start) for line in table) == 2
    result = json.loads(last)
    assert result["model"]["width"] == 32 and result["device"] == "cpu" and result["torch"] == torch.__version__
    assert [section["memory"] for section in result["sections"]] == [16, 40]
    for section in result["sections"]:
        assert list(section["peers"]) == ["naive", "bf16", "fp8", "stacked"]
        assert section["limits"].keys() == {"bf16", "fp8", "muon"} and section["profile"] == {}
        for name, peer in section["peers"].items():
            assert len(peer["rounds_ms"]) == 2 and peer["peak_gib"] is None and not peer["out_of_memory"]
            assert min(peer["ms"], peer["tokens_per_second"], peer["tflops"], peer["versus_bf16"]) > 0
            limit = section["limits"]["fp8" if name == "fp8" else "bf16"]
            assert peer["share_of_limit"] == pytest.approx(limit["ms"] / peer["ms"], rel=1e-4)
    peers = result["sections"][0]["peers"]
    assert peers["naive"]["first_loss"] == pytest.approx(peers["bf16"]["first_loss"], abs=1e-4)
    assert peers["fp8"]["first_loss"] == pytest.approx(peers["bf16"]["first_loss"], abs=0.05)
    assert peers["naive"]["context"] == pytest.approx(peers["bf16"]["context"]) == peers["stacked"]["context"]
    assert peers["naive"]["parameters"] == peers["bf16"]["parameters"] < peers["stacked"]["parameters"]


def test_peers_at_a_mean_depth(capsys, monkeypatch):
    """Tokens of all peers but the stacked one halt at the same steps, and stay with that."""
    packed, of = [], halting.Packed.of
    monkeypatch.setattr(halting.Packed, "of", lambda *a: packed.append(a[1]) or of(*a))
    arguments = ["--batch=8", "--model.max_depth=8", "--depth=5", "--capacities=0.5,0.75", "--memory=16"]
    status, out, _ = run(capsys, *TINY, *arguments, "--peers=naive,bf16,bf16_packed,fp8,fp8_packed,stacked")
    peers = json.loads(out.splitlines()[-1])["sections"][0]["peers"]
    assert status == 0 and set(packed) == {64, 96}
    for name in ("bf16", "bf16_packed", "fp8", "fp8_packed"):
        active = peers[name]["active"]
        assert peers[name]["depth"] == pytest.approx(5, abs=0.5) == sum(active)
        assert active[0] == 1 and active == sorted(active, reverse=True) and 0 < active[-1] < 0.5
        assert peers[name]["first_loss"] == pytest.approx(peers["naive"]["first_loss"], abs=0.05)
    assert peers["bf16_packed"]["active"] == pytest.approx(peers["bf16"]["active"], abs=0.01)
    assert peers["stacked"]["depth"] == 8 and peers["naive"]["depth"] is None
    assert f"still active at each step: 100%, {peers['bf16']['active'][1]:.0%}" in out


def test_real_text(capsys, prepared):
    def context(*arguments):
        status, out, _ = run(capsys, *TINY[:4], "--memory=16", "--peers=bf16", f"--text={prepared}", *arguments)
        assert status == 0
        return json.loads(out.splitlines()[-1])["sections"][0]["peers"]["bf16"]["context"]

    assert context() < 24
    assert context("--documents=none") == 24.5  # all of the memory, and on average half of the segment


def test_random_documents_have_their_mean_length():
    arguments = bench.argparse.Namespace(batch=8, segment=500, documents=50)
    config = ModelConfig()
    batches = bench.make_batches(arguments, config, None, 10)
    tokens = torch.cat([tokens for tokens, _ in batches], 1)
    assert tokens.shape == (8, 5000) and tokens.max() < data.VOCAB_SIZE
    assert torch.equal(torch.cat([targets for _, targets in batches], 1)[:, :-1], tokens[:, 1:])
    assert (tokens == data.EOT).float().mean().item() == pytest.approx(1 / 50, rel=0.2)


def test_a_peer_without_memory_does_not_end_the_others(capsys, monkeypatch):
    def full(self, *_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Naive, "forward", full)
    status, out, err = run(capsys, *TINY, "--memory=16", "--peers=naive,bf16")
    peers = json.loads(out.splitlines()[-1])["sections"][0]["peers"]
    assert status == 0 and "naive: out of memory" in err
    assert peers["naive"] == {"out_of_memory": True} and peers["bf16"]["ms"] > 0


def assert_one_line(status, out, err, message):
    """What a wrong argument ends in."""
    assert status == 2 and not out
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--peers=bf16,fp4"], "no peer 'fp4'; known peers: naive, bf16"),
        (["--memory=512,x"], "'x' must be a whole number"),
        (["--batch=0"], "'0' must be a whole number, at least 1"),
        (["--text=/nowhere"], "/nowhere: not prepared yet"),
        (["configs/none.toml"], "configs/none.toml: no such config file"),
        (["--model.widht=64"], "unknown key 'model.widht' (did you mean 'width'?)"),
        (["--model.width=64"], "'width' 64 must be 'heads'"),
        (["--train.segment=64"], "unknown argument '--train.segment=64'"),
        (["configs/pretrain_110m.toml", "--model.max_depth=4"], "the naive peer does not know model.finish = True"),
        (["--model.halting=fixed"], "the naive peer does not know model.halting = fixed"),
        (["--device=tpu"], "the device 'tpu' cannot be used"),
        (["--profile"], "--profile needs a GPU"),
        (["--depth=9"], "--depth 9 must lie between 1 and 8"),
        (["--capacities=2"], "'capacities' are shares between 0 and 1, not 2.0"),
    ],
)
def test_wrong_arguments_end_in_one_line(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert_one_line(status, out, err, message)


def test_gemm_times_every_product(capsys):
    before = fp8.FAST_TERMS
    status, out, _ = run(capsys, *TINY, "--batch=2", "--segment=16", "--rounds=1", command="gemm")
    result = json.loads(out.splitlines()[-1])
    assert status == 0 and len(result["gemms"]) == 15 and fp8.FAST_TERMS == before
    assert all(gemm[kind] > 0 for gemm in result["gemms"] for kind in ("bf16", "FP8 fast", "FP8 slow", "FP8 as used"))
    assert [s["calls"] for s in result["weight_sums"]] == [g["calls"] for g in result["gemms"] if g["kind"] == "weight"]
    assert all(
        len(s[kind]) == 2 and min(s[kind]) > 0 for s in result["weight_sums"] for kind in ("bf16", "FP8 as used")
    )
    assert [(h["dtype"], h["chunk"]) for h in result["heads"]] == [
        (name, rows) for name in ("bf16", "FP8 as used") for rows in (4096, 32)
    ]


@pytest.mark.parametrize("trained", [False, True], ids=["drawn", "trained"])
def test_scoring_beside_all_steps(capsys, prepared, run_folder, trained):
    """The figures of a section, its bar among them; a checkpoint at its own depth, on real text."""
    drawn = [*TINY, "--model.max_depth=6", "--depth=4", "--batch=8"]
    arguments = [f"--checkpoint={run_folder}", f"--data={prepared}", "--batch=4"] if trained else drawn
    status, out, _ = run(capsys, *arguments, "--length=32", "--memory=0,40", "--steps=1", command="score")
    result, N = json.loads(out.splitlines()[-1]), 4 if trained else 6
    assert status == 0 and result["dtype"] == "float32" and result["segment"] == 32
    assert [section["memory"] for section in result["sections"]] == [0, 40]
    for section in result["sections"]:
        peers, depth = section["peers"], section["depth"]
        assert list(peers) == ["all steps", "own rule", "packed", "head"]
        assert trained or depth == pytest.approx(4, abs=0.5)
        assert sum(section["active"]) == pytest.approx(depth, rel=1e-4) and 1 < depth < N
        assert section["bar"] == pytest.approx(0.85 * N / depth, rel=1e-4) and section["by_flops"] > 1
        assert peers["all steps"]["depth"] == N and peers["packed"]["depth"] == peers["own rule"]["depth"] == depth
        assert peers["packed"]["difference"] < 1e-4 and peers["packed"]["other_depths"] == 0
        for name, peer in peers.items():
            assert peer["ms"] > 0 and len(peer["rounds_ms"]) == 2
            assert name == "head" or peer["speed_up"] == pytest.approx(peers["all steps"]["ms"] / peer["ms"], rel=1e-4)
        assert peers["packed"]["reaches_the_bar"] == (peers["packed"]["speed_up"] >= section["bar"])


def test_scoring_that_is_not_the_same_fails(capsys, monkeypatch):
    put = halting.Packed.put
    monkeypatch.setattr(halting.Packed, "put", lambda self, y, old=None: put(self, y))  # nothing stays frozen
    arguments = ["--model.max_depth=6", "--depth=4", "--batch=8", "--length=32", "--steps=1"]
    status, out, err = run(capsys, *TINY, *arguments, command="score")
    (section,) = json.loads(out.splitlines()[-1])["sections"]
    assert status == 1 and "error: 'packed' failed" in err and section["peers"]["packed"]["difference"] > 1e-3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--depth=3,9"], "--depth 9 must lie between 1 and 8"),
        (["--depth=x"], "invalid"),
        (["--model.halting=fixed"], "nothing to leave out"),
        (["--capacities=0.5,2"], "--capacities are shares between 0 and 1, not 2"),
        (["--checkpoint=/nowhere"], "--checkpoint: "),
        (["--checkpoint=base", "--model.max_depth=4"], "a --checkpoint has its own model"),
        (["--data=/nowhere"], "/nowhere: not prepared yet"),
        (["--dtype=int8"], "invalid choice"),
    ],
)
def test_wrong_arguments_of_scoring_end_in_one_line(capsys, arguments, message):
    small = [] if "checkpoint" in str(arguments) else ["--model.width=32", "--model.heads=2", "--model.hidden=48"]
    status, out, err = run(capsys, *arguments, *small, command="score")
    assert_one_line(status, out, err, message)


@pytest.mark.parametrize("memory, documents", [(0, "none"), (24, "8")])
def test_attention_names_what_it_times(capsys, memory, documents):
    arguments = ["--batch=3", "--segment=16", "--rounds=1", f"--memory={memory}", f"--documents={documents}"]
    status, out, err = run(capsys, *TINY, *arguments, command="attention")
    *_, last = json.loads(out.splitlines()[-1])["rows"]
    assert status == 0 and last["error"] < 1e-5 and len(last["ms"]["attention.py"]) == 2
    everything = memory + (16 + 1) / 2
    assert last["visible"] == everything if documents == "none" else last["visible"] < everything / 2
    assert "varlen_attn" in last["ms"] or "varlen_attn, memory" in err


def test_decoding_on_a_cpu_beside_its_peers(capsys):
    pytest.importorskip("transformers")
    arguments = ["--context=9", "--tokens=4", "--depth=2", "--draft=3x2", f"--threads={torch.get_num_threads()}"]
    status, out, _ = run(capsys, *TINY, *arguments, command="decode_cpu")
    result = json.loads(out.splitlines()[-1])
    forms = ["float32", "bfloat16", *(packed.FORMATS if packed.supported() else ())]
    ours = {f"{form}, {steps} steps" for form in forms for steps in ("all 3", "about 2")}
    ours |= (drafts := {f"{form}, all 3 steps, drafts of 3x2" for form in forms})
    assert status == 0 and set(result["peers"]) == ours | {"uncached, float32", "gpt2", "ours in transformers"}
    for name, row in result["peers"].items():
        assert row["ms"] > 0 and len(row["rounds_ms"]) == 2 and row["versus_gpt2"] > 0
        assert name not in ours - drafts or row["bytes"] > 0 and 1 <= row["depth"] <= 3
        assert ("accepted" in row) == (name in drafts)
    assert result["peers"]["float32, all 3 steps, drafts of 3x2"]["accepted"] == 1  # they are made by all steps


def test_the_gpt2_peer_costs_the_flops_of_all_steps():
    pytest.importorskip("transformers")
    config = ModelConfig(width=64, heads=4, hidden=96, max_depth=5, vocab_size=V, document_start=0)
    peer, model = bench_decode_cpu.gpt2(config, 32), RecurrentTransformer(config)
    matrices = [x.weight for x in peer.transformer.h.modules() if getattr(x, "weight", torch.zeros(1)).dim() == 2]
    flops = 2 * sum(x.numel() for x in [*matrices, peer.lm_head.weight])
    assert flops == model.flops_per_token(5, context=0)
