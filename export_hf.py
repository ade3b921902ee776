"""Export a checkpoint for Hugging Face transformers (`pip install "transformers>=5.23"`).

    python export_hf.py runs/demo exported                  the newest checkpoint of a run
    python export_hf.py runs/demo/checkpoints/best exported --dtype bfloat16 --overwrite

    model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("exported", trust_remote_code=True)

The folder has everything: weights, configuration, tokenizer with chat template, and copies of `modeling_recurrent.py`
(what can be done with the model is written there), model.py and the files that they import.

The tokenizer gives the ids of ours, with <|endoftext|> in front (`add_special_tokens=False`: without), except for text
in which a marker such as "<|user|>" is spelled out: to ours that is text like any other, to transformers it is the
marker. For text that others wrote, `tokenizer(text, split_special_tokens=True)` is as ours. The chat template refuses
messages that spell out a marker, so that nobody can forge a turn.
"""

import argparse
import ast
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import checkpoint
import data
from sample import InputError

try:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import GenerationConfig, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    from modeling_recurrent import RecurrentConfig, RecurrentForCausalLM
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"error: the export needs transformers 5 ({error}); pip install 'transformers>=5.23'", file=sys.stderr)
    sys.exit(2)

HERE = Path(__file__).parent

# `chat.encode(chat.messages(...))`, which says why: system text opens the user turn after it, or is one; neighbours of
# one role are one turn; the answer's <|endoftext|> is not part of a history.
CHAT_TEMPLATE = """
{%- set roles = {'system': 'system', 'user': 'user', 'human': 'user', 'assistant': 'assistant', 'gpt': 'assistant'} -%}
{%- set turn = namespace(role='', text='', system='') -%}
{{- '<|endoftext|>' -}}
{%- for message in messages -%}
    {%- set role = roles[message['role']] -%}
    {%- if not role -%}
        {{- raise_exception('unknown role ' ~ message['role'] ~ '; known: ' ~ roles | join(', ')) -}}
    {%- endif -%}
    {%- if message['content'] is not string -%}
        {{- raise_exception('the content of a message must be text') -}}
    {%- endif -%}
    {%- set text = message['content'] | trim -%}
    {%- for marker in ['<|endoftext|>', '<|user|>', '<|assistant|>'] if marker in text -%}
        {{- raise_exception('a message spells out the marker ' ~ marker ~ ', which would end its turn; change it') -}}
    {%- endfor -%}
    {%- set gap = '\\n\\n' if role == turn.role and turn.text and text else '' -%}
    {%- if role == 'system' -%}
        {%- set turn.system = turn.system ~ gap ~ text -%}
    {%- elif role == turn.role -%}
        {{- gap ~ text -}}
    {%- elif role == 'user' -%}
        {{- '<|user|>' ~ turn.system ~ ('\\n\\n' if turn.system else '') ~ text -}}
    {%- else -%}
        {{- ('<|user|>' ~ turn.system if turn.system else '') ~ '<|assistant|>' ~ text -}}
    {%- endif -%}
    {%- set turn.text = turn.text ~ text if role == turn.role else text -%}
    {%- set turn.role = role -%}
    {%- if role != 'system' -%}
        {%- set turn.system = '' -%}
    {%- endif -%}
{%- endfor -%}
{{- '<|assistant|>' if add_generation_prompt -}}
"""


