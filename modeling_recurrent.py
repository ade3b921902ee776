"""Our model in Hugging Face transformers (5.23 and 5.24): a wrapper around `model.RecurrentTransformer`.

`export_hf.py` copies this file, and the files that it imports, beside the weights; there

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(**tokenizer(["Once upon a time", "def main("], return_tensors="pt", padding=True), depth=4)

What differs from other models of transformers:

- The cache is a `Memory` of fixed length, in a `RecurrentCache`; until transformers 5.23 it is named `past_key_values`.
  `generate` makes it as long as the text can become, at most `config.memory_length`, the length last trained with: a
  longer text rolls through it. Prompts are read in segments of `config.segment`, as in training. Without a cache all
  that is given is read as one segment.
- Documents open with <|endoftext|> (`bos_token_id`), in training always; the tokenizer adds it. Wherever it is read, a
  document opens that sees nothing before it: leave out the one that ends an answer before going on, as the chat
  template does.
- The loss of `labels` is the cross-entropy alone, without the ponder cost. Where gradients are on, the head is fused
  with the loss, so that there are no logits beside it; logits never carry a gradient.
- Beam search works; assisted decoding does not, as a memory cannot go back. Attention maps and hidden states are not
  given out.

Shapes: B batch, T tokens, V vocabulary.
"""

import math
from dataclasses import fields

import torch
import torch.nn.functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from fp8 import Weight
from memory import Memory, Ring
from model import ModelConfig, RecurrentTransformer

# transformers 5.24 renamed it, in arguments and outputs
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class RecurrentConfig(PreTrainedConfig):
    """The fields of our `ModelConfig`, and under the usual names what follows from them. memory_length: of the cache of
    `generate`; more than was trained is allowed. segment: how many tokens of a prompt are read at once."""

    model_type = "adaptive_recurrent"

    def __init__(self, memory_length=512, segment=512, **kwargs):
        """Raises ValueError for fields that contradict each other, as `ModelConfig` does."""
        own = {field.name: kwargs.pop(field.name, field.default) for field in fields(ModelConfig)}
        c = ModelConfig(**own)
        usual = {
            "hidden_size": c.width,
            "intermediate_size": c.hidden,
            "num_attention_heads": c.heads,
            "num_hidden_layers": c.prelude + c.max_depth * c.recur + c.coda,  # those computed, not those stored
            "max_position_embeddings": memory_length + segment,  # the last token of a segment sees as much in training
            "tie_word_embeddings": False,  # a fact of RecurrentTransformer, which has one matrix and no copy to tie
        }
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), c.document_start)
        super().__init__(**ids | kwargs | own | usual | {"memory_length": memory_length, "segment": segment})

    def to_model_config(self):
        return ModelConfig(**{field.name: getattr(self, field.name) for field in fields(ModelConfig)})


class RecurrentCache:
    """A `Memory` of `length` tokens, as the `cache` of transformers; it is made when the first tokens are read."""

    is_compileable = is_croppable = False
    is_linear = [False]  # of its layers, as transformers asks: a state of fixed size, from which nothing was dropped

    def __init__(self, length):
        self.length, self.memory = length, None

    def get_seq_length(self, layer_idx=0):
        """How many tokens each row has read, padding included."""
        return self.memory.position if self.memory else 0

    def grow(self, length):
        """Make room for `length` tokens."""
        if length > self.length:
            self.length, self.memory = length, self.memory and self.memory.resized(length)

    def reorder_cache(self, rows):
        """Keep the `rows`, (B,) int64, of beam search."""
        memory, here = self.memory.settle(), rows.to(self.memory.ring.keys[0].device)
        keys, values = ([x[here] for x in part] for part in (memory.ring.keys, memory.ring.values))
        self.memory = Memory(Ring(keys, values, memory.position), memory.live[rows.cpu()], memory.position)

    def crop(self, max_length):
        raise NotImplementedError("the memory of this model overwrites old tokens: it cannot go back to fewer of them")


