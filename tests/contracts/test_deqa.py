"""DeQA's expected level: by hand, from a real image-text model, and from a model that brings its own code."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from vmpo.errors import UserError
from vmpo.rewards import load_reward
from vmpo.rewards.deqa import ANSWER, LEVELS, QUESTION, expected_level

IMAGES = torch.rand(5, 3, 28, 28, generator=torch.Generator().manual_seed(3))
PROMPTS, METADATA = [""] * 5, [{}] * 5


def test_expected_level_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -60.0, -60.0, math.log(4)]])
    torch.testing.assert_close(expected_level(logits), torch.tensor([3.0, (5 * 3 + 4 * 1 + 1 * 4) / 8]))
    assert expected_level(torch.tensor([[0.0, -90, -90, -90, -90]])).item() == 5.0  # excellent
    assert list(LEVELS.items()) == [("excellent", 5), ("good", 4), ("fair", 3), ("poor", 2), ("bad", 1)]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LlavaForConditionalGeneration with random weights and a tokenizer of the words it needs, on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = dict.fromkeys(
        f"USER: ASSISTANT: {QUESTION} {ANSWER} {' '.join(LEVELS)}".replace("?", " ?").replace(":", " :").split()
    )
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "<image>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=vocabulary["<image>"], image_seq_length=4
    )
    folder = tmp_path_factory.mktemp("llava")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    template = (
        "{% for m in messages %}USER: {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT: "
    )
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def test_levels_are_read_from_a_real_image_text_model(llava: Path) -> None:
    """Against a computation of its own: the model's answer, one picture at a time, over all words of the tokenizer."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from vmpo.features.preprocessing import to_pil

    reward = load_reward("deqa", {"model": str(llava), "weights": "fp32", "batch": 2, "device": "cpu"})
    scores = reward(IMAGES, PROMPTS, METADATA)

    model, processor = LlavaForConditionalGeneration.from_pretrained(llava), AutoProcessor.from_pretrained(llava)
    wanted = []
    for picture in to_pil(IMAGES):
        text = f"USER: <image> {QUESTION} ASSISTANT: {ANSWER}"
        inputs = processor(text=text, images=picture, return_tensors="pt")
        probability = model(**inputs).logits[0, -1].softmax(-1)
        p = {word: probability[processor.tokenizer.convert_tokens_to_ids(word)].item() for word in LEVELS}
        wanted.append(sum(LEVELS[word] * p[word] for word in LEVELS) / sum(p.values()))
    torch.testing.assert_close(scores, torch.tensor(wanted), rtol=1e-5, atol=1e-5)
    assert scores.std() > 1e-3, "the pictures are told apart"

    fifth = load_reward("deqa", {"model": str(llava), "weights": "fp32", "scale": 5, "device": "cpu"})
    torch.testing.assert_close(fifth(IMAGES, PROMPTS, METADATA) * 5, scores, rtol=1e-5, atol=1e-5)
    assert (reward.range, fifth.range) == ("[1, 5]", "[0.2, 1]")
    broken = IMAGES.clone()
    broken[1, 0, 0, 0] = torch.nan
    assert reward(broken, PROMPTS, METADATA).isnan().tolist() == [False, True, False, False, False]


CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_scorer"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def score(self, pictures):
        assert not self.training
        red = [sum(picture.getdata(0)) / (255 * picture.width * picture.height) for picture in pictures]
        return (1 + 4 * torch.tensor(red)).to(self.dtype)
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a class that is in no library: its code lies beside it, as in the published one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "modeling_own.py").write_text(CODE)
    text = (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "own_scorer"')
    auto = '"auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},'
    (folder / "config.json").write_text(text.replace("{", "{" + auto, 1))
    return folder


def test_a_model_with_its_own_code_needs_consent(own_code: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be loaded: .*trust_remote_code=true") as error:
        load_reward("deqa", {"model": str(own_code)})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "modules").exists(), "nothing of it was taken in"
    options = {"model": str(own_code), "trust_remote_code": True, "weights": "fp32", "batch": 2, "device": "cpu"}
    scores = load_reward("deqa", options)(IMAGES, PROMPTS, METADATA)
    assert (tmp_path / "modules").exists()
    torch.testing.assert_close(scores, 1 + 4 * ((IMAGES[:, 0] * 255).round() / 255).mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    for model in ("zhiyuanyou/DeQA-Score-Mix3", str(tmp_path)):
        with pytest.raises(UserError, match=r"the DeQA model '.*' cannot be loaded: .*docs/remote-rewards.md") as error:
            load_reward("deqa", {"model": model})
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="weights='int3'"):
        load_reward("deqa", {"weights": "int3"})
    with pytest.raises(UserError, match="must be above 0"):
        load_reward("deqa", {"scale": 0})
