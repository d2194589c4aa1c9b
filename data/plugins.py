"""Objectives from a file of the user's, `--method FILE.py:NAME`: found, given settings, checked.

NAME(batch, **settings) returns the advantage of every completion token, (tokens,). If NAME_loss
stands beside it, NAME_loss(logp, batch, advantage, clip_low, clip_high, **settings) returns the
loss of every token in place of the clipped surrogate, or that with two bool tensors (tokens,):
where it cut a token from below and from above. NAME.fields names the row fields that the batch
holds. Both functions take, of the settings and the clip range, what they name as arguments.

A file is imported, that is, run, when its user names it on the command line, and never else. What
is wrong with it is told in one line, like any bad input.
"""
import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import math
import os

from data.files import fail


def setting(text):
    """KEY=VALUE of the command line as (key, int, float or text)."""
    key, _, value = text.partition("=")
    if not key.isidentifier() or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(value)
            break
    if isinstance(value, float) and not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r}: a number must be finite")
    return key, value


def split_name(text):
    """(path, name) of FILE.py:NAME; ValueError if it is no such text, or there is no such file."""
    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError("neither ds-grpo nor grpo nor FILE.py:NAME")
    if not os.path.isfile(path):
        raise ValueError(f"no such file {path}")
    return path, name


def clip_range(args):
    """clip_low and clip_high, as given or by default."""
    return {name: default if getattr(args, name) is None else getattr(args, name)
            for name, default in (("clip_low", 0.2), ("clip_high", 0.25))}


def check_method(args, error):
    """Give the settings of --method their defaults, and refuse those of another one."""
    for name, default in {"gamma_p": 0.01, "gamma_n": 0.01, "smooth_level": "token"}.items():
        if getattr(args, name) is None:
            setattr(args, name, default if args.method == "ds-grpo" else None)
        elif args.method != "ds-grpo" and getattr(args, name) != 0:
            error(f"--{name.replace('_', '-')} belongs to --method ds-grpo")
    normed = args.method in ("ds-grpo", "grpo") and args.smooth_level != "reward"
    if args.adv_norm and not normed:
        error("--adv-norm belongs to --method grpo, and to ds-grpo but at --smooth-level reward")
    args.adv_norm = args.adv_norm or ("std" if normed else None)
    settings = args.arm or []
    if args.method in ("ds-grpo", "grpo"):
        if settings:
            error(f"--arm belongs to --method FILE.py:NAME, not to {args.method}")
        vars(args).update(clip_range(args))
        return
    try:
        split_name(args.method)
    except ValueError as problem:
        error(f"--method {args.method}: {problem}")
    args.arm = dict(settings)
    if len(args.arm) < len(settings):
        error("--arm: a KEY is given twice")


def load_arm(text, settings, clip, given):
    """FILE.py:NAME as advantage(batch); loss(logp, batch, advantage), or None; and NAME.fields.

    settings: {argument: value}, each of which one of the two functions must have; clip: the same,
    of which the loss must have those that were `given`. The loss returns a triple, whatever
    NAME_loss does.
    """
    path, name = split_name(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        fail(f"{path}: cannot be imported: {type(error).__name__}: {error}")
    own, own_loss = getattr(module, name, None), getattr(module, f"{name}_loss", None)
    if not callable(own):
        fail(f"{path}: no function {name} in this file")
    for key in settings:
        if not takes(own, key) and not (own_loss and takes(own_loss, key)):
            fail(f"{text}: has no setting {key!r}")
    for key in given:
        if own_loss and not takes(own_loss, key):
            fail(f"--{key.replace('_', '-')}: {text}_loss does not take it")

    def advantage(batch):
        return checked(text, with_settings(own, settings), [batch], batch.old_logp)

    def loss(logp, batch, advantage):
        function = with_settings(own_loss, {**clip, **settings})
        found = checked(f"{text}_loss", function, [logp, batch, advantage], logp)
        uncut = batch.row.new_zeros(len(batch.row), dtype=bool)
        return found if isinstance(found, tuple) else (found, uncut, uncut)

    return advantage, loss if own_loss else None, tuple(getattr(own, "fields", ()))


def takes(function, key):
    parameters = inspect.signature(function).parameters
    return key in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def with_settings(function, settings):
    named = {key: value for key, value in settings.items() if takes(function, key)}
    return functools.partial(function, **named)


def checked(name, function, given, like):
    """function(*given), whose result, or the first of its results, must be a finite tensor of the
    shape and dtype of `like`."""
    try:
        found = function(*given)
    except Exception as error:
        fail(f"{name}: {type(error).__name__}: {error}")
    first = found[0] if isinstance(found, tuple) else found
    is_tensor = isinstance(first, type(like))
    what = f"{first.dtype} of shape {tuple(first.shape)}" if is_tensor else type(first).__name__
    wanted = f"{like.dtype} of shape {tuple(like.shape)}"
    if what != wanted:
        fail(f"{name} must return a tensor, {wanted}, not {what}")
    if not first.isfinite().all():
        fail(f"{name} returns numbers that are not finite")
    return found


def try_method(advantage, loss, groups, verdicts):
    """Call the objective on the first group, with the sampler's log-probs in place of pi_old: what
    is wrong with it is told before a model is loaded. Returns whether it asks for mean_logp."""
    like, first = verdicts.reward, groups[0]
    means = [row.logprobs.mean() if len(row.logprobs) else 0.0 for row in sum(groups, [])]
    tokens = [(k, float(logp)) for k, row in enumerate(first) for logp in row.logprobs]
    batch = dataclasses.replace(
        verdicts, means=like.new_tensor([float(mean) for mean in means]).view_as(like),
        old_logp=like.new_tensor([logp for _, logp in tokens]),
        row=like.new_tensor([k for k, _ in tokens]).long())
    loss(batch.old_logp.clone().requires_grad_(), batch, advantage(batch))
    return batch.asked_for_means
