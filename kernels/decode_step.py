"""The sampler's step as one compiled function (generate.py --compile).

Without it, a step of a small model on a GPU spends its time in starting some hundred kernels. Here
everything that a step does, from the mask to the drawn token and what is written down about it, is
one function of tensors whose shapes and places in memory stay the same, so that it can be compiled
whole, and on a GPU replayed as one CUDA graph. What that takes:

- keys and values of all tokens to come have their room from the start (`FixedLayer`), for the
  longest prompt of the whole input; a token is written at the place that a tensor says, and a mask
  hides what is not written yet;
- the batch has one of a few sizes (`sizes_of`): finished rows are dropped when the rest fits the
  next one, and what is short of a size is filled with rows that are done from the beginning. So the
  step is compiled at most once a size (and only when a batch of that size comes);
- nothing is returned: the step changes the tensors of a `Batch` in place.

Finished rows cost nothing but their share of a batch, so the host asks only now and then whether
any are left, and does not wait for the GPU in between.
"""
import dataclasses
import os
import shutil

import torch
from shared_prompt import RoomyLayer, attention_of, cache_keyword, pad_left, with_cache
from transformers.cache_utils import DynamicCache

ASK = 8  # steps between two looks of the host at what is done


class FixedLayer(RoomyLayer):
    """A cache layer of one shape: keys, values (rows, kv heads, length, d), all of the room.

    A token is written at the place `at` (1,), a tensor that all layers share.
    """

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys.index_copy_(2, self.at, key_states)
        self.values.index_copy_(2, self.at, value_states)
        return self.keys, self.values


@dataclasses.dataclass
class Batch:
    """The rows in the batch, of a fixed size; views of the first rows of `Decoder.all`."""
    alive: torch.Tensor      # (size,) their places among all rows
    token: torch.Tensor      # (size,) the last one drawn
    positions: torch.Tensor  # (size,) of that token in its row, for the rotary embedding
    padding: torch.Tensor    # (size,) tokens on the left of the row's prompt
    done: torch.Tensor       # (size,) has the row ended?
    cache: DynamicCache


def sizes_of(rows):
    """The batch sizes for up to so many rows: a power of two, its half, quarter and eighth."""
    largest = 1 << (rows - 1).bit_length()
    return sorted({max(largest >> k, 1) for k in range(4)})


def static(tensor):
    """The tensor, which will not move: or a CUDA graph would copy it at every step."""
    torch._dynamo.mark_static_address(tensor)
    return tensor


