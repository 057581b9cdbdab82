"""The demo, whole, on a random model that is small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halfbyte import demo
from halfbyte.cli.demo import command
from halfbyte.errors import OutputError
from halfbyte.progress import Silent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        bos_token_id=256,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>")])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "<s>{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SAMPLES", 8)
    monkeypatch.setattr(demo, "SEQ_LEN", 32)
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 5)


def test_the_demo_tells_what_it_did_and_can_be_run_again(tiny: Path, tmp_path: Path) -> None:
    told: list[str] = []
    record = demo.run(tmp_path / "d", model=str(tiny), tell=told.append, reporter=Silent())
    assert record.verify.passed
    assert set(record.comparisons) == {"gptq", "rtn"}
    assert record.calibration is not None
    assert (record.calibration.spec, record.calibration.tokens) == ("self", 8 * 32)
    assert json.loads((tmp_path / "d" / "demo.json").read_text())["bits_per_weight"] == record.bits_per_weight
    story = "\n".join(told)
    assert [f"\n{n}. " in f"\n{story}" for n in range(1, 7)] == [True] * 6
    assert "14 weight matrices go from 16 bits to 4." in story
    assert f"{record.comparisons['rtn'].metrics['kl_mean']:.4f} ±" in story

    again: list[str] = []
    second = demo.run(tmp_path / "d", model=str(tiny), tell=again.append, reporter=Silent())
    assert sum("Removing" in line for line in again) == 2
    assert second.comparisons["gptq"].metrics == record.comparisons["gptq"].metrics


def test_json_is_all_there_is_on_stdout(tiny: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["--folder", str(tmp_path), "--model", str(tiny), "--json"])
    assert result.exception is None
    assert set(json.loads(result.stdout)["answers"]) == {"original", "gptq"}


def test_the_demo_removes_nothing_that_is_not_its_own(tiny: Path, tmp_path: Path) -> None:
    mine = tmp_path / "tiny-W4A16-g64-rtn"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not written by halfbyte"):
        demo.run(tmp_path, model=str(tiny), tell=lambda _: None, reporter=Silent())
    assert (mine / "notes.txt").read_text() == "mine"
