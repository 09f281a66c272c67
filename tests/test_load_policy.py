"""Policies from folders, the hub's names and GGUF files; tokens of prompts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, PROBLEMS, tiny_policy, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    GPT2Config,
    PreTrainedTokenizerFast,
)

from rlreason.policy import load
from rlreason.policy.load import Policy, PolicyError, load_policy, make_policy
from rlreason.policy.sampler import sample
from rlreason.tasks.prompts import format_prompt, format_response


@pytest.fixture
def folder(tmp_path):
    """A policy as ``save_pretrained`` writes it."""
    policy = tiny_policy()
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_comes_back_as_it_was_saved(tmp_path, kind):
    policy = tiny_policy(kind)
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path, device="cpu")
    assert (loaded.eos_id, loaded.pad_id, loaded.bos_id) == (2, 0, 1)
    assert loaded.name == str(tmp_path)
    assert not loaded.model.training
    # In architectures whose usual tokenizer splits elsewhere, too
    text = format_prompt(PROBLEMS[0])
    assert loaded.encode_prompt(text) == policy.encode_prompt(text)
    options = {"k": 2, "max_new_tokens": 8}
    assert sample(loaded, PROBLEMS, **options) == sample(policy, PROBLEMS, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_on_the_hub_splits_text_as_the_folder_does(tmp_path, kind, monkeypatch):
    """Of some architectures only the folder's tokenizer was the one that was saved."""
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / ("0" * 40)
    policy = tiny_policy(kind)
    policy.model.save_pretrained(snapshot)
    policy.tokenizer.save_pretrained(snapshot)
    (tmp_path / "models--me--tiny" / "refs").mkdir()
    (tmp_path / "models--me--tiny" / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = format_prompt(PROBLEMS[0])
    loaded = load_policy("me/tiny", device="cpu")
    assert loaded.encode_prompt(text) == policy.encode_prompt(text)


def test_weights_stored_in_half_precision_are_float32_on_a_cpu(folder):
    policy = tiny_policy()
    policy.model.half().save_pretrained(folder)
    assert load_policy(folder, device="cpu").model.dtype == torch.float32
    assert load_policy(folder, device="cpu", dtype="bfloat16").model.dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize("dtype", ["fp16", "nn", "int8"])
def test_an_unknown_number_format_is_an_error_that_names_the_known(folder, dtype):
    with pytest.raises(
        PolicyError, match=f"dtype='{dtype}'.*use auto, float32"
    ) as error:
        load_policy(folder, device="cpu", dtype=dtype)
    assert "\n" not in str(error.value)


def test_bundled_names_lead_to_the_assets(folder, monkeypatch):
    monkeypatch.setattr(load, "ASSETS", folder.parent)
    with pytest.raises(PolicyError, match="rlreason train nano"):
        load_policy("nano-xs")
    folder.rename(folder.parent / "nano")
    assert load_policy().name == "nano"


def write_gguf(path, model, words, *, quantised: bool, more=lambda writer: None):
    """Write a Llama model as llama.cpp would, with matrices of eight bits or whole.

    ``more`` writes what the file has beside that.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * (len(words) - 3))
    writer.add_token_merges(["A :"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        data = weight.float()
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp pairs neighbouring dimensions in its rotation
            heads = config.num_attention_heads
            data = data.view(heads, 2, -1, data.shape[1]).transpose(1, 2).flatten(0, 2)
        base, suffix = name.rsplit(".", 1)
        data, kind = data.numpy().copy(), None
        if quantised and data.ndim == 2 and data.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quantize(data, kind)
        name = f"{names.get_name(base)}.{suffix}"
        writer.add_tensor(name, data, raw_dtype=kind)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("quantised", "off"), [(False, 1e-4), (True, 0.5)])
def test_a_gguf_file_gives_the_same_policy(tmp_path, quantised, off):
    policy = tiny_policy()
    vocabulary = policy.tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.get)
    write_gguf(tmp_path / "tiny.gguf", policy.model, words, quantised=quantised)
    loaded = load_policy(tmp_path / "tiny.gguf", device="cpu")
    ids = torch.tensor([policy.encode_prompt(format_prompt(PROBLEMS[0]))])
    with torch.no_grad():
        gap = (loaded.model(ids).logits - policy.model(ids).logits).abs().max()
    assert gap < off
    assert loaded.eos_id == policy.eos_id
    text = format_prompt(PROBLEMS[0])
    assert loaded.decode(loaded.encode_prompt(text)) == text
    assert sample(loaded, PROBLEMS[:1], max_new_tokens=4)[0].tokens
    # It is an ordinary model now
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_policy(tmp_path / "saved", device="cpu")
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)
    assert again.encode_prompt(text) == loaded.encode_prompt(text)


def gguf_with(path, more) -> Policy:
    policy = tiny_policy()
    vocabulary = policy.tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.get)
    write_gguf(path, policy.model, words, quantised=False, more=more)
    return load_policy(path, device="cpu")


ONES = np.ones(32, dtype=np.float32)


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rope: yarn"),
        (lambda w: w.add_rope_scaling_factor(4.0), "rope: linear"),
        (lambda w: w.add_float32("llama.rope.scale_linear", 2.0), "rope: linear"),
        (lambda w: w.add_tensor("rope_freqs.weight", ONES[:4]), "rope: rope_freqs"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", ONES), "32 weights without a pl"),
        (lambda w: w.add_tensor("blk.0.other.weight", ONES), "32 weights without a p"),
    ],
)
def test_what_is_not_read_of_a_gguf_file_is_refused_in_one_line(tmp_path, more, fault):
    """It was left out, and the model computed something else."""
    path = tmp_path / "tiny.gguf"
    with pytest.raises(PolicyError, match=rf"tiny\.gguf.*{fault}.*safetens") as error:
        gguf_with(path, more)
    assert "\n" not in str(error.value)


def test_a_gguf_file_may_say_that_its_positions_are_not_stretched(tmp_path):
    def more(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1.0)

    assert gguf_with(tmp_path / "tiny.gguf", more).eos_id == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no folder"),
        ("nowhere.gguf", "no GGUF file"),
        ("somebody/model-that-is-not-here", "HF_HUB_OFFLINE"),
    ],
)
def test_what_is_not_there_is_named(name, message):
    with pytest.raises(PolicyError, match=message):
        load_policy(name)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(PolicyError, match=r"pytorch_model\.bin, which is a pickle"):
        load_policy(folder)


def test_a_folder_without_config_says_what_a_folder_holds(folder):
    (folder / "config.json").unlink()
    with pytest.raises(PolicyError, match=r"no config\.json"):
        load_policy(folder)


def test_damaged_weights_are_a_policy_error(folder):
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(PolicyError, match="Cannot load the policy"):
        load_policy(folder)


def changed_weights(folder, change) -> None:
    """Rewrite the weights of a folder under the names that ``change`` gives."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if ".1." not in k}, r"9 are missing"),
        (lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, "tie_word"),
        (lambda w: {**w, "v_head.weight": torch.ones(1)}, r"no place.*v_head\.weight"),
        (lambda w: {k: v[:-1].clone() for k, v in w.items()}, "another shape"),
    ],
    ids=["layer", "output layer", "value head", "shape"],
)
def test_weights_that_are_not_the_models_are_refused(folder, change, message):
    changed_weights(folder, change)
    with pytest.raises(PolicyError, match=message) as error:
        load_policy(folder, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prefix", "remedy"),
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "model.module.save"),
        ("pretrained_model.", "value head"),
        ("base_model.model.", "merge_and_unload"),
    ],
)
def test_a_wrapper_in_the_names_of_weights_is_named_with_its_remedy(
    folder, prefix, remedy
):
    changed_weights(folder, lambda w: {prefix + k: v for k, v in w.items()})
    with pytest.raises(PolicyError, match=f"{prefix}.*{remedy}"):
        load_policy(folder, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_output_layer_is_not_missing(tmp_path, kind):
    policy = tiny_policy(kind)
    config = policy.model.config
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_policy(tmp_path, device="cpu").model
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("ends", "more"),
    [
        ([2, 0, 7], (0, 7)),  # a list was written by somebody
        ([0], (0,)),
        (0, (0,)),  # a special token of this tokenizer
        (7, ()),  # the default of an architecture that is an ordinary token here
        (None, ()),
    ],
)
def test_eos_ids_are_those_of_the_generation_configuration(folder, ends, more):
    policy = tiny_policy()
    policy.model.generation_config.eos_token_id = ends
    policy.model.save_pretrained(folder)
    loaded = load_policy(folder, device="cpu")
    assert loaded.eos_ids == (2, *more)
    assert loaded.eos_id == loaded.encode_response("a", "b")[-1] == 2


