"""Zero-shot tasks through EleutherAI's lm-evaluation-harness; run by `python evaluate.py zeroshot`.

`Harness` is our model as the harness sees it. `local_task` makes tasks of local jsonl files, with the prompts and
metrics of the harness's own tasks of that name, so that they run offline; every other task comes from the hub by name.

Every context opens a document, <|endoftext|> and then the text. Nothing is truncated: what is longer than a segment is
read in segments with Transformer-XL memory, as in training.
"""

import gzip
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections import defaultdict
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm

import data
from decoding import cut, generate_batch
from sample import InputError

CARD = ("lambada", "hellaswag", "arc_easy", "arc_challenge")  # the tasks of the model card's macro

# -------------------------------------------------------------------------------------------------- the model


class Harness(LM):
    """A model for the harness. memory, segment: for what is longer than a segment. depth: as in the model's forward.
    batch_tokens: about so many in a batch. depths: {task: [steps of its scored or generated tokens, their number]}."""

    def __init__(self, model, memory, segment, depth=None, batch_tokens=2048):
        super().__init__()
        self.model, self.memory, self.segment, self.depth = model, memory, segment, depth
        self.batch_tokens, self.depths = batch_tokens, defaultdict(lambda: [0, 0])

    def loglikelihood(self, requests):
        """(log-likelihood, whether greedy decoding gives it) of the continuation in each (context, continuation)."""
        return self._score(requests, [encode_pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests):
        """The log-likelihood of each whole text."""
        return [ll for ll, _ in self._score(requests, [encode_pair("", request.args[0]) for request in requests])]

    @torch.no_grad()
    def _score(self, requests, rows):
        """rows: (tokens, n), of which the last n are scored. Right padding is harmless, as attention is causal."""
        results, segment = [None] * len(rows), self.segment
        for batch in self._batches([len(tokens) - 1 for tokens, _ in rows], "log-likelihoods"):
            T = -(-max(len(rows[i][0]) - 1 for i in batch) // 16) * 16  # few different shapes
            tokens = torch.full((len(batch), T + 1), self.model.config.document_start)
            scored = torch.zeros(len(batch), T, dtype=torch.bool)
            for row, i in enumerate(batch):
                ids, n = rows[i]
                tokens[row, : len(ids)] = torch.tensor(ids)
                scored[row, len(ids) - 1 - n : len(ids) - 1] = True
            nll, greedy = torch.zeros(len(batch), T, dtype=torch.float64), torch.ones(len(batch), T, dtype=torch.bool)
            depth = torch.zeros(len(batch), T, dtype=torch.int64)
            memory = self.model.new_memory(len(batch), min(self.memory, T)) if T > segment else None
            for start in range(0, T, segment):
                part = slice(start, min(start + segment, T))
                here = scored[:, part]
                out = self.model(tokens[:, part], memory=memory, depth=self.depth, keep=here)
                memory, logits = out.memory, out.logits.float()  # (scored, V), the few that count
                targets = tokens[:, start + 1 : part.stop + 1][here].to(logits.device)
                nll[:, part][here] = F.cross_entropy(logits, targets, reduction="none").double().cpu()
                greedy[:, part][here] = (logits.argmax(-1) == targets).cpu()
                depth[:, part] = out.depth.cpu()
            for row, i in enumerate(batch):
                results[i] = (-float(nll[row].sum()), bool(greedy[row].all()))
                self._count(requests[i], depth[row, scored[row]])
        return results

    def generate_until(self, requests):
        """The greedy continuation of each (context, settings), up to <|endoftext|>, a stop string or `max_gen_toks`."""
        tokenizer, eot = data.load_tokenizer(), self.model.config.document_start
        prompts = [[eot, *tokenizer.encode_ordinary(request.args[0])] for request in requests]
        settings = [read_settings(request.args[1]) for request in requests]
        answers = [None] * len(requests)
        lengths = [len(prompt) + limit for prompt, (_, limit) in zip(prompts, settings)]
        for batch in self._batches(lengths, "answers"):
            made = generate_batch(
                self.model, [prompts[i] for i in batch], [settings[i][1] for i in batch], depth=self.depth,
                # at the end of a segment in training a token sees that much; decoding with less would be unlike it
                memory_length=self.memory + self.segment, segment=self.segment,
                until=lambda row, ids, batch=batch: cut(tokenizer.decode(ids), settings[batch[row]][0])[1],
            )  # fmt: skip
            for i, answer in zip(batch, made):
                answers[i], _ = cut(tokenizer.decode(answer.tokens), settings[i][0])
                self._count(requests[i], torch.tensor(answer.depths))
        return answers

    def _batches(self, lengths, label):
        """Lists of indices of rows of similar length, the longest first."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        with tqdm(total=len(order), desc=label, disable=None, leave=False) as progress:
            while order:
                rows = max(1, self.batch_tokens // min(max(lengths[order[0]], 1), self.segment))
                batch, order = order[:rows], order[rows:]
                yield batch
                progress.update(len(batch))

    def _count(self, request, depth):
        totals = self.depths[request.task_name]
        totals[0] += int(depth.sum())
        totals[1] += len(depth)


def encode_pair(context, continuation):
    """[<|endoftext|>, context, continuation] as ids, and how many of them are the continuation's.

    As the harness does it: white space that ends the context goes to the continuation, whose words begin with it."""
    encode = data.load_tokenizer().encode_ordinary
    stem = context.rstrip()
    tokens = encode(context + continuation)
    n = len(tokens) - len(encode(stem))
    return [data.EOT, *tokens], max(n, 1) if continuation else 0


def read_settings(settings):
    """The stop strings and the most tokens of a request's settings. Raises `InputError` where it wants sampling."""
    if settings.get("do_sample") and settings.get("temperature", 1):
        raise InputError("a task asks for sampled answers; only greedy ones are made here")
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else until, int(settings.get("max_gen_toks", 256))


# -------------------------------------------------------------------------------------------------- tasks


def tidy(text):
    """HellaSwag's text without its WikiHow marks, as in the harness."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def hellaswag(row):
    query = tidy(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return {"query": query, "choices": [tidy(ending) for ending in row["endings"]], "gold": int(row["label"])}


def winogrande(row):
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return {"gold": int(row["answer"]) - 1, "choices": contexts, "target": after.strip()}


def mmlu(row):
    subject, choices = row["subject"].replace("_", " "), "\n".join(map(". ".join, zip("ABCD", row["choices"])))
    query = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    query += f"{row['question'].strip()}\n{choices}\nAnswer:"
    return {"query": query, "choices": list("ABCD"), "gold": row["answer"]}


def lambada(row):
    context, _, word = row["text"].rpartition(" ")
    return {"query": context, "target": " " + word}  # here the harness adds no space of its own


def choice(suffix=""):
    return lambda row: {"query": row["query"] + suffix, "choices": row["choices"], "gold": int(row["gold"])}


def metrics(*names):
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


CHOICE = {"output_type": "multiple_choice", "doc_to_text": "query", "doc_to_target": "gold", "doc_to_choice": "choices"}
CHOICE["metric_list"] = metrics("acc", "acc_norm")
PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
NUMBER = {"ignore_case": True, "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"]}
EXTRACT = {"strict-match": {"regex_pattern": "#### (\\-?[0-9\\.\\,]+)"}}
EXTRACT["flexible-extract"] = {"group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"}

# task: file, name on the hub, row of the file -> document, settings of the harness
LOCAL = {
    "lambada": ("lambada_test.jsonl", "lambada_openai", lambada, {
        "output_type": "loglikelihood", "doc_to_text": "query", "doc_to_target": "target",
        "metric_list": [PERPLEXITY, *metrics("acc")]}),
    "hellaswag": ("hellaswag_val.jsonl", "hellaswag", hellaswag, CHOICE),
    "arc_easy": ("arc_easy_test.jsonl", "arc_easy", choice(), CHOICE),
    "arc_challenge": ("arc_challenge_test.jsonl", "arc_challenge", choice(), CHOICE),
    "winogrande": ("winogrande_xl_val.jsonl", "winogrande", winogrande,
                   CHOICE | {"doc_to_text": "gold", "doc_to_target": "target", "metric_list": metrics("acc")}),
    "piqa": ("llmfoundry_piqa.jsonl", "piqa", choice("Answer:"), CHOICE),
    "openbookqa": ("llmfoundry_openbook_qa.jsonl", "openbookqa", choice(), CHOICE),
    "mmlu": ("mmlu_test.jsonl", "mmlu", mmlu, CHOICE | {"metric_list": metrics("acc")}),
    "gsm8k": ("gsm8k_test.jsonl", "gsm8k", lambda row: {
        "query": f"Question: {row['question']}\nAnswer:", "answer": row["answer"]}, {
        "output_type": "generate_until", "doc_to_text": "query", "doc_to_target": "answer",
        "generation_kwargs": {"until": ["Question:"], "do_sample": False},
        "metric_list": [m | NUMBER for m in metrics("exact_match")],
        "filter_list": [{"name": name, "filter": [{"function": "regex"} | regex, {"function": "take_first"}]}
                        for name, regex in EXTRACT.items()]}),
    "humaneval": ("HumanEval.jsonl.gz", None, lambda row: {
        "query": row["prompt"], "tests": f"{row['test']}\ncheck({row['entry_point']})"}, {
        "output_type": "generate_until", "doc_to_text": "query", "doc_to_target": "tests",
        "generation_kwargs": {"until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "max_gen_toks": 512},
        "process_results": lambda doc, results: {
            "pass@1": float(passes(f"{doc['query']}{results[0]}\n{doc['tests']}"))},
        "metric_list": metrics("pass@1")}),
}  # fmt: skip


def local_task(name, folder, limit=None):
    """The task `name` from its file in `folder`, its first `limit` documents. Raises `InputError`."""
    file, _, convert, settings = LOCAL[name]
    file, rows, number = Path(folder) / file, [], 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                if len(rows) == limit:
                    break
                number += 1
                if line.strip():
                    rows.append(convert(json.loads(line)))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; it holds the task '{name}' (or leave out --benchmarks)") from None
    except OSError as error:
        raise InputError(f"{file}: {error}; copy it again") from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise InputError(
            f"{file}, line {number}: not a row of '{name}' ({type(error).__name__}: {error}); copy it again"
        ) from None
    if not rows:
        raise InputError(f"{file}: no rows at all; copy it again")
    source = {"custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)}, "test_split": "test"}
    return ConfigurableTask(config={"task": name, "num_fewshot": 0, "metadata": {"version": 1.0}} | source | settings)


@cache
def all_tasks():
    """The harness's own tasks; it reads thousands of files to know them."""
    return TaskManager()


def load_tasks(names, folder, limit, execute):
    """The tasks of some names, from local files where `folder` is given. Raises `InputError`."""
    tasks = []
    for name in names:
        if name == "humaneval" and not (execute and folder):
            raise InputError("the task 'humaneval' runs code that the model wrote: add --execute_code (a subprocess "
                             "with limits of time and memory, without network), and --benchmarks")  # fmt: skip
        if name == "humaneval":
            namespace()  # where it is refused, then before the answers are made
        if folder and name in LOCAL:
            tasks.append(local_task(name, folder, limit))
            continue
        manager = all_tasks()
        of_hub = LOCAL[name][1] if name in LOCAL else name
        if of_hub not in manager.all_tasks:
            raise InputError(f"no task '{name}': neither {', '.join(LOCAL)} nor a task of lm-evaluation-harness")
        try:
            loaded = manager.load([of_hub])  # a group of tasks stays one: the harness then adds its mean
            tasks += [loaded["groups"][of_hub]] if of_hub in loaded["groups"] else loaded["tasks"].values()
        except Exception as error:  # whatever the hub, the network or a task's own code raises
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"
            raise InputError(f"the task '{name}' cannot be loaded from the hub ({reason}); see --benchmarks") from None
    return tasks


def evaluate_tasks(harness, names, folder=None, limit=None, execute=False):
    """{task: {"documents", metric: [value, standard error or None], ..., "depth"}} of some tasks, and the card's
    "macro" where its four tasks are among them. Raises `InputError`."""
    for name in ("lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    tasks = load_tasks(names, folder, limit, execute)
    if "humaneval" in names:
        print(f"humaneval: programs run with {LIMITS}", file=sys.stderr)
    # its bootstrap forks a pool of processes, which deadlocks now and then beside PyTorch's threads
    os.environ["DISABLE_MULTIPROC"] = "1"
    with redirect_stdout(sys.stderr):  # the harness prints its progress there
        manager = TaskManager(include_defaults=False)  # it needs one, and the tasks are loaded
        results = simple_evaluate(
            harness, tasks=tasks, limit=limit, bootstrap_iters=1000, log_samples=False, task_manager=manager
        )
    table, ours = {}, {hub: name for name, (_, hub, *_) in LOCAL.items()}
    counts = results["n-samples"]
    for hub_name, found in results["results"].items():
        name = ours.get(hub_name, hub_name)
        row = table[name] = {"documents": counts.get(hub_name, {}).get("effective")}
        for key, value in found.items():
            metric, _, of = key.partition(",")
            if of and not metric.endswith("_stderr"):
                error = found.get(f"{metric}_stderr,{of}")
                label = metric if of in ("none", "create_test") else f"{metric} ({of})"
                row[label] = [float(value), float(error) if isinstance(error, float) else None]
    for task, (steps, tokens) in harness.depths.items():
        table[ours.get(task, task)]["depth"] = steps / tokens if tokens else None
    if set(CARD) <= set(table):
        table["macro"] = {"documents": sum(table[name]["documents"] for name in CARD)}
        for label in ("acc", "acc_norm"):  # LAMBADA has no acc_norm
            values, errors = np.array([table[name].get(label) or table[name]["acc"] for name in CARD], float).T
            table["macro"][label] = [float(values.mean()), math.sqrt(np.square(errors).sum()) / len(CARD)]
        table["macro"]["depth"] = float(np.mean([table[name]["depth"] for name in CARD]))
    return table


def as_table(table):
    """Header and cells of what `evaluate_tasks` returned."""
    rows = [["task", "documents", "metric", "value", "± s.e.", "depth"]]
    for name, row in table.items():
        measured = [(key, value) for key, value in row.items() if isinstance(value, list)]
        for i, (metric, (value, error)) in enumerate(measured):
            depth = "" if i or row.get("depth") is None else f"{row['depth']:.2f}"
            label = "acc_norm, LAMBADA acc" if name == "macro" and metric == "acc_norm" else metric
            error = "n/a" if error is None else f"{error:.4f}"
            documents = "" if i or row["documents"] is None else f"{row['documents']:,}"
            rows.append(["" if i else name, documents, label, f"{value:.4f}", error, depth])
    return rows


# -------------------------------------------------------------------------------------------------- HumanEval


LIMITS = (
    "10 s; 1 GiB of memory a process; files up to 1 MiB; no network, no signals to other processes; "
    "files of this user readable"
)


@cache
def namespace():
    """The command before another one that takes the network and the other processes from it. Raises `InputError` where
    that is not possible."""
    for user in (["--user", "--map-root-user"], []):  # without a user namespace it takes root
        command = ["unshare", *user, "--net", "--pid", "--fork", "--kill-child"]
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    raise InputError("the task 'humaneval' runs code that the model wrote, and the network cannot be cut off from it "
                     "here (unshare is missing or not permitted); run it where user namespaces are allowed, or as root "
                     "with CAP_SYS_ADMIN")  # fmt: skip


def passes(program, seconds=10, memory=2**30):
    """Whether a Python program runs to its end, in a process with the limits of `LIMITS`, in an empty folder.

    It guards against mistakes, not against malice: run it where nothing can be lost. Raises `InputError` where the
    network cannot be cut off."""

    limits = {"CPU": seconds, "AS": memory, "FSIZE": 2**20, "CORE": 0, "NOFILE": 64}
    launch = (  # in the child, as Python code between fork and exec may deadlock in a process with threads
        "import os, resource, sys\n"
        f"for name, value in {limits}.items():\n"
        "    resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (value, value))\n"
        "os.execv(sys.executable, [sys.executable, '-I', 'program.py'])"
    )
    done = uuid.uuid4().hex  # printed at the end: a program that exits before its tests has not passed them
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "program.py").write_text(f"{program}\nprint('\\n{done}')\n", encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [*namespace(), sys.executable, "-I", "-c", launch], cwd=folder, env={},
            start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            out, _ = process.communicate(timeout=seconds)
            return process.returncode == 0 and out.rstrip().endswith(done.encode())
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
