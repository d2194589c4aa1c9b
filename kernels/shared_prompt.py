"""A prompt once for all its samples: the sampler's cache layers and attention, the trainer's forward through the repeated cache."""
import copy
import math

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

class RoomyLayer(DynamicLayer):
    """A cache layer with room for every token to come, where DynamicLayer copies the whole cache at each of them.
    keys and values, both (rows, kv heads, length, d), are views of the filled part."""

    def spread(self, owner, padding, spare):
        """Repeat the prompts' keys and values for their samples. owner: (rows,) index of each row's prompt, ascending;
        padding: (prompts,) tokens on the left of each prompt; spare: tokens to come."""
        prompt, length = (self.keys, self.values), self.keys.shape[-2]
        self.make_room(len(owner), length + spare)
        for room, old in zip(self.room, prompt):
            room[:, :, :length] = old[owner]
        self.view(length)

    def make_room(self, rows, length):
        self.room = [old.new_empty(rows, old.shape[1], length, old.shape[-1]) for old in (self.keys, self.values)]

    def view(self, length):
        self.keys, self.values = (room[:, :, :length] for room in self.room)

    def update(self, key_states, value_states, *args, **kwargs):
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        for room, states in zip(self.room, (key_states, value_states)):
            room[:, :, start:end] = states
        self.view(end)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        """Copies only the rows whose index is not their place; none of them may be the source of another."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(-1)
        for tensor in (self.keys, self.values):
            tensor[moved] = tensor[indices[moved]]
        self.room = [room[:len(indices)] for room in self.room]
        self.view(self.keys.shape[-2])


class SharedLayer(RoomyLayer):
    """The same without copies of the prompts: `prompt` holds their keys and values once, and `room` the rows' own tokens.
    The queries of a prompt's samples are put side by side into slots, so that one matrix product serves all of them."""

    def spread(self, owner, padding, spare):
        _, heads, length, _ = self.keys.shape
        place = torch.arange(len(owner), device=owner.device) - torch.searchsorted(owner, owner)  # among the rows of its prompt
        self.most = int(place.max()) + 1
        self.slots = (owner[:, None] * heads + torch.arange(heads, device=owner.device)) * self.most + place[:, None]  # (rows, kv heads)
        self.padding = (torch.arange(length, device=owner.device) < padding[:, None])[owner, None, None]  # (rows, 1, 1, length)
        self.prompt = self.keys.flatten(0, 1), self.values.flatten(0, 1)  # (prompts x kv heads, length, d)
        self.make_room(len(owner), spare)
        self.view(0)

    def make_room(self, rows, length):
        """In memory the tokens come first: a step writes one block, and what no step reaches is never touched."""
        self.room = [old.new_empty(length, rows, old.shape[1], old.shape[-1]).permute(1, 2, 0, 3) for old in (self.keys, self.values)]

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.slots, self.padding = self.slots[indices], self.padding[indices]

    def product(self, states, prompt):
        """states: (rows, kv heads, group, a) of each row, prompt: (prompts x kv heads, a, b) -> (rows, kv heads, group, b)."""
        slots, (rows, heads, group, width) = self.slots.flatten(), states.shape
        side = states.new_zeros(len(prompt) * self.most, group, width)
        side[slots] = states.flatten(0, 1)
        side = side.view(len(prompt), self.most * group, width) @ prompt
        return side.view(len(prompt) * self.most, group, -1)[slots].view(rows, heads, group, -1)

    def attend(self, query):
        """Attention of one query a row, scaled, to its prompt and its own tokens: (rows, kv heads, group, d) -> the same.
        group: the heads that share keys and values."""
        (keys, values), own = self.prompt, self.keys.shape[-2]
        short = own * query.shape[-1] < 400  # below this, PyTorch's batched products on a CPU are plain loops
        scores = (query[..., None, :] * self.keys[:, :, None]).sum(-1) if short else query @ self.keys.transpose(-1, -2)
        of_prompt = self.product(query, keys.transpose(-1, -2)).masked_fill_(self.padding, -math.inf)
        weights = torch.cat([of_prompt, scores], -1).softmax(-1, dtype=torch.float32).to(query.dtype)
        of_prompt, weights = weights.split([keys.shape[-2], own], -1)
        of_own = (weights[..., None] * self.values[:, :, None]).sum(-2) if short else weights @ self.values
        return self.product(of_prompt, values) + of_own


