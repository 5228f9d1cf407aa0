"""Small vision-language and text models with random weights, one of each class, as folders of the published layouts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    SmolVLMVisionConfig,
    T5Config,
)

SPECIAL = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
)
WORDS = (
    "user assistant : ? , . answer concisely what is going on in this image how many are there animal question a the "
    "two three four cat cats dog dogs bird birds snow beach bike chess riding playing contains on"
).split()
TEMPLATE = (
    "{% for message in messages %}user: {% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}assistant:"
)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def words(ends: bool = False, extra: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words in lower case. extra: tokens that its model's processor asks for by name."""
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*SPECIAL, *WORDS]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    template = "<s> $A </s>" if ends else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        additional_special_tokens=list(SPECIAL[4:]),
        padding_side="right",  # as many are published; a captioner has to see to it
        **({"extra_special_tokens": extra} if extra else {}),
    )


def ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def save(folder: Path, model: PreTrainedModel, processor: Any) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():  # initialised to depend little on the picture
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    tokenizer = words()
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **SMALL)
    text = LlamaConfig(vocab_size=len(tokenizer), **SMALL, **ids(tokenizer))
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=SPECIAL.index("<image>"), vision_feature_layer=-1
    )
    images = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return save(folder, LlavaForConditionalGeneration(config), processor)


def blip(folder: Path) -> Path:
    tokenizer = words(ends=True)
    text = {**SMALL, "vocab_size": len(tokenizer), "encoder_hidden_size": 32, "projection_dim": 32, **ids(tokenizer)}
    vision = {**SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 32}
    config = BlipConfig(text_config={**text, "sep_token_id": tokenizer.eos_token_id}, vision_config=vision)
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    return save(folder, BlipForConditionalGeneration(config), processor)


def opt(tokenizer: PreTrainedTokenizerFast) -> OPTConfig:
    return OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, **ids(tokenizer),
    )  # fmt: skip


def t5(tokenizer: PreTrainedTokenizerFast) -> T5Config:
    """An encoder and a decoder."""
    return T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        decoder_start_token_id=tokenizer.pad_token_id, **ids(tokenizer),
    )  # fmt: skip


def blip2(folder: Path, language: Callable[[PreTrainedTokenizerFast], PreTrainedConfig] = opt) -> Path:
    tokenizer = words()
    config = Blip2Config(
        vision_config=Blip2VisionConfig(image_size=32, patch_size=8, **SMALL),
        qformer_config=Blip2QFormerConfig(vocab_size=len(tokenizer), encoder_hidden_size=32, **SMALL),
        text_config=language(tokenizer),
        num_query_tokens=4,
        image_token_index=SPECIAL.index("<image>"),
    )
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    return save(folder, Blip2ForConditionalGeneration(config), Blip2Processor(images, tokenizer, num_query_tokens=4))


def blip2_t5(folder: Path) -> Path:
    return blip2(folder, t5)


def instructblip(folder: Path, language: Callable[[PreTrainedTokenizerFast], PreTrainedConfig] = opt) -> Path:
    tokenizer = words()
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(image_size=32, patch_size=8, **SMALL),
        qformer_config=InstructBlipQFormerConfig(vocab_size=len(tokenizer), encoder_hidden_size=32, **SMALL),
        text_config=language(tokenizer),
        num_query_tokens=4,
        image_token_index=SPECIAL.index("<image>"),
    )
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    processor = InstructBlipProcessor(images, tokenizer, tokenizer, num_query_tokens=4)
    return save(folder, InstructBlipForConditionalGeneration(config), processor)


def instructblip_t5(folder: Path) -> Path:
    return instructblip(folder, t5)


def smolvlm(folder: Path) -> Path:
    tokenizer = words()
    config = SmolVLMConfig(
        vision_config=SmolVLMVisionConfig(image_size=32, patch_size=8, **SMALL),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **SMALL, **ids(tokenizer)),
        image_token_id=SPECIAL.index("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    size = {"longest_edge": 32}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(size=size, max_image_size=size, do_image_splitting=False),
        tokenizer,
        SmolVLMVideoProcessor(size=size, max_image_size=size, num_frames=2, fps=1),
        image_seq_len=4,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return save(folder, SmolVLMForConditionalGeneration(config), processor)


def qwen2_vl(folder: Path) -> Path:
    tokenizer = words()
    config = Qwen2VLConfig(
        text_config={
            **SMALL, "vocab_size": len(tokenizer), "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            **ids(tokenizer),
        },
        vision_config={
            "depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 14,
        },
        image_token_id=SPECIAL.index("<|image_pad|>"),
        video_token_id=SPECIAL.index("<|video_pad|>"),
        vision_start_token_id=SPECIAL.index("<|vision_start|>"),
        vision_end_token_id=SPECIAL.index("<|vision_end|>"),
    )  # fmt: skip
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return save(folder, Qwen2VLForConditionalGeneration(config), processor)


def text_model(folder: Path, layers: int = 2) -> Path:
    """A BERT for BERTScore."""
    tokenizer = words(ends=True)
    config = BertConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **{**SMALL, "num_hidden_layers": layers}
    )
    return save(folder, BertModel(config), tokenizer)


CLASSES = {
    "llava": llava,
    "blip": blip,
    "blip2": blip2,
    "blip2_t5": blip2_t5,
    "instructblip": instructblip,
    "instructblip_t5": instructblip_t5,
    "qwen2_vl": qwen2_vl,
    "smolvlm": smolvlm,
}
