"""The sampler's two forward passes, and the proof that they are the model's own.

A model is borrowed for sampling: put in eval mode, with our attention in place of its
own, under a lock, so that threads take turns. ``prompt_logits`` computes prompts and
``next_logits`` one more token of each row.

transformers promises nothing about what else a layer does with its cache or around its
attention, so a family is not known to be right by its name. ``check_model`` compares
each model once with one plain pass of its own: no cache, its own attention. Lengths
matter too: beyond a window, a chunk or the length it was trained at first, a model may
compute something else. Each number in its configuration is taken for such a limit, and
one that sampling can come past is crossed in the check.

Left out: other uses of a model by another thread while it is borrowed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from rlreason.policy.fused_layers import fused_layers
from rlreason.policy.fused_norms import fused_norms
from rlreason.policy.kv_cache import (
    ATTENTION_NAME,
    AttentionError,
    CohortStore,
    DecodeCache,
    OpeningCache,
    PromptCache,
)
from rlreason.policy.limits import below, limits_of, rounding, telling_length
from rlreason.policy.load import Policy, PolicyError, vocabulary_rows
from rlreason.policy.logprobs import causal_of, output_layer_at
from rlreason.policy.memory import out_of_memory
from rlreason.policy.slots import SlotCache, SlotStore

NOT_FINITE = (
    "The model's outputs are not finite, so there is no distribution to sample from. "
    "Training has diverged (lower the learning rate), or the weights overflow in half "
    "precision (load with dtype='float32')."
)

_STEPS = 4  # tokens that the check decodes after a prompt
_SHORTEST = 16  # tokens of the plain pass, where the model has room for as many
_LOWEST_LOGPROB = -30.0  # what is less likely than that is not drawn


@dataclass(frozen=True)
class Checked:
    """What the check has seen of a model.

    Attributes:
        crossed: Sequences longer than this were compared.
        token_bytes: Keys and values of one token in all layers.
        heads: Query heads of a layer.
        logits: How many there are for a token.
    """

    crossed: int
    token_bytes: int
    heads: int
    logits: int


Store = CohortStore | SlotStore

# A lock cannot be copied with its model, so both are kept beside it.
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_checked: WeakKeyDictionary[nn.Module, dict[tuple, Checked]] = WeakKeyDictionary()
_registry = threading.Lock()


@contextmanager
def borrowed(model: PreTrainedModel, store: type[Store]) -> Iterator[None]:
    """Put the model in eval mode with our attention, and back afterwards.

    Another thread that wants to borrow it waits.

    Args:
        store: Where its keys and values will be kept; what is fused depends on it.
    """
    fused = fused_norms if store is SlotStore else fused_layers
    device = model.device
    # Kernels of Triton and graphs go to the current GPU, not to that of the tensors
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with (
        _turn(model),
        _evaluating(model),
        _our_attention(model),
        fused(model),
        current,
    ):
        yield


def prompt_logits(
    model: PreTrainedModel,
    store: Store,
    questions: slice | Tensor,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
) -> Tensor:
    """What follows each prompt, (g, V); keys and values go into the store.

    Args:
        model: Borrowed.
        store: Where they go.
        questions: Which of the store's questions they are.
        prompts: g lists of token ids, at most ``store.width`` long after the opening,
            which is computed with the first of them.
        pad_id: What to fill up with; nothing looks at it.
    """
    aligned = partial(_align_right, pad_id=pad_id, device=store.group.device)
    if store.opening and not store.openings:
        ids, positions, mask = aligned([prompts[0][: store.opening]])
        _last_logits(model, OpeningCache(store, mask), ids, positions, mask)
    rest = [prompt[store.opening :] for prompt in prompts]
    ids, positions, mask = aligned(rest, begin=store.opening)
    cache = PromptCache(store, questions, mask)
    return _last_logits(model, cache, ids, positions, mask)


def _last_logits(
    model: PreTrainedModel, cache: Cache, ids: Tensor, positions: Tensor, mask: Tensor
) -> Tensor:
    """What follows the last of ids (g, p), (g, V)."""
    return model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        rollout_cache=cache,
    ).logits[:, -1]


def next_logits(
    model: PreTrainedModel,
    cache: DecodeCache | SlotCache,
    ids: Tensor,
    positions: Tensor,
) -> Tensor:
    """What follows the newest token of each row, (R, V).

    Args:
        model: Borrowed.
        cache: Of all rows; the tokens are added to their stores.
        ids: The newest tokens, (R,).
        positions: Their places in their sequences, (R,).
    """
    logits = model(
        input_ids=ids[:, None],
        position_ids=positions[:, None],
        # A mask of four dimensions is passed on as it is; the cache knows better.
        attention_mask=ids.new_ones((1, 1, 1, 1), dtype=torch.bool),
        past_key_values=cache,
        use_cache=True,
        rollout_cache=cache,
    ).logits[:, -1]
    cache.advance()
    return logits


def check_model(policy: Policy, tokens: int, store: type[Store]) -> Checked:
    """Refuse a model that would be sampled wrongly in sequences of so many tokens.

    How it is sampled depends on where keys and values are kept, so each kind of store
    is checked for itself, and each number format and device.

    Costs 16 forward passes, the longest twice as long as the largest number of the
    configuration that is below ``tokens``; nothing when that was checked before.

    Raises:
        PolicyError: The sampler does not compute what the model does.
        ValueError: The model's outputs are not finite.
    """
    limits = limits_of(policy.model.config)
    kind = store, policy.model.dtype, policy.model.device
    with _turn(policy.model):
        by_kind = _checked.setdefault(policy.model, {})
        known = by_kind.get(kind)
        if known is None or known.crossed < max(below(tokens, limits)):
            try:
                known = _compare(policy, tokens, limits, store)
            except AttentionError as error:
                raise PolicyError(
                    f"{policy.name!r} ({type(causal_of(policy.model)).__name__}) "
                    f"cannot be sampled up to {tokens} tokens: {error}. "
                    f"{_remedy(policy, tokens, limits, store)}"
                ) from error
            by_kind[kind] = known
    return known


def _remedy(policy: Policy, tokens: int, limits: set[int], store: type[Store]) -> str:
    """What to do with a model that is not sampled as it should up to so many tokens."""
    for limit in sorted(below(tokens, limits), reverse=True):
        if limit < _SHORTEST:
            break
        try:
            _compare(policy, limit, limits, store)
        except AttentionError:
            continue
        return (
            f"Up to {limit} tokens it can: lower max_new_tokens or use shorter prompts."
        )
    return "Use a decoder such as Llama, GPT-2 or Qwen."


def _compare(
    policy: Policy, tokens: int, limits: set[int], store: type[Store]
) -> Checked:
    """Compare the sampler's passes with a plain one, past all limits below ``tokens``.

    Raises:
        AttentionError: They differ, or one of them cannot be done.
        ValueError: The model's outputs are not finite.
    """
    model = policy.model
    crossed = max(below(tokens, limits))
    length = telling_length(tokens, limits, least=_SHORTEST)
    steps = min(_STEPS, length - 1)
    last = length - steps
    near = min(last, max(crossed + _STEPS + 2, _SHORTEST - _STEPS))
    # Alone and short; across the limit, beside a shorter one; far past the limit
    cohorts = [[8], [near - 8, near - 11], [last]]
    cohorts = [[min(max(n, 1), last) for n in starts] for starts in cohorts]
    ids = _some_tokens(policy, length, far=(length - crossed) // 2)
    gaps = []
    with torch.no_grad(), _evaluating(model):
        with _named("its own forward pass fails"):
            expected = _plain(model, ids, cohorts, steps)
        if any(bool(plain.isnan().any()) for plain in expected):
            raise ValueError(NOT_FINITE)
        with (
            _named("its layers do not keep a plain cache of keys and values"),
            borrowed(model, store),
        ):
            for starts, plain in zip(cohorts, expected, strict=True):
                found, filled = _sampled(policy, ids, starts, steps, store)
                spread = plain - plain.mean(-1, keepdim=True)
                gap = (found - plain).norm(dim=-1) / spread.norm(dim=-1)  # (S+1, R)
                gaps.append(gap)
            token_bytes, heads = filled.token_bytes, filled.heads
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if layers is not None and filled.layers != layers:
        raise AttentionError(
            f"{filled.layers} of its {layers} layers keep a plain cache of keys and "
            "values"
        )
    gap, tolerance = _judged(torch.cat(gaps, dim=1), policy)
    if not gap <= tolerance:
        raise AttentionError(
            "its log-probabilities are not those of its own forward pass (off by "
            f"{gap:.1%} of their spread at {length} tokens), so its attention or its "
            "cache does something that the sampler does not know"
        )
    return Checked(crossed, token_bytes, heads, logits=expected[0].shape[-1])


@contextmanager
def _named(fault: str) -> Iterator[None]:
    """Turn whatever the code of an unknown family raises into one line."""
    try:
        yield
    except (AttentionError, MemoryError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:80]
        raise AttentionError(f"{fault} ({type(error).__name__}: {said})") from error


def _judged(gaps: Tensor, policy: Policy) -> tuple[float, float]:
    """How far apart the distributions are, and how far rounding may bring them.

    The worst row counts, and in full precision its worst place. In half precision it
    is the row's median: where two experts are nearly alike, rounding may choose the
    other one now and then.
    """
    tolerance = rounding(policy.model.dtype)
    if policy.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        tolerance = max(tolerance, 2.0**-5)
    rows = gaps.amax(0) if tolerance < 1e-3 else gaps.median(0).values
    return float(rows.max()), tolerance


def _some_tokens(policy: Policy, length: int, far: int) -> Tensor:
    """(L,): any tokens but the pad, from which some models count positions.

    What goes beyond a short prompt is one token again and again among the first
    ``far``: who does not look so far back sees another mixture, in however many tokens.
    """
    rows = vocabulary_rows(policy.model)
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(rows, (length,), generator=generator)
    ids[_SHORTEST:far] = ids[0]
    ids[ids == policy.pad_id] = (policy.pad_id + 1) % rows
    return ids.to(policy.device)


def _plain(
    model: PreTrainedModel, ids: Tensor, cohorts: list[list[int]], steps: int
) -> list[Tensor]:
    """Log-probabilities as ``_sampled`` has them, by one pass of the model's own."""
    places = [
        torch.tensor(starts, device=ids.device) - 1 + step
        for starts in cohorts
        for step in range(steps + 1)
    ]
    columns = torch.cat(places)
    with output_layer_at(model, columns):
        logits = model(input_ids=ids[None], use_cache=False).logits
    sizes = [(steps + 1) * len(starts) for starts in cohorts]
    parts = _comparable(logits[0]).split(sizes)
    return [part.unflatten(0, (steps + 1, -1)) for part in parts]


