"""Byte-level tokenizers for the captioner and the text model: any text has tokens, each word of ours is one."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

START, END, PAD, MASK, IMAGE = "<s>", "</s>", "<pad>", "<mask>", "<image>"


def make_tokenizer(texts: Iterable[str], max_length: int, ends: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that merges bytes until every word of `texts` is one token.

    A text becomes START text END; without END if not `ends`, so that a language model goes on from there.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,  # never reached: there are a few hundred words
        special_tokens=[PAD, START, END, MASK, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    start = (START, tokenizer.token_to_id(START))
    end = (END, tokenizer.token_to_id(END))
    template = f"{START} $A {END}" if ends else f"{START} $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[start, end])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        mask_token=MASK,
        cls_token=START,
        sep_token=END,
        additional_special_tokens=[IMAGE],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