class RecurrentForCausalLM(PreTrainedModel, GenerationMixin):
    """`RecurrentTransformer` with a `generate`. Activations have the dtype of the weights."""

    config_class = RecurrentConfig
    base_model_prefix = "model"
    _is_stateful = True  # transformers then refuses assisted decoding
    _no_split_modules = ["RecurrentTransformer"]
    _keep_in_fp32_modules_strict = ["halting"]  # multiplied in float32; all else is rounded to the activations' dtype

    def __init__(self, config):
        super().__init__(config)
        self.model = RecurrentTransformer(config.to_model_config())
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        weights = [x for module in self.model.modules() for x in vars(module).values() if isinstance(x, Weight)]
        self._masters = [(weight, [names[id(master)] for master in weight.masters]) for weight in weights]
        self.post_init()

    def _init_weights(self, module):
        """The constructor has initialised all parameters; `from_pretrained` makes the buffer anew, uninitialised."""
        if isinstance(module, RecurrentTransformer):
            module.padding.zero_()[self.config.vocab_size :] = -math.inf
            module.tolerance.fill_(module.config.tolerance)

    def get_input_embeddings(self):
        return self.model.embedding

    @can_return_tuple
    def forward(
        self, input_ids, attention_mask=None, cache=None, labels=None, use_cache=False, depth=None, logits_to_keep=0,
        past_key_values=None,
    ):  # fmt: skip
        """input_ids: (B, T) int64. attention_mask: (B, tokens in the cache + T), zero before the first token of a row,
        or after its last where nothing more will be read. cache, or past_key_values: a `RecurrentCache` to read and go
        on from, in place. labels: (B, T) int64, shifted in here, -100 where there is no loss. depth: None for the
        model's own rule, or k to make every token take exactly k steps. logits_to_keep: of the last so many tokens; 0:
        of all.
        Returns logits (B, T or logits_to_keep, V), without gradient; loss and no logits for labels with gradients on.

        Raises ValueError for a depth that the model has not, labels with a cache, and a mask that is none of these."""
        for weight, names in self._masters:  # `from_pretrained` has put other parameters in the place of those
            weight.masters = tuple(map(self.model.get_parameter, names))
        self.model.compute_dtype = self.model.embedding.weight.dtype
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None and labels is None:
            cache = RecurrentCache(self.config.memory_length)
        marked = self._mark(input_ids.cpu(), attention_mask, cache.get_seq_length() if cache else 0)
        loss = None
        if labels is not None:
            if cache:
                raise ValueError("labels and a cache exclude each other: the loss is that of whole rows")
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
            weights = (targets != -100).float()
            weights /= weights.sum().clamp(min=1)
            targets = targets.clamp(min=0)
            if torch.is_grad_enabled():
                out = self.model(input_ids, targets, depth=depth, weights=weights, spans=self.model.spans(marked))
                return CausalLMOutputWithPast(loss=out.loss)
        logits = self._read(input_ids, marked, cache, depth, logits_to_keep if labels is None else 0)
        if labels is not None:
            nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
            loss = (nll * weights.flatten()).sum()
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    @torch.no_grad()
    def _read(self, tokens, marked, cache, depth, keep):
        """Logits (B, T or keep, V) of tokens (B, T), which a cache then holds."""
        memory, parts = None, []
        if cache:
            memory = cache.memory or self.model.new_memory(len(tokens), cache.length)
        T = tokens.shape[1]
        segment, start = (self.config.segment if cache else T), (max(0, T - keep) if keep else 0)
        for piece, opened in zip(tokens.split(segment, 1), marked.split(segment, 1)):
            spans, wanted = self.model.spans(opened, memory), (slice(None), slice(max(0, start), None))
            out = self.model(piece, memory=memory, depth=depth, spans=spans, keep=wanted)
            memory, start = out.memory, start - piece.shape[1]
            parts.append(out.logits[..., : self.config.vocab_size])
        if cache:
            cache.memory = memory
        return torch.cat(parts, 1)

    def _mark(self, tokens, mask, past):
        """Tokens (B, T) on the host, with the id that opens a document at the first real token of every row. It is only
        where `Spans` looks for the starts of documents that these are read, so that no row sees its padding, whether
        its text opens with <|endoftext|> or not. mask: the attention mask; past: the tokens in the cache."""
        if mask is None:
            return tokens
        if mask.shape != (len(tokens), past + tokens.shape[1]):
            raise ValueError(f"attention_mask must be (rows, {past} in the cache + new tokens), not {(*mask.shape,)}")
        mask = mask.cpu().bool()
        if ((mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0] > 1).any():
            raise ValueError("attention_mask has gaps: pad on the left only (tokenizer.padding_side = 'left')")
        first = mask.int().argmax(1)
        if self.config.cross_documents and first.any():
            raise ValueError("this model sees across documents, padding too: give it rows of one length, or one row")
        rows = (first >= past).nonzero()[:, 0]
        marked = tokens.clone()
        marked[rows, first[rows] - past] = self.config.document_start
        return marked

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *_
    ):
        """Called by `generate`: a memory for the longest text that it may make, and not more. Raises ValueError."""
        if generation_config.cache_implementation is not None:
            raise ValueError("this model has a cache of its own: leave cache_implementation out")
        length, cache = min(self.config.memory_length, max_cache_length), model_kwargs.get(CACHE)
        if cache is not None:
            cache.grow(length)
        elif generation_config.use_cache:
            model_kwargs[CACHE] = RecurrentCache(length)
