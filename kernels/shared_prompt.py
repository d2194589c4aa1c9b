"""A prompt once for all its samples.

The n completions of a prompt begin with the same tokens, so a transformer would compute the same
for those tokens n times. Here it is computed once. The completions need only its key-value cache,
in two places:

the sampler (generate.py)   runs the prompts once and calls `spread`. Where samples part, `extend`
    gives each its row of the cache. `RoomyLayer` copies the prompt's keys and values, too, for
    attention as transformers picks it. `SharedLayer` keeps them once, beside the few tokens of each
    row's own, and `shared_attention` lets all rows of a prompt attend to them in one matrix
    product. `choose_attention` decides between the two and tries before it trusts.

the trainer (train.py)      `shared_hidden` runs the distinct prompts, repeats their caches to the
    rows, and runs the completions on top. The cache is part of autograd's graph, so that the
    gradients of all samples arrive at the prompt summed. `repeated_hidden` is the plain way, for
    models whose cache cannot be repeated: prompt and completion in one row.

Prompts are padded on the left (`pad_left`), so that all of them end at the same place, where the
completions begin. Rows are samples, in the sampler those that have parted; `owner` (rows,) is the
index of each row's prompt.
"""
import copy
import functools
import inspect
import math

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

# Below so many numbers (own tokens x d), PyTorch's batched products on a CPU are plain loops.
SHORT = 400


def pad_left(prompts, device):
    """The inputs of a pass over prompts of different lengths. prompts: lists of ids.

    Returns ids (prompts, longest); padding (prompts,), the tokens on the left of each; mask
    (prompts, longest), or None where nothing is padded; and positions (prompts, longest).
    """
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts],
                       device=device)
    place = torch.arange(longest, device=device)
    mask = (place >= padding[:, None]).long() if padding.any() else None
    return ids, padding, mask, (place - padding[:, None]).clamp(min=0)


