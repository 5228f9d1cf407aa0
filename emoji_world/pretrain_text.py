"""Trains the text model with which BERTScore compares captions and prompts: a BERT of 0.7 million parameters.

Masked words of captions (Devlin et al. 2019), in the frames in which a captioner and a prompt use them.

    python -m emoji_world.pretrain_text
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from emoji_world.fit import fit
from emoji_world.questions import all_texts
from emoji_world.render import POOL
from emoji_world.word_tokenizer import make_tokenizer

WEIGHTS = Path(__file__).parent / "weights" / "text"
MAX_LENGTH = 32
FRAMES = ("{}", "{}", "The image contains {}", "There is {}", "There are {} in this image", "{}.")


def train(steps: int, batch: int, lr: float, seed: int, folder: Path, out: Path) -> None:
    texts = all_texts()
    torch.manual_seed(seed)
    tokenizer = make_tokenizer([*texts, *FRAMES], MAX_LENGTH, ends=True)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

    def loss_at(_: int, rng: np.random.Generator) -> torch.Tensor:
        chosen = [FRAMES[rng.integers(len(FRAMES))].format(texts[i]) for i in rng.integers(0, len(texts), batch)]
        inputs = tokenizer(chosen, padding=True, return_tensors="pt", return_special_tokens_mask=True)
        ids = inputs.input_ids
        special = inputs.special_tokens_mask.bool()
        picked = (torch.rand(ids.shape) < 0.25) & ~special
        draw = torch.rand(ids.shape)  # of those picked, 8 in 10 are hidden, 1 is another word, 1 stays
        hidden = torch.where(picked & (draw < 0.8), tokenizer.mask_token_id, ids)
        hidden = torch.where(picked & (draw > 0.9), torch.randint(len(tokenizer), ids.shape), hidden)
        labels = ids.masked_fill(~picked, -100)
        loss: torch.Tensor = model(input_ids=hidden, attention_mask=inputs.attention_mask, labels=labels).loss
        return loss

    fit(model, loss_at, steps, lr, seed, folder / "text.pt")
    encoder = BertModel(model.config)  # with the pooler that loaders expect, though nothing uses it
    encoder.load_state_dict(model.bert.state_dict(), strict=False)
    encoder.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=POOL, help="checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(2)
    train(args.steps, args.batch, args.lr, args.seed, args.folder, WEIGHTS)