def shared_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention as transformers calls it, (rows, heads, queries, d) -> (rows, queries, heads, d). It hands no cache over: `sample`
    leaves it here. The prompts themselves, several queries a row in a layer that is not spread yet, are left to SDPA."""
    layer = shared_attention.cache.layers[module.layer_idx]
    if type(layer) is DynamicLayer:
        shared_attention.plain += key is layer.keys and value is layer.values
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, heads, _, width = query.shape
    query = query.reshape(rows, key.shape[1], -1, width) * (width ** -0.5 if scaling is None else scaling)
    return layer.attend(query).reshape(rows, 1, heads, -1), None


shared_attention.cache, shared_attention.plain = None, 0  # plain: calls that found the very keys and values of the cache
AttentionInterface.register("shared", shared_attention)
AttentionMaskInterface.register("shared", sdpa_mask)


def choose_attention(model, attention):
    """"model": as transformers picked; "shared": `shared_attention`, or ValueError; "cpu": that one where possible."""
    layers = [type(layer) for layer in DynamicCache(config=model.config).layers]
    for kind in set(layers) - {DynamicLayer, DynamicSlidingWindowLayer}:
        raise ValueError(f"unsupported architecture: a {kind.__name__} in its cache cannot be repeated for the samples of a prompt")
    if attention not in ("shared", "cpu"):
        return
    possible = set(layers) == {DynamicLayer} and model.config._attn_implementation == "sdpa"
    if possible:  # by what is seen; and does every layer attend to what is in its cache? Some attend to what they make of it.
        model.set_attn_implementation("shared")
        shared_attention.cache, shared_attention.plain = DynamicCache(config=model.config), 0
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=shared_attention.cache, use_cache=True)
        possible = shared_attention.plain == len(layers)
    if not possible and attention == "shared":
        raise ValueError("--attention shared needs SDPA over plain keys and values in every layer; use --attention model")
    if not possible and model.config._attn_implementation == "shared":
        model.set_attn_implementation("sdpa")


def length_blocks(lengths, waste=0.15, smallest=32):
    """Row indices, longest first, cut into blocks that pad less than `waste` of their tokens and have `smallest` rows or more
    (small products are slow); rows of length 0 are in none."""
    blocks, used = [], 0
    for i in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        width, rows = (lengths[blocks[-1][0]], len(blocks[-1])) if blocks else (0, 0)
        if not blocks or rows >= smallest and used + lengths[i] < (1 - waste) * width * (rows + 1):
            blocks.append([])
            used = 0
        blocks[-1].append(i)
        used += lengths[i]
    return blocks


def repeated_hidden(model, prompts, completions):
    """Hidden states (tokens, hidden) that predict each completion token; prompt and completion in one row, padded on the right."""
    device, ends = model.device, [len(p) + len(c) for p, c in zip(prompts, completions)]
    ids = torch.zeros(len(prompts), max(ends), dtype=torch.long)
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        ids[i, :ends[i]] = torch.as_tensor(np.concatenate([prompt, completion]))
        wanted[i, len(prompt) - 1:ends[i] - 1] = True
    return model.get_decoder()(input_ids=ids.to(device), use_cache=False).last_hidden_state[wanted.to(device)]


def shared_hidden(model, prompts, completions):
    """The same, with each distinct prompt computed once: its key-value cache, through which gradients flow, is repeated for its
    rows. Rows are run in blocks of similar lengths, so that almost nothing is padding."""
    device, decoder = model.device, model.get_decoder()
    distinct = {id(prompt): prompt for prompt in prompts}  # rows of a group share one list
    place = {key: i for i, key in enumerate(distinct)}
    owner = torch.tensor([place[id(prompt)] for prompt in prompts], device=device)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in distinct.values()], device=device)
    pads = torch.tensor([longest - len(prompt) for prompt in distinct.values()], device=device)
    mask = (torch.arange(longest, device=device) >= pads[:, None]).long() if pads.any() else None
    cache = DynamicCache(config=model.config)
    first = decoder(input_ids=ids, attention_mask=mask, position_ids=(torch.arange(longest, device=device) - pads[:, None]).clamp(min=0),
                    past_key_values=cache, use_cache=True).last_hidden_state[owner, -1]  # predicts each row's first token
    hidden, places, starts = [first], [], np.cumsum([0] + [len(completion) for completion in completions])
    places.append(starts[:-1])
    for block in length_blocks([len(completion) - 1 for completion in completions]):
        width, rows = len(completions[block[0]]) - 1, torch.tensor(block, device=device)
        ids = torch.zeros(len(block), width, dtype=torch.long)
        wanted = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(block):
            ids[i, :len(completions[row]) - 1] = torch.as_tensor(completions[row][:-1])
            wanted[i, :len(completions[row]) - 1] = True
        own = copy.copy(cache)  # the block's own view of the prompts' keys and values
        own.layers = [copy.copy(layer) for layer in cache.layers]
        own.batch_select_indices(owner[rows])
        mine = torch.cat([mask[owner[rows]], mask.new_ones(ids.shape)], 1) if mask is not None else None
        positions = (longest - pads[owner[rows]])[:, None] + torch.arange(width, device=device)
        states = decoder(input_ids=ids.to(device), attention_mask=mine, position_ids=positions, past_key_values=own, use_cache=True)
        hidden.append(states.last_hidden_state[wanted.to(device)])
        places.append(np.concatenate([np.arange(starts[row] + 1, starts[row + 1]) for row in block]))
    order = torch.as_tensor(np.argsort(np.concatenate(places)), device=device)
    return torch.cat(hidden)[order]  # (tokens, hidden), row after row