# ---- What is transformers' own -------------------------------------------------------------------
# Names that transformers does not document, or changes between versions, stand only here: the
# keyword of the cache, the attention in a config, and the class of a cache's layer.
# requirements.txt names the versions that were tried.
@functools.cache
def cache_keyword(kind):
    """The keyword of the cache in a model class's forward: `cache`, formerly past_key_values."""
    parameters = inspect.signature(kind.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in parameters:
            return name
    raise ValueError(f"unsupported architecture: {kind.__name__}.forward takes no key-value cache")


def with_cache(model, cache, **inputs):
    """model(**inputs) on a cache, which it extends. model: a language model, or its decoder."""
    return model(**inputs, **{cache_keyword(type(model)): cache}, use_cache=True)


def attention_of(model):
    """The name of the attention that transformers picked, or that was set: "sdpa", "shared", ..."""
    name = getattr(model.config, "_attn_implementation", None)
    if name is None:
        raise ValueError("this version of transformers does not say which attention it picked; "
                         "requirements.txt names those that do")
    return name


def set_layer_class(layer, kind):
    """Turn a DynamicLayer that holds keys and values into `kind`, a class derived from it."""
    if not (torch.is_tensor(layer.keys) and torch.is_tensor(layer.values)):
        raise ValueError("this version of transformers keeps keys and values elsewhere; "
                         "requirements.txt names those that do not")
    layer.__class__ = kind


# ---- The sampler: cache layers -------------------------------------------------------------------
class RoomyLayer(DynamicLayer):
    """A cache layer with room for every token to come.

    DynamicLayer copies the whole cache at each of them. `keys` and `values` (rows, kv heads,
    length, d) are views of the part of `room` that is filled.
    """

    def spread(self, padding, rows, spare):
        """Make room for `rows` rows of `spare` tokens more; the prompts are the first of them.

        padding: (prompts,).
        """
        prompt, length = (self.keys, self.values), self.keys.shape[-2]
        self.make_room(rows, length + spare)
        for room, old in zip(self.room, prompt):
            room[:len(old), :, :length] = old
        self.view(len(padding), length)

    def make_room(self, rows, length):
        self.room = [old.new_empty(rows, old.shape[1], length, old.shape[-1])
                     for old in (self.keys, self.values)]

    def view(self, rows, length):
        self.keys, self.values = (room[:rows, :, :length] for room in self.room)

    def update(self, key_states, value_states, *args, **kwargs):
        """transformers' name: append the states (rows, kv heads, new, d), return all of them."""
        rows, start = len(key_states), self.keys.shape[-2]
        end = start + key_states.shape[-2]
        for room, states in zip(self.room, (key_states, value_states)):
            room[:rows, :, start:end] = states
        self.view(rows, end)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        """Row i goes on from row indices[i]: a copy, where that is not its place.

        None of these places may be the source of another row.
        """
        places = torch.arange(len(indices), device=indices.device)
        moved, length = (indices != places).nonzero().squeeze(-1), self.keys.shape[-2]
        for room in self.room:
            room[moved, :, :length] = room[indices[moved], :, :length]
        self.view(len(indices), length)


class SharedLayer(RoomyLayer):
    """The same without copies of the prompts.

    `prompt` holds their keys and values once, each (prompts x kv heads, length, d), and `room` the
    rows' own tokens. The queries of a prompt's rows are put side by side into slots, so that one
    matrix product serves all of them; `slots` (rows, kv heads) says where each row's queries go.
    """

    def spread(self, padding, rows, spare):
        length = self.keys.shape[-2]
        self.padded = torch.arange(length, device=padding.device) < padding[:, None]
        self.prompt = self.keys.flatten(0, 1), self.values.flatten(0, 1)
        self.make_room(rows, spare)
        self.view(len(padding), 0)
        self.seat(torch.arange(len(padding), device=padding.device), torch.zeros_like(padding), 1)

    def seat(self, owner, place, most):
        """owner, place: (rows,) each row's prompt, and its place among the `most` or fewer rows of
        that prompt."""
        heads = self.keys.shape[1]
        block = owner[:, None] * heads + torch.arange(heads, device=owner.device)  # per kv head
        self.slots, self.most = block * most + place[:, None], most
        self.padding = self.padded[owner, None, None]  # (rows, 1, 1, length)

    def make_room(self, rows, length):
        """In memory the tokens come first: a step writes one block; what none reaches is free."""
        self.room = [old.new_empty(length, rows, old.shape[1], old.shape[-1]).permute(1, 2, 0, 3)
                     for old in (self.keys, self.values)]

    def product(self, states, prompt):
        """Each row's states times a matrix of its prompt, as one batched product.

        states: (rows, kv heads, group, a), prompt: (prompts x kv heads, a, b)
        -> (rows, kv heads, group, b).
        """
        slots, (rows, heads, group, width) = self.slots.flatten(), states.shape
        side = states.new_zeros(len(prompt) * self.most, group, width)
        side[slots] = states.flatten(0, 1)
        side = side.view(len(prompt), self.most * group, width) @ prompt
        return side.view(len(prompt) * self.most, group, -1)[slots].view(rows, heads, group, -1)

    def attend(self, query):
        """Attention of one query a row to its prompt and to its own tokens.

        query: (rows, kv heads, group, d), scaled -> the same; group: the heads that share keys
        and values. One softmax runs over both parts.
        """
        (keys, values), own = self.prompt, self.keys.shape[-2]
        short = own * query.shape[-1] < SHORT
        if short:
            scores = (query[..., None, :] * self.keys[:, :, None]).sum(-1)
        else:
            scores = query @ self.keys.transpose(-1, -2)
        of_prompt = self.product(query, keys.transpose(-1, -2))
        of_prompt = of_prompt.masked_fill_(self.padding, -math.inf)
        weights = torch.cat([of_prompt, scores], -1).softmax(-1, dtype=torch.float32)
        of_prompt, weights = weights.to(query.dtype).split([keys.shape[-2], own], -1)
        if short:
            of_own = (weights[..., None] * self.values[:, :, None]).sum(-2)
        else:
            of_own = weights @ self.values
        return self.product(of_prompt, values) + of_own


def spread(cache, padding, rows, spare, shared):
    """Turn the cache of a pass over the prompts into that of their samples (see RoomyLayer)."""
    cache.owner = torch.arange(len(padding), device=padding.device)
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            set_layer_class(layer, SharedLayer if shared else RoomyLayer)
            layer.spread(padding, rows, spare)


def branch(history, token, vocab):
    """The histories that go on: distinct pairs of a history, by its place, and its next token.

    history, token: (alive,). Returns the place of each one's parent and its last token, both
    (histories,), and (alive,) each row's history. In the batch the first child of a parent takes
    its place, where that is left, and the others fill the gaps.
    """
    pairs, row = torch.unique(history * vocab + token, return_inverse=True)  # in order
    parent, places = pairs // vocab, torch.arange(len(pairs), device=pairs.device)
    stays = (parent.diff(prepend=parent.new_full((1,), -1)) > 0) & (parent < len(pairs))
    place = parent.clone()
    place[~stays] = places[~torch.isin(places, parent[stays])]
    order = place.argsort()
    return parent[order], pairs[order] % vocab, place[row]


def extend(cache, parent):
    """Let row i of the cache go on from row parent[i], if any moves or leaves; see RoomyLayer."""
    if torch.equal(parent, torch.arange(len(cache.owner), device=parent.device)):
        return
    cache.batch_select_indices(parent)
    cache.owner = owner = cache.owner[parent]  # (rows,) index of each row's prompt
    if type(cache.layers[0]) is SharedLayer:  # then all are
        order = owner.argsort(stable=True)
        place = order.argsort() - torch.searchsorted(owner[order], owner)  # as `seat` takes it
        most = int(place.max()) + 1
        for layer in cache.layers:
            layer.seat(owner, place, most)


# ---- The sampler: attention ----------------------------------------------------------------------
def shared_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention as transformers calls it, (rows, heads, queries, d) -> (rows, queries, heads, d).

    transformers passes no cache: the sampler leaves it in `shared_attention.cache`. The prompts
    themselves, several queries a row in a layer that is not spread yet, go to SDPA;
    `shared_attention.plain` counts the calls among them that got the cache's own tensors and no
    mask of the layer's own (a single token needs none).
    """
    layer = shared_attention.cache.layers[module.layer_idx]
    if type(layer) is DynamicLayer:
        cached = key is layer.keys and value is layer.values
        shared_attention.plain += cached and attention_mask is None
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, heads, _, width = query.shape
    scaling = width ** -0.5 if scaling is None else scaling
    query = query.reshape(rows, key.shape[1], -1, width) * scaling
    return layer.attend(query).reshape(rows, 1, heads, -1), None


shared_attention.cache, shared_attention.plain = None, 0
AttentionInterface.register("shared", shared_attention)
AttentionMaskInterface.register("shared", sdpa_mask)


def choose_attention(model, attention):
    """Set the attention of a model that samples; ValueError where that is not possible.

    "model", or the name of a GPU: as transformers picked; "shared": `shared_attention`; "cpu":
    `shared_attention` where possible, else as transformers picked.
    """
    layers = [type(layer) for layer in DynamicCache(config=model.config).layers]
    for kind in set(layers) - {DynamicLayer, DynamicSlidingWindowLayer}:
        raise ValueError(f"unsupported architecture: a {kind.__name__} in its cache cannot be "
                         f"repeated for the samples of a prompt")
    if attention not in ("shared", "cpu"):
        return
    possible = set(layers) == {DynamicLayer} and attention_of(model) == "sdpa"
    if possible and not attends_to_its_cache(model):
        model.set_attn_implementation("sdpa")
        possible = False
    if not possible and attention == "shared":
        raise ValueError("--attention shared needs SDPA over plain keys and values in every layer; "
                         "use --attention model")


def attends_to_its_cache(model):
    """Does every layer attend to the tensors in its cache? Some architectures derive their keys and
    values from them. Tries it on one token; leaves the model with `shared_attention`."""
    model.set_attn_implementation("shared")
    shared_attention.cache = cache = DynamicCache(config=model.config)
    shared_attention.plain = 0
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        with_cache(model, cache, input_ids=token)
    return shared_attention.plain == len(cache.layers)


def check_sampler(model, prompts, tokens, logprobs):
    """ValueError unless the sampler's log-probs are those of plain passes.

    A plain pass takes one row, without padding, from an empty cache. Architectures that count
    positions or build masks in ways of their own may be right there and wrong in a batch.
    prompts: lists of ids; tokens, logprobs: (prompts, steps), at temperature 1.
    """
    gap = 0.0
    with torch.inference_mode():
        for prompt, row, logp in zip(prompts, tokens, logprobs):
            shared_attention.cache = cache = DynamicCache(config=model.config)
            ids = torch.tensor([[*prompt, *row.tolist()]], device=model.device)
            logits = with_cache(model, cache, input_ids=ids).logits[0, len(prompt) - 1:-1].cpu()
            plain = logits.float().log_softmax(-1).gather(-1, row[:, None]).squeeze(-1)
            gap = max(gap, float((plain - logp).abs().mean()))
    if not gap < (1e-2 if model.dtype == torch.float32 else 0.5):
        raise ValueError(f"unsupported architecture: log-probs of a batch differ by {gap:.2g} "
                         f"from those of its rows alone")


# ---- The trainer: hidden states of the completion tokens -----------------------------------------
def distinct_rows(prompts, completions):
    """Rows with one prompt and one completion once, where that leaves at most half of them.

    A policy of low entropy gives the same short answer again and again. Rows of a group share one
    list as their prompt. Returns the prompts and completions of the rows that are left, and the
    places of all rows' tokens among theirs, (tokens,).
    """
    rows = {}  # the distinct ones, and where the tokens of each begin
    places, end = [], 0
    for prompt, completion in zip(prompts, completions):
        key = id(prompt), np.asarray(completion).tobytes()
        if key not in rows:
            rows[key] = prompt, completion, end
            end += len(completion)
        places.append(rows[key][2] + np.arange(len(completion)))
    if 2 * len(rows) > len(prompts):
        return prompts, completions, np.arange(sum(map(len, completions)))
    prompts, completions, _ = zip(*rows.values())
    return prompts, completions, np.concatenate(places)


def repeated_hidden(model, prompts, completions):
    """Hidden states (tokens, hidden) that predict each completion token, row after row.

    prompts, completions: a list or array of ids a row. Both stand in one row, padded on the right.
    """
    ends = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions)]
    ids = torch.zeros(len(prompts), max(ends), dtype=torch.long)
    predicts = torch.zeros_like(ids, dtype=torch.bool)  # does its hidden state predict a token?
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        ids[i, :ends[i]] = torch.as_tensor(np.concatenate([prompt, completion]))
        predicts[i, len(prompt) - 1:ends[i] - 1] = True
    output = model.get_decoder()(input_ids=ids.to(model.device), use_cache=False)
    return output.last_hidden_state[predicts.to(model.device)]


def shared_hidden(model, prompts, completions):
    """The same, with each distinct prompt computed once.

    Rows of a group share one list as their prompt. The prompts' cache, through which gradients
    flow, is repeated for the rows of a block (`length_blocks`), so that almost nothing is padding.
    """
    # 1. The prompts. Their last hidden states predict each row's first token.
    device, decoder = model.device, model.get_decoder()
    distinct = {id(prompt): prompt for prompt in prompts}
    index = {key: i for i, key in enumerate(distinct)}
    owner = torch.tensor([index[id(prompt)] for prompt in prompts], device=device)
    ids, padding, mask, positions = pad_left(distinct.values(), device)
    cache = DynamicCache(config=model.config)
    output = with_cache(decoder, cache, input_ids=ids, attention_mask=mask, position_ids=positions)
    # index_select: its backward pass adds in one order, where indexing adds in the threads' order.
    hidden = [output.last_hidden_state[:, -1].index_select(0, owner)]
    starts = np.cumsum([0] + [len(completion) for completion in completions])
    places = [starts[:-1]]  # in the result, of each hidden state

    # 2. The completions, without their last tokens, which predict nothing.
    for block in length_blocks([len(completion) - 1 for completion in completions]):
        width = len(completions[block[0]]) - 1
        ids = torch.zeros(len(block), width, dtype=torch.long)
        predicts = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(block):
            ids[i, :len(completions[row]) - 1] = torch.as_tensor(completions[row][:-1])
            predicts[i, :len(completions[row]) - 1] = True
        block_owner = owner[torch.tensor(block, device=device)]  # (block's rows,)
        whole_mask = None if mask is None else torch.cat(
            [mask[block_owner], mask.new_ones(ids.shape)], 1)
        place = positions[block_owner, -1:] + 1 + torch.arange(width, device=device)
        predicts = predicts.to(device)
        output = with_cache(decoder, repeated_cache(cache, block_owner), input_ids=ids.to(device),
                            attention_mask=whole_mask,
                            # 0 for padding, which may reach past the model's last position
                            position_ids=place * predicts)
        hidden.append(output.last_hidden_state[predicts])
        places += [np.arange(starts[row] + 1, starts[row + 1]) for row in block]

    # 3. Row after row.
    order = torch.as_tensor(np.argsort(np.concatenate(places)), device=device)
    return torch.cat(hidden)[order]


def shares_prompts(model):
    """Whether a trial gives the same hidden states with shared as with repeated prompts."""
    short, long = [1, 2, 3], [3, 2, 1, 0, 1]
    completions = [np.array([1, 2]), np.array([1, 2, 3]), np.array([3, 1, 2])]
    try:
        expected = repeated_hidden(model, [long, short, long], completions)
        hidden = shared_hidden(model, [long, short, long], completions)
    except Exception:  # a cache of another kind: each raises something else
        return False
    return bool((hidden - expected).norm() < 1e-2 * expected.norm())


def repeated_cache(cache, owner):
    """A copy of the prompts' `cache` for some rows, which leaves `cache` as it is. ValueError if it
    holds more than keys and values: recurrent states may be changed in place."""
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer):
            raise ValueError(f"a {type(layer).__name__} cannot be repeated for several rows")
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    own.reorder_cache(owner)  # by index_select, which is deterministic (see shared_hidden)
    return own


def length_blocks(lengths, waste=0.15, smallest=32, tokens=1024):
    """Row indices, longest first, in blocks that pad less than `waste` of their tokens.

    Small products are slow: up to `smallest` rows, while they are less than so many `tokens` with
    their padding, are one block whatever they pad. Rows of length 0 are in none.
    """
    blocks, used = [], 0
    filled = [i for i, length in enumerate(lengths) if length]
    for i in sorted(filled, key=lambda i: -lengths[i]):
        if blocks:
            width, rows = lengths[blocks[-1][0]], len(blocks[-1])
            large = rows >= smallest or rows * width >= tokens
            full = large and used + lengths[i] < (1 - waste) * width * (rows + 1)
        if not blocks or full:
            blocks.append([])
            used = 0
        blocks[-1].append(i)
        used += lengths[i]
    return blocks