def _sampled(
    policy: Policy, ids: Tensor, starts: list[int], steps: int, kind: type[Store]
) -> tuple[Tensor, Store]:
    """Log-probabilities by the sampler's passes: (S + 1, R, V), S being the steps.

    Row r begins with the first ``starts[r]`` of the tokens and goes on with the next.
    """
    lengths = torch.tensor(starts, device=ids.device)
    rows = torch.arange(len(starts), device=ids.device)
    shared = {}
    if kind is CohortStore and len(starts) > 1:  # half of the shortest
        shared = {"opening": min(starts) // 2}
    width = max(starts) - shared.get("opening", 0)
    pads = max(starts) - lengths
    store = kind(pads, width, rows, max_columns=max(steps, 1), **shared)
    prompts = [ids[:n].tolist() for n in starts]
    every = slice(0, len(starts))
    model, pad_id = policy.model, policy.pad_id
    logits = [prompt_logits(model, store, every, prompts, pad_id=pad_id)]
    for step in range(steps):
        places = lengths + step
        logits.append(next_logits(model, store.decoding(), ids[places], places))
    return _comparable(torch.stack(logits)), store


def _comparable(logits: Tensor) -> Tensor:
    """Log-probabilities, alike where a token is never drawn."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).clamp(min=_LOWEST_LOGPROB)


def _align_right(
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    device: torch.device,
    begin: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad prompts at the left, so that the last tokens stand in one column.

    Args:
        begin: B, the tokens that stand before all of them, and that all see.

    Returns:
        Ids and positions (G, P), and where attention is allowed (G, 1, P, B + P): to
        earlier tokens of the prompt. Padding sees itself, so that no row of the
        softmax is empty, which would be NaN on some devices.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    pads = torch.tensor([width - len(prompt) for prompt in prompts])[:, None]
    column = torch.arange(width)
    positions = begin + (column - pads).clamp(min=0)
    causal = column[:, None] >= column
    real = column >= pads  # (G, P)
    mask = (causal & real[:, None, :]) | torch.eye(width, dtype=torch.bool)
    before = torch.ones((*ids.shape, begin), dtype=torch.bool)
    mask = torch.cat([before, mask], dim=2)[:, None]
    return ids.to(device), positions.to(device), mask.to(device)


def _turn(model: PreTrainedModel) -> threading.RLock:
    """The lock of a model, the same with adapters around it and without."""
    with _registry:
        return _locks.setdefault(causal_of(model), threading.RLock())


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model in eval mode, and each of its modules back afterwards."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


@contextmanager
def _our_attention(model: PreTrainedModel) -> Iterator[None]:
    """Put our attention in place of the model's own for a while.

    Raises:
        AttentionError: The model does not use transformers' interface for it.
    """
    config = model.config
    before = {"": config._attn_implementation}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None and part._attn_implementation is not None:
            before[name] = part._attn_implementation
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        if config._attn_implementation != ATTENTION_NAME:
            raise AttentionError("its attention cannot be replaced")
        yield
    finally:
        model.set_attn_implementation(before)