def build_tokenizer():
    """`data.load_tokenizer()` as a tokenizer of transformers."""
    encoding = data.load_tokenizer()
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(data.EOT)}
    # tiktoken joins the neighbours whose union has the lowest rank; so every way to cut a token in two is a merge
    cuts = [(token[:i], token[i:]) for token in ranks for i in range(1, len(token))]
    alphabet = bytes_to_unicode()
    spell = lambda token: "".join(alphabet[byte] for byte in token)  # noqa: E731
    merges = [(spell(left), spell(right)) for left, right in cuts if left in ranks and right in ranks]
    tokenizer = Tokenizer(models.BPE({spell(token): i for token, i in ranks.items()}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # its pattern is GPT-2's
    tokenizer.decoder = decoders.ByteLevel()
    start, user, assistant = data.SPECIAL_TOKENS
    tokenizer.add_special_tokens(list(data.SPECIAL_TOKENS))  # in the order of their ids
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, data.EOT)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=start, pad_token=start, padding_side="left",
        additional_special_tokens=[user, assistant], chat_template=CHAT_TEMPLATE.strip(),
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def relative(source):
    """Python `source` with its imports of modules of this folder made relative, and the names of these modules."""
    lines, found = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            name = node.names[0].name  # one a line, as ruff enforces
        elif isinstance(node, ast.ImportFrom) and not node.level:
            name = node.module
        else:
            continue
        if not (HERE / f"{name}.py").exists():
            continue
        found.append(name)
        line, column = lines[node.lineno - 1], node.col_offset
        if isinstance(node, ast.ImportFrom):
            line = line[:column] + re.sub(r"from\s+", "from .", line[column:], count=1)
        else:  # the first line is for transformers, which copies a module only where it reads `from .NAME import`
            line = f"{line[:column]}from .{name} import __doc__ as _\n{line[:column]}from . {line[column:]}"
        lines[node.lineno - 1] = line
    return "".join(lines), found


def write_modules(folder):
    """Copy modeling_recurrent.py and all that it imports of ours. Of data.py the model needs ids only, and not the
    tokenizer with its file: what is written under that name has the constants."""
    constants = {name: x for name, x in vars(data).items() if name.isupper() and isinstance(x, int)}
    stub = '"""Constants of the tokenizer."""\n\n' + "".join(f"{name} = {x}\n" for name, x in constants.items())
    waiting, written = ["modeling_recurrent"], set()
    while waiting:
        if (name := waiting.pop()) in written:
            continue
        source, found = relative(stub if name == "data" else (HERE / f"{name}.py").read_text(encoding="utf-8"))
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
        written.add(name)
        waiting += found


def write_model(folder, model, meta, dtype):
    """Write config.json, generation_config.json and model.safetensors, with the weights in `dtype` but for the halting
    head, which stays in float32."""
    segment = meta["config"]["train"]["segment"]
    memory = meta["memory"] or segment  # 0: trained without memory, where a token saw its segment
    config = RecurrentConfig(memory, segment, **asdict(model.config))
    config.architectures, config.dtype = [RecurrentForCausalLM.__name__], dtype
    classes = {"AutoConfig": RecurrentConfig, "AutoModelForCausalLM": RecurrentForCausalLM}
    config.auto_map = {auto: f"modeling_recurrent.{kind.__name__}" for auto, kind in classes.items()}
    config.save_pretrained(folder)
    ids = {f"{kind}_token_id": model.config.document_start for kind in ("bos", "eos", "pad")}
    GenerationConfig(**ids).save_pretrained(folder)
    kept = RecurrentForCausalLM._keep_in_fp32_modules_strict
    weights = {
        f"model.{name}": x.to(torch.float32 if name.split(".")[0] in kept else dtype).contiguous()
        for name, x in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def export(where, out, dtype=torch.float32, overwrite=False):
    """Write the checkpoint `where` (see `checkpoint.find`) to the folder `out`, whole or not at all.

    Raises `InputError` where something is in the way, `CheckpointError`, `DataError`, SafetensorError and OSError."""
    out = Path(out).resolve()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; name a folder")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise InputError(f"{out}: not empty; name another folder, or add --overwrite")
        if not (out / "modeling_recurrent.py").exists():
            raise InputError(f"{out}: not empty, and no exported model, which is all that --overwrite replaces")
    model, meta = checkpoint.load_model(where)
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed export
    unfinished.mkdir(parents=True)
    try:
        write_model(unfinished, model, meta, dtype)
        build_tokenizer().save_pretrained(unfinished)
        write_modules(unfinished)
        if out.exists():
            shutil.rmtree(out)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint or run folder")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                        help="of the weights, and so of the activations (default: float32)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an exported model at OUT")
    args = parser.parse_args(argv)
    try:
        export(args.checkpoint, args.out, getattr(torch, args.dtype), args.overwrite)
    except (InputError, data.DataError, checkpoint.CheckpointError, SafetensorError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