def test_an_eos_without_an_embedding_is_refused_by_name():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    with pytest.raises(PolicyError, match=r"<\|end\|>.*mine.*id 260.*260 rows"):
        make_policy(tiny_policy().model, tokenizer, name="mine")


def test_text_with_a_token_beyond_the_embedding_is_refused_by_name():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["pens"])
    policy = make_policy(tiny_policy().model, tokenizer, name="mine")
    assert policy.decode(policy.encode_prompt("a pen")) == "a pen"
    with pytest.raises(ValueError, match=r"'pens'.*resize_token_embeddings"):
        policy.encode_prompt("3 pens")


def words_tokenizer() -> PreTrainedTokenizerFast:
    """One whose vocabulary holds its special tokens as words, as SentencePiece has."""
    letters = [chr(i) for i in range(32, 127)]
    pieces = [(x, 0.0) for x in ("<unk>", "<s>", "</s>")] + [(x, -3.0) for x in letters]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def character_tokenizer() -> ByT5Tokenizer:
    """One that is written in Python."""
    return ByT5Tokenizer(extra_ids=0)


@pytest.mark.parametrize(
    "tokenizer", [tiny_tokenizer, words_tokenizer, character_tokenizer]
)
def test_special_tokens_in_text_are_text(tokenizer):
    tokenizer = tokenizer()
    policy = make_policy(tiny_policy().model, tokenizer, name="mine")
    eos = tokenizer.eos_token
    text = f"Say {eos}{eos} or <s>, {eos[0]}{eos}{eos[1:]}; {eos}"
    ids = policy.encode_prompt(text)
    if policy.bos_id is not None:
        assert ids.pop(0) == policy.bos_id
    assert not set(ids) & {tokenizer.bos_token_id, *policy.eos_ids}
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
    response = policy.encode_response(text, text)
    assert response.count(policy.eos_id) == 1
    assert response[-1] == policy.eos_id
    # The wrong version
    assert policy.eos_id in tokenizer(text, add_special_tokens=False).input_ids