def operation(draw):
    """`draw` as one operation, which the compiler calls as it is: PyTorch 2.11's Inductor cannot
    compile the fp64 cumulative sum over a large vocabulary for CUDA."""
    def called(logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return draw(logits, uniform)

    def shapes(logits, uniform):
        rows = len(logits)
        return logits.new_empty(rows, dtype=torch.long), logits.new_empty(rows, dtype=torch.float32)

    found = torch.library.custom_op("generate::draw", called, mutates_args=())
    found.register_fake(shapes)
    return found


class Decoder:
    """Samples chunks of at most `rows` rows, each of a prompt of at most `longest` tokens.

    draw: (logits (rows, vocab), uniform (rows,)) -> ids, log-probs, both (rows,); ends: list of
    end-of-text ids.
    """

    def __init__(self, model, draw, rows, longest, steps, ends):
        if attention_of(model) not in ("sdpa", "eager"):
            raise ValueError(f"--compile needs SDPA or eager attention, not {attention_of(model)}")
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
        if kinds - {"full_attention", "sliding_attention"}:
            raise ValueError(f"--compile knows full and sliding attention alone, not {kinds}")
        device, compiler = model.device, os.environ.get("CXX", "g++")
        if device.type == "cpu" and not shutil.which(compiler):
            raise ValueError(f"--compile needs a C++ compiler on a CPU; no {compiler} here")
        self.model, self.draw, self.steps = model, operation(draw), steps
        self.keyword = cache_keyword(type(model))
        self.sizes, self.length = sizes_of(rows), longest + steps
        most = self.sizes[-1]
        self.ends = torch.tensor(ends, dtype=torch.long, device=device)
        self.place = torch.arange(self.length, device=device)

        def zeros(*shape, dtype=torch.long):
            return static(torch.zeros(*shape, dtype=dtype, device=device))

        # What is written down, for all rows, and how far we are: step (1,), at (1,) in the cache.
        self.uniform = zeros(most, steps, dtype=torch.float64)
        self.tokens, self.logprobs = zeros(most, steps), zeros(most, steps, dtype=torch.float32)
        self.lengths, self.stops = zeros(most), zeros(most, dtype=torch.bool)
        self.step, self.at = zeros(1), zeros(1)
        self.all = [zeros(most) for _ in range(4)] + [zeros(most, dtype=torch.bool)]
        self.layers, self.batches = None, {}  # made at the first chunk, which knows their shapes
        mode = "default" if device.type == "cpu" else "reduce-overhead"
        self.compiled = torch.compile(self.advance, dynamic=False, mode=mode)

    # ---- What is compiled ------------------------------------------------------------------------
    def advance(self, batch):
        """One step of all rows of a batch: the model, the draw, and what is written down."""
        self.at += 1
        batch.positions += 1
        logits = self.model(input_ids=batch.token[:, None], attention_mask=self.masks(batch),
                            position_ids=batch.positions[:, None], use_cache=True,
                            logits_to_keep=1, **{self.keyword: batch.cache}).logits[:, -1]
        self.step += 1
        self.record(batch, logits)

    def masks(self, batch):
        """0 where a row may look, (size, 1, 1, length), far below elsewhere; one a kind of layer.

        It sees its own tokens up to this one, and of these its window's, where a layer has one.
        """
        seen = (self.place <= self.at) & (self.place >= batch.padding[:, None])
        dtype, found = self.model.dtype, {}
        for kind, window in self.windows.items():
            near = seen if window is None else seen & (self.place > self.at - window)
            mask = torch.zeros(near.shape, dtype=dtype, device=near.device)
            mask = mask.masked_fill(~near, torch.finfo(dtype).min)
            found[kind] = mask[:, None, None]
        return found if len(found) > 1 else found[kind]  # only models of several kinds take a dict

    def record(self, batch, logits):
        """Draw a token a row and write it down. logits: (size, vocab)."""
        token, logp = self.draw(logits, self.uniform[batch.alive].index_select(1, self.step)[:, 0])
        batch.token.copy_(token)
        self.tokens[batch.alive, self.step] = token
        self.logprobs[batch.alive, self.step] = logp
        self.end(batch, torch.isin(token, self.ends))

    def end(self, batch, ended):
        """Note that rows have ended, (size,), with the token of this step."""
        ended = ended & ~batch.done
        self.lengths[batch.alive] += ended * (self.step + 1 - self.steps)
        self.stops[batch.alive] |= ended
        batch.done |= ended

    # ---- Around it -------------------------------------------------------------------------------
    def trial(self, draw, prompts, uniform, steps):
        """A few steps of one row a prompt, not compiled: ids and log-probs, (prompts, steps).

        ValueError where the model cannot be run so.
        """
        own = self.draw, self.steps, self.compiled
        self.draw, self.steps, self.compiled = draw, steps, self.advance
        try:
            found = self.sample(prompts, list(range(len(prompts))), uniform, None, 0)
        except Exception as error:  # of the model's own code: each raises something else
            raise ValueError(f"--compile does not fit this architecture ({error})")
        self.draw, self.steps, self.compiled = own
        return found[0][:, :steps], found[1][:, :steps]

    @torch.no_grad()
    def sample(self, prompts, owner, uniform, stopped, tail):
        """As generate.sample, whose results it has. tail: tokens in which `stopped` looks."""
        # 1. Every prompt once, and its cache once per sample.
        device, rows = self.model.device, len(owner)
        ids, padding, mask, positions = pad_left(prompts, device)
        cache = DynamicCache(config=self.model.config)
        logits = with_cache(self.model, cache, input_ids=ids, attention_mask=mask,
                            position_ids=positions, logits_to_keep=1).logits[:, -1]
        size = next(size for size in self.sizes if size >= rows)
        batch = self.fill(cache, ids.shape[1], torch.as_tensor(owner, device=device), size)
        alive, padded = slice(rows), torch.zeros(size, dtype=torch.long, device=device)
        padded[alive] = torch.as_tensor(owner, device=device)  # rows that fill up are of prompt 0
        batch.padding.copy_(padding[padded])
        batch.positions.copy_(positions[padded, -1])
        batch.alive.copy_(torch.arange(size, device=device))
        batch.done.copy_(torch.arange(size, device=device) >= rows)
        self.uniform[alive] = torch.as_tensor(uniform, device=device)
        self.lengths.fill_(self.steps)
        self.stops.fill_(False)
        self.step.fill_(0)
        self.at.fill_(ids.shape[1] - 1)

        # 2. The first token, and the others.
        self.record(batch, logits[padded])
        for step in range(self.steps):
            if stopped:
                recent = self.tokens[batch.alive, max(0, step - tail):step + 1].tolist()
                self.end(batch, torch.tensor([stopped(row) for row in recent], device=device))
            if stopped or step % ASK == 0:
                left = int((~batch.done).sum())
                if not left:
                    break
                batch = self.shrink(batch, left)
            if step + 1 < self.steps:
                self.compiled(batch)
        return (self.tokens[alive].cpu(), self.logprobs[alive].cpu(),
                self.lengths[alive].tolist(), self.stops[alive].tolist())

    def fill(self, cache, length, owner, size):
        """The batch of a size, in whose cache stand the prompts' keys and values, once per row."""
        if self.layers is None:
            self.make_layers(cache)
        for layer, (keys, values) in zip(cache.layers, self.layers):
            for room, old in (keys, layer.keys), (values, layer.values):
                first = length - old.shape[-2]  # a sliding layer has dropped what no one sees
                room[:len(owner), :, first:length] = old[owner]
        return self.batch(size)

    def make_layers(self, cache):
        """Room for keys and values, (rows, kv heads, length, d) each; the window of each kind."""
        self.layers, self.windows = [], {}
        for layer in cache.layers:
            window = getattr(layer, "sliding_window", None)
            self.windows["full_attention" if window is None else "sliding_attention"] = window
            self.layers.append([old.new_zeros(self.sizes[-1], old.shape[1], self.length,
                                              old.shape[-1]) for old in (layer.keys, layer.values)])

    def batch(self, size):
        """The batch of a size: always the same tensors, made at the first call."""
        if size not in self.batches:
            cache = DynamicCache(config=self.model.config)
            for i, rooms in enumerate(self.layers):
                layer = FixedLayer()
                layer.keys, layer.values = (static(room[:size]) for room in rooms)
                layer.at, layer.is_initialized = self.at, True
                cache.layers[i] = layer
            self.batches[size] = Batch(*(static(one[:size]) for one in self.all), cache)
        return self.batches[size]

    def shrink(self, batch, left):
        """The smallest batch that holds the rows that are `left`; they move into its places."""
        size = next(size for size in self.sizes if size >= left)
        if size >= len(batch.done):
            return batch
        smaller = self.batch(size)
        free = batch.done[:size].nonzero().squeeze(-1)
        late = size + (~batch.done[size:]).nonzero().squeeze(-1)
        free = free[:len(late)]
        rows = [getattr(batch, field.name) for field in dataclasses.fields(batch)[:-1]]
        for tensor in rows + [room for rooms in self.layers for room in rooms]:
            tensor[free] = tensor[late]
        return smaller
