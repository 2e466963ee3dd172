"""Tokenizers of the kinds that models come with, and tiny models that read and write with them."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

TEXTS = [
    "the old river sings softly and the cold wind falls .",
    "a warm stone moves : one two three",
    "system user assistant\n who are you ?\n",
] * 3
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SCORER_WIDTH = 8
TEMPLATE = (
    "<s>{% for m in messages %}{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def byte_level(prefix: bool) -> Tokenizer:
    """GPT-2, Llama 3, Qwen. `prefix`: puts a space before every text (`add_prefix_space`)."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS, trainer)
    return raw


def pieces(prepend: str) -> Tokenizer:
    """BPE of SentencePiece with bytes for unknown letters: Llama 2, Mistral, Gemma. `prepend`: when a text gets a space."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    strip = [] if prepend == "never" else [decoders.Strip(" ", 1, 0)]
    if prepend == "normalizer":
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=SPECIAL + BYTES, show_progress=False)
    words = [word if prepend == "normalizer" else f" {word}" for text in TEXTS for word in text.split()]
    raw.train_from_iterator(words, trainer)
    saved = json.loads(raw.to_str())
    saved["added_tokens"] = saved["added_tokens"][: len(SPECIAL)]  # a byte is an ordinary token
    return Tokenizer.from_str(json.dumps(saved))


def unigram() -> Tokenizer:
    """Unigram of SentencePiece: XLNet, T5, Reformer."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    raw.train_from_iterator(TEXTS, trainer)
    return raw


def word_pieces() -> Tokenizer:
    """WordPiece: BERT, and decoders that took its vocabulary."""
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=False)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=SPECIAL, show_progress=False)
    raw.train_from_iterator(TEXTS, trainer)
    return raw


KINDS = {
    "bytes": lambda: byte_level(False),
    "bytes after a space": lambda: byte_level(True),
    "pieces, first": lambda: pieces("first"),
    "pieces, always": lambda: pieces("always"),
    "pieces, never": lambda: pieces("never"),
    "pieces, normalised": lambda: pieces("normalizer"),
    "unigram": unigram,
    "word pieces": word_pieces,
}


def tokenizer_of(kind: str, bos: bool, eos: bool, side: str = "right", template: str | None = None):
    """A tokenizer. bos, eos: what it adds to a text (`add_bos_token`, `add_eos_token`). side: where it pads."""
    return PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](),
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        additional_special_tokens=["<|end|>"],
        add_bos_token=bos,
        add_eos_token=eos,
        padding_side=side,
        chat_template=template,
    )


def written_after(tokenizer, prompt: str, response: str) -> list[int]:
    """The tokens of a response as a policy writes it after a prompt, without end-of-text token."""
    whole, start = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt + response, prompt))
    assert whole[: len(start)] == start
    return whole[len(start) :]


def save_writer(directory: Path, tokenizer, response: list[int]) -> str:
    """A policy that answers every prompt with these tokens, all different, and ends then."""
    width = len(tokenizer) + len(tokenizer) % 2
    model = AutoModelForCausalLM.from_config(_config(tokenizer, width))
    following = torch.full((width,), response[0])
    following[response] = torch.tensor([*response[1:], tokenizer.eos_token_id])
    with torch.no_grad():
        # Each token has a direction of its own, nothing is added to it, and the next token alone has a logit.
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(width)[: len(tokenizer)])
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[following[: len(tokenizer)], torch.arange(len(tokenizer))] = 3.0
    return _save(model, directory, tokenizer)


def save_scorer(directory: Path, tokenizer) -> str:
    """A random reward model."""
    torch.manual_seed(0)
    return _save(
        AutoModelForSequenceClassification.from_config(_config(tokenizer, SCORER_WIDTH, num_labels=1)),
        directory,
        tokenizer,
    )


def _config(tokenizer, width: int, **more):
    return AutoConfig.for_model(
        "llama",
        **{"vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 8, "max_position_embeddings": 128},
        **{"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4},
        **{"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None},
        **more,
    )


def _save(model, directory: Path, tokenizer) -> str:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)
