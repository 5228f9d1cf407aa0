"""Small vision-language models that docs/rewards.md does not name, with ways of their own to read and answer."""

from pathlib import Path

from transformers import (
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    Pix2StructImageProcessor,
    Pix2StructProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from tests.vlm_models import SMALL, SPECIAL, ids, save, words


def florence2(folder: Path) -> Path:
    """An encoder and a decoder, BART's, which know positions."""
    tokenizer = words(ends=True, extra={"image_token": "<image>"})
    config = Florence2Config(
        text_config={
            "model_type": "bart", "vocab_size": len(tokenizer), "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
            "max_position_embeddings": 128, "decoder_start_token_id": tokenizer.eos_token_id, **ids(tokenizer),
        },
        vision_config={
            "embed_dim": [8, 16, 16, 32], "num_heads": [1, 2, 2, 4], "num_groups": [1, 2, 2, 4],
            "depths": [1, 1, 1, 1], "window_size": 4, "projection_dim": 32,
        },
        image_token_id=SPECIAL.index("<image>"),
    )  # fmt: skip
    images = CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5
    return save(folder, Florence2ForConditionalGeneration(config), Florence2Processor(images, tokenizer))


def paligemma(folder: Path) -> Path:
    tokenizer = words()
    text = GemmaConfig(vocab_size=2500, head_dim=16, num_key_value_heads=1, **SMALL, **ids(tokenizer))
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(image_size=32, patch_size=8, projection_dim=32, **SMALL).to_dict(),
        text_config=text.to_dict(),
        image_token_index=SPECIAL.index("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    return save(folder, PaliGemmaForConditionalGeneration(config), PaliGemmaProcessor(images, tokenizer))


def pix2struct(folder: Path) -> Path:
    """It reads a question only where somebody has drawn it into the picture."""
    tokenizer = words()
    config = Pix2StructConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
            "decoder_start_token_id": tokenizer.pad_token_id, **ids(tokenizer),
        },
        vision_config={
            "hidden_size": 32, "patch_embed_hidden_size": 768, "d_ff": 64, "d_kv": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "seq_len": 64,
        },
    )  # fmt: skip
    processor = Pix2StructProcessor(Pix2StructImageProcessor(max_patches=64), tokenizer)
    return save(folder, Pix2StructForConditionalGeneration(config), processor)


CLASSES = {"florence2": florence2, "paligemma": paligemma}
