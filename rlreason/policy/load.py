"""Loading a policy: a causal language model with its tokenizer.

``load_policy`` takes the weights that come with the package (``"nano"``,
``"nano-xs"``), the name of a policy that ``rlreason models import`` put aside, a local
folder, the name of a model on the hub, or a GGUF file, whose quantised weights are
expanded to ordinary ones. Weights are read from safetensors or
GGUF alone, never from pickles, and code that a repository brings along runs only if
``trust_remote_code=True`` says so. A policy is what it says: weights that are missing,
or that the architecture has no place for, are refused and not made up or dropped.

Text is text: a question that spells ``</s>`` is read as the letters of it. Special
tokens get into a sequence as ids alone, the way BOS and EOS do here.

Dropout is switched off for good, not just in eval mode: policy-gradient methods need
the probabilities of training to equal those of sampling.
"""

from __future__ import annotations

import copy
import os
import struct
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import gguf
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from rlreason.policy.progress import is_watched

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLED = ("nano", "nano-xs")
DTYPES = ("float32", "bfloat16", "float16", "float64")
CANNOT_LOAD = (OSError, ValueError, RuntimeError, ImportError)

# What wraps a model puts before the names of its weights, and how to save without it.
_WRAPPERS = {
    "_orig_mod.": "torch.compile: `model._orig_mod.save_pretrained(folder)`",
    "module.": "data parallel training: `model.module.save_pretrained(folder)`",
    "pretrained_model.": "TRL's value head: "
    "`model.pretrained_model.save_pretrained(folder)`",
    "base_model.model.": "peft: `model.merge_and_unload().save_pretrained(folder)`",
}
# Tables that old versions saved, and that are computed anew.
_OLD_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
# Encoding sets a switch of the tokenizer, which threads may share; while transformers
# loads a model, its classes are changed for the whole process.
_encoding, _loading = threading.Lock(), threading.Lock()


class PolicyError(ValueError):
    """A policy cannot be used. The message says why, and what to do about it."""