def test_a_special_token_of_one_letter_is_text():
    tokenizer = tiny_tokenizer(pad=False)
    tokenizer.pad_token = "!"
    policy = make_policy(tiny_policy().model, tokenizer, name="mine")
    assert tokenizer.pad_token_id in policy.encode_prompt("Hello!")


def test_half_of_a_surrogate_pair_is_one_clear_error():
    with pytest.raises(ValueError, match=r"'\\ud83d'.*character 3"):
        tiny_policy().encode_prompt("ab \ud83d")


@pytest.mark.parametrize("bos", [True, False])
def test_p11_a_prompt_has_exactly_one_bos_or_none(bos):
    policy = tiny_policy(bos=bos)
    ids = policy.encode_prompt("Q: 2+2?\nA:")
    assert ids.count(1) == (1 if bos else 0)
    assert ids[:1] == [1] or not bos
    assert policy.encode_prompt("<s>Q: 2+2?\nA:").count(1) == ids.count(1)


@pytest.mark.parametrize("opening", [[0, 1], [1, 0], [0], [1, 1]])
def test_a_prompt_is_opened_by_all_that_its_tokenizer_opens_a_text_by(opening):
    tokenizer = tiny_tokenizer()
    names = {0: "<pad>", 1: "<s>"}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{' '.join(names[i] for i in opening)} $A </s>",
        special_tokens=[("<pad>", 0), ("<s>", 1), ("</s>", 2)],
    )
    policy = make_policy(tiny_policy().model, tokenizer, name="mine")
    text = format_prompt(PROBLEMS[0])
    assert [*policy.encode_prompt(text), 2] == tokenizer(text).input_ids
    ids = policy.encode_response(text, " 7")
    assert [*policy.encode_prompt(text), *ids] == tokenizer(text + " 7").input_ids


@pytest.mark.parametrize("pad", [True, False])
def test_p11_a_response_is_what_follows_the_prompt_and_ends_with_one_eos(pad):
    policy = tiny_policy(pad=pad)
    assert policy.pad_id == (0 if pad else policy.eos_id)
    prompt = format_prompt(PROBLEMS[0])
    response = format_response("3+4=<<3+4=7>>7\n#### 7")
    ids = policy.encode_response(prompt, response)
    assert ids[-1] == policy.eos_id
    assert policy.eos_id not in ids[:-1]
    assert policy.bos_id not in ids
    whole = policy.tokenizer(prompt + response).input_ids
    assert policy.encode_prompt(prompt) + ids[:-1] == whole
    assert policy.decode(ids) == response


def test_a_token_across_the_boundary_is_cut_there():
    policy = tiny_policy()
    colon = policy.encode_prompt(":")[1:]
    assert policy.encode_prompt("A:") == [1, 259]  # one token, by the merge
    assert policy.encode_response("A", ": 7")[:1] == colon
    assert policy.decode(policy.encode_response("A", ": 7")) == ": 7"


def test_p06_dropout_is_off_in_training_too():
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=260, resid_pdrop=0.5, attn_pdrop=0.5
    )
    model = AutoModelForCausalLM.from_config(config)
    policy = make_policy(model, tiny_tokenizer(), name="dropout")
    model.train()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert all(m.p == 0 for m in policy.model.modules() if isinstance(m, nn.Dropout))


def test_no_sequences_have_no_texts():
    policy = tiny_policy()
    assert policy.decode_batch([]) == []
    assert policy.decode_batch([[], [policy.eos_id]]) == ["", ""]
    assert policy.tokenizer.batch_decode([]) == [""]  # what would be wrong


def test_a_clone_has_weights_of_its_own():
    policy = tiny_policy()
    clone = policy.clone()
    before = sample(clone, PROBLEMS, max_new_tokens=4)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(-1)
    assert sample(clone, PROBLEMS, max_new_tokens=4) == before
    assert clone.tokenizer is policy.tokenizer


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with pytest.raises(PolicyError, match="eos_token"):
        make_policy(tiny_policy().model, bare, name="bare")


def test_two_threads_may_load_at_once():
    with ThreadPoolExecutor(2) as pool:
        loaded = list(pool.map(lambda _: load_policy("nano-xs"), range(4)))
    assert all(policy.name == "nano-xs" for policy in loaded)
    model = load_policy("nano-xs").model  # and afterwards
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