@dataclass(frozen=True)
class Policy:
    """A language model that acts: it answers questions token by token.

    Attributes:
        model: A causal language model of transformers, on ``device``.
        tokenizer: Its tokenizer. Left as it was loaded; no pad token is added.
        device: Where the weights are.
        name: What ``load_policy`` was asked for.
        eos_id: The token that ends a response in training.
        pad_id: The token that fills up batches. May equal ``eos_id``: masks are made
            from lengths, so that padding is never told by its id.
        bos_id: The token that opens each prompt, or None where the tokenizer adds none.
        more_eos_ids: Other tokens that end an answer when they are drawn, such as the
            end of a turn of a chat model.
        more_bos_ids: What stands between ``bos_id`` and the text of a prompt, where the
            tokenizer opens it by several tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    name: str
    eos_id: int
    pad_id: int
    bos_id: int | None
    more_eos_ids: tuple[int, ...] = ()
    more_bos_ids: tuple[int, ...] = ()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer, ``eos_id`` first."""
        return tuple(dict.fromkeys((self.eos_id, *self.more_eos_ids)))

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, opened once as the tokenizer opens texts.

        No part of the text becomes a special token, whatever it spells.

        Raises:
            ValueError: The text is not Unicode, or has a token of the tokenizer that
                the model has no embedding for.
        """
        ids = self._encode(text)
        if self.bos_id is None:
            return ids
        opening = [self.bos_id, *self.more_bos_ids]
        return ids if ids[: len(opening)] == opening else opening + ids

    def encode_response(self, prompt: str, response: str) -> list[int]:
        """Token ids of a response to a prompt, with EOS at the end.

        Prompt and response are tokenised together, as the tokenizer would see them in
        running text, provided that the prompt's own tokens stand unchanged in front.
        Where a token would straddle the boundary, the response is tokenised alone, so
        that ``encode_prompt(prompt)`` is always what precedes it.
        """
        start = self.encode_prompt(prompt)
        whole = self.encode_prompt(prompt + response)
        if whole[: len(start)] == start:
            ids = whole[len(start) :]
        else:
            ids = self._encode(response)
        return [*ids, self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """Texts of many sequences of token ids, special tokens left out."""
        if not batch:  # a tokenizer takes it for one sequence without tokens
            return []
        return self.tokenizer.batch_decode(
            [list(ids) for ids in batch],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def clone(self) -> Policy:
        """The same policy with weights of its own, e.g. to keep as a reference."""
        return replace(self, model=copy.deepcopy(self.model))

    def without_eos(self, ids: Sequence[int]) -> Sequence[int]:
        """What an answer says: its tokens without the EOS that may end it."""
        return ids[:-1] if ids and ids[-1] in self.eos_ids else ids

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"half of a surrogate pair, {text[error.start]!r}, stands at character "
                f"{error.start} of the text: it is no Unicode. Read the data as UTF-8, "
                "or replace the character."
            ) from None
        with _encoding:
            ids = self._text_ids(text)
        _check_rows(self.model, self.tokenizer, max(ids, default=0), name=self.name)
        return ids

    def _text_ids(self, text: str) -> list[int]:
        """Token ids of a text, none of them special."""
        encoding = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True
        )
        ids = list(encoding.input_ids)
        found = self._special_ids.intersection(ids)
        if not found:
            return ids
        # Some vocabularies hold their special tokens as words: a cut behind the first
        # letter hides them. One of a single letter, such as a pad token "!", is text.
        for spelling in self.tokenizer.convert_ids_to_tokens(sorted(found)):
            if len(spelling) > 1 and spelling in text:
                first, *rest = text.split(spelling)
                pieces = [first, *(spelling[1:] + part for part in rest)]
                pieces[:-1] = [piece + spelling[0] for piece in pieces[:-1]]
                return [i for piece in pieces for i in self._text_ids(piece)]
        return ids

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """Ids that no text may have. That of unknown words is for text."""
        added = self.tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special}
        special.update(self.tokenizer.all_special_ids)
        special.update(i for i in self.eos_ids if i in added)
        return frozenset(special - {self.tokenizer.unk_token_id})


def load_policy(
    name_or_path: str | Path = "nano",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> Policy:
    """Load a policy, ready for sampling and training.

    Args:
        name_or_path: ``"nano"`` or ``"nano-xs"`` (bundled), an imported policy's name,
            a folder with ``config.json``, weights and tokenizer, a GGUF file (also
            ``"owner/repository/file.gguf"`` on the hub), or a name on the hub.
        device: Where to put it. By default the GPU if there is one.
        dtype: Number format of the weights, e.g. ``"bfloat16"``; ``"auto"``: as they
            are stored. By default float32, and for models other than the bundled ones
            bfloat16 on a GPU.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        PolicyError: If it is not found, incomplete, or stored as pickles alone; or the
            number format is unknown.
    """
    name = str(name_or_path)
    source, options = locate(name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        small = device.type != "cuda" or name in BUNDLED
        dtype = torch.float32 if small else torch.bfloat16
    elif isinstance(dtype, str) and dtype != "auto":
        if dtype not in DTYPES:
            raise PolicyError(
                f"dtype={dtype!r} of {name!r} is unknown; use auto, {', '.join(DTYPES)}"
            )
        dtype = getattr(torch, dtype)
    options["trust_remote_code"] = trust_remote_code
    try:
        with _loading, _quiet_unless_watched():
            tokenizer = _load_tokenizer(source, options)
            if "gguf_file" not in options:
                options["use_safetensors"] = True
            elif hasattr(transformers, "GgufConfig"):  # which could keep them packed
                expand = transformers.GgufConfig(dequantize=True)
                options["quantization_config"] = expand
            model, found = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **options,
            )
    except (*CANNOT_LOAD, SafetensorError, struct.error) as error:
        raise PolicyError(_diagnose(name, error)) from error
    _check_weights(name, found)
    if "gguf_file" in options:
        _check_gguf(name, cached_file(source, options["gguf_file"]), model)
        _tell_ends(tokenizer, model)
        if getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)  # it was expanded
    return make_policy(model.to(device), tokenizer, name=name)


def make_policy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str
) -> Policy:
    """Build a policy from a model and a tokenizer that are already in memory.

    The model is put in eval mode and its dropout is switched off. An answer ends with
    the tokenizer's EOS or with another token by which the model's generation
    configuration ends a text.

    Raises:
        PolicyError: If the tokenizer has no end-of-sequence token, or puts a token
            before or behind a text that the model has no embedding for.
    """
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise PolicyError(
            f"The tokenizer of {name!r} has no end-of-sequence token, so an answer "
            "could not end. Set `eos_token` in its tokenizer_config.json."
        )
    opening = _opening(tokenizer)
    _check_rows(model, tokenizer, max(eos_id, *opening, 0), name=name)
    pad_id = tokenizer.pad_token_id
    if pad_id is None or pad_id >= vocabulary_rows(model):
        pad_id = eos_id  # what fills a batch up is looked at by nobody
    disable_dropout(model)
    return Policy(
        model=model.eval(),
        tokenizer=tokenizer,
        device=next(model.parameters()).device,
        name=name,
        eos_id=eos_id,
        pad_id=pad_id,
        bos_id=opening[0] if opening else None,
        more_eos_ids=_more_ends(model, tokenizer),
        more_bos_ids=opening[1:],
    )


def vocabulary_rows(model: PreTrainedModel) -> int:
    """How many tokens the model knows: rows of its input embedding."""
    return model.get_input_embeddings().weight.shape[0]


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens the model can read, or None if it does not say."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return room if room is not None and room > 0 else None


def _check_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_id: int,
    *,
    name: str,
) -> None:
    """Refuse a token that the model has no embedding for."""
    rows = vocabulary_rows(model)
    if token_id >= rows:
        token = tokenizer.convert_ids_to_tokens(token_id)
        raise PolicyError(
            f"The token {token!r} of {name!r} has the id {token_id}, but the model's "
            f"embedding has {rows} rows. Load the tokenizer that belongs to the "
            f"weights, or save the model again after `model.resize_token_embeddings"
            f"({token_id + 1})`."
        )


def _more_ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Tokens that end a text by the generation configuration.

    A list of them was written by somebody who knew the model. A single one may be the
    default of its architecture, to which this tokenizer may give any meaning, so it
    counts only where the tokenizer says that it is special.
    """
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    if ends is None:
        return ()
    if isinstance(ends, int):
        added = tokenizer.added_tokens_decoder
        ends = [ends] if ends in added and added[ends].special else []
    own = tokenizer.eos_token_id
    rows = vocabulary_rows(model)
    return tuple(i for i in dict.fromkeys(ends) if i != own and 0 <= i < rows)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the model to zero, in training mode too.

    Also those that a module keeps as a number, by a name such as ``attention_dropout``
    or ``layerdrop``.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _opening(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before a text of its own accord, as a rule BOS."""
    text = tokenizer("1", add_special_tokens=False).input_ids
    if not text:  # then what is before and behind it cannot be told apart
        return ()
    return tuple(takewhile(lambda i: i not in text, tokenizer("1").input_ids))


def _tell_ends(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Let a GGUF's tokenizer end a text as the file says.

    The configuration has it from the file. Some versions of transformers (5.17) take
    the tokenizer's from elsewhere.
    """
    for role in ("eos", "pad"):
        token_id = getattr(model.config, f"{role}_token_id", None)
        if isinstance(token_id, int) and 0 <= token_id < len(tokenizer):
            token = tokenizer.convert_ids_to_tokens(token_id)
            setattr(tokenizer, f"{role}_token", token)


def models_folder() -> Path:
    """Return the folder of imported policies: ``RLREASON_MODELS``, else a cache's."""
    return Path(os.environ.get("RLREASON_MODELS") or "~/.cache/rlreason").expanduser()


def policy_path(name: str) -> Path:
    """The file or folder that a name means; one that is not there may be the hub's."""
    if name in BUNDLED:
        return ASSETS / name
    path = Path(os.path.expanduser(name))  # of a user there is not, as it stands
    imported = models_folder() / name
    return imported if name == path.name and imported.is_dir() else path


def lasting_name(name: str) -> str:
    """A policy's name as another process takes it: a path from whichever folder."""
    path = Path(os.path.expanduser(name))
    is_path = policy_path(name) == path and path.exists()
    return str(path.absolute()) if is_path else name


def locate(name: str) -> tuple[str, dict[str, object]]:
    """Where transformers shall load from, and with which options.

    Raises:
        PolicyError: Nothing of that name can be loaded from this machine, and it is no
            name of the hub's.
    """
    path = policy_path(name)
    if path.suffix == ".gguf":
        if path.is_file():
            return str(path.parent), {"gguf_file": path.name}
        if name.count("/") == 2 and not name.startswith((".", "/", "~")):
            repository, _, file = name.rpartition("/")
            return repository, {"gguf_file": file}
        raise PolicyError(f"There is no GGUF file {name!r}. Check the path.")
    if path.is_dir():
        _check_folder(path, name)
        return str(path), {"local_files_only": True}
    if path.is_file():
        raise PolicyError(
            f"{name!r} is a file: give the folder that it lies in, or a .gguf file."
        )
    if name in BUNDLED:
        raise PolicyError(
            f"The bundled weights of {name!r} are missing from {path.parent.name}/. "
            "Make them with `rlreason train nano`, or install the package again."
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise PolicyError(f"There is no folder {name!r}. Check the path.")
    return name, {}


def _load_tokenizer(source: str, options: dict[str, object]) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved, not the one usual for the architecture.

    For some architectures ``AutoTokenizer`` builds their own class from the vocabulary
    even where it is said that its tokenizer is of no special class, and then
    splits text in other places than the model was trained with.
    """
    if "gguf_file" not in options:
        said = get_tokenizer_config(source, **options).get("tokenizer_class")
        if said in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return PreTrainedTokenizerFast.from_pretrained(source, **options)
    return AutoTokenizer.from_pretrained(source, **options)


@contextmanager
def _quiet_unless_watched() -> Iterator[None]:
    """Hold back transformers' own progress bars where nobody watches.

    And its report of the weights, which is an error here.
    """
    silence = transformers_logging.is_progress_bar_enabled() and not is_watched()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    if silence:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if silence:
            transformers_logging.enable_progress_bar()


def _check_folder(path: Path, name: str) -> None:
    """Refuse a folder that cannot be loaded, with the reason."""
    if not (path / "config.json").is_file():
        raise PolicyError(
            f"The folder {name!r} has no config.json. A policy folder holds what "
            "`save_pretrained` of model and tokenizer writes: config.json, "
            "model.safetensors, tokenizer.json, tokenizer_config.json."
        )
    if not any(path.glob("*.safetensors")):
        pickles = sorted(file.name for file in path.glob("*.bin"))
        found = f" It has {', '.join(pickles)}, which is a pickle." if pickles else ""
        raise PolicyError(
            f"The folder {name!r} has no *.safetensors file.{found} Weights are read "
            "from safetensors only; write them with "
            "`model.save_pretrained(folder, safe_serialization=True)`."
        )


def _check_weights(name: str, found: dict[str, Collection]) -> None:
    """Refuse weights that are not those of the model, as transformers found them."""
    unexpected = [k for k in found["unexpected_keys"] if not k.endswith(_OLD_BUFFERS)]
    for prefix, remedy in _WRAPPERS.items():
        if any(key.startswith(prefix) for key in unexpected):
            raise PolicyError(
                f"The weights of {name!r} are named {prefix}..., as they are where a "
                "model is saved together with what wraps it. Save the model alone; "
                f"after {remedy}."
            )
    faults = {
        "are missing": found["missing_keys"],
        "have no place in the model": unexpected,
        "have another shape": [key for key, *_ in found["mismatched_keys"]],
    }
    said = [
        f"{len(keys)} {fault} ({', '.join(sorted(keys)[:3])}"
        f"{', ...' if len(keys) > 3 else ''})"
        for fault, keys in faults.items()
        if keys
    ]
    if said:
        raise PolicyError(
            f"The weights of {name!r} are not those of its config.json: "
            f"{'; '.join(said)}. Save the whole model again with `save_pretrained`, or "
            "mend config.json, e.g. `tie_word_embeddings` if lm_head is missing."
        )


def _check_gguf(name: str, file: str, model: PreTrainedModel) -> None:
    """Refuse a GGUF file of which transformers has left something out."""
    reader = gguf.GGUFReader(file)
    if fault := _stretched(reader) or _without_place(reader, model):
        raise PolicyError(
            f"The GGUF file {name!r} {fault}, which transformers leaves out. Take the "
            "model from where it has safetensors weights, e.g. a folder or the hub."
        )


def _stretched(reader: gguf.GGUFReader) -> str | None:
    """Say it where positions turn a head's dimensions otherwise than by one base."""
    # By their names without that of the architecture
    named = {key.partition(".")[2]: field for key, field in reader.fields.items()}
    said = {k: x.contents() for k, x in named.items() if k.startswith("rope.")}
    factors = (said.get(key) for key in ("rope.scaling.factor", "rope.scale_linear"))
    usual = "none" if {0, 1, None}.issuperset(factors) else "linear"
    kinds = {said.get("rope.scaling.type", usual)} - {"none"}
    kinds |= {t.name for t in reader.tensors if t.name.startswith("rope_")}
    return f"stretches positions (rope: {', '.join(sorted(kinds))})" if kinds else None


def _without_place(reader: gguf.GGUFReader, model: PreTrainedModel) -> str | None:
    """Say it where a file holds more than the weights of the model made of it."""
    own_output = ("output.weight",) if model.config.tie_word_embeddings else ()
    held = sum(int(t.n_elements) for t in reader.tensors if t.name not in own_output)
    own = model.state_dict().values()  # what is tied has two names
    placed = sum(weight.numel() for weight in {w.data_ptr(): w for w in own}.values())
    if held <= placed:
        return None
    return f"has {held - placed:,} weights without a place in {type(model).__name__}"


def _diagnose(name: str, error: Exception) -> str:
    """Say in one line what went wrong, and what usually mends it."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return (
        f"Cannot load the policy {name!r}: {reason} "
        "-- It may be a bundled policy (nano, nano-xs), a folder, a .gguf file, a "
        f"model on the hub, or what `rlreason models import {name}` brings here. For "
        "a hub model: check the spelling and the network, unset HF_HUB_OFFLINE, run "
        "`hf auth login` if it is gated, and make sure that it has safetensors weights."
    )
