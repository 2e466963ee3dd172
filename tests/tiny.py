"""Tiny random models with their tokenizers, as directories that transformers loads; where the shared data lie."""

from pathlib import Path

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = [
    "the",
    "a",
    "river",
    "stone",
    "wind",
    "old",
    "warm",
    "cold",
    "sings",
    "falls",
    "moves",
    "softly",
    "and",
    "or",
    "not",
    "one",
    "two",
    "three",
    ".",
    ":",
]


def save_tokenizer(directory: Path, words: list[str]) -> int:
    """A byte-level BPE tokenizer (the kind every family loads) that knows `words` whole; returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    wrapped.save_pretrained(directory)
    return len(wrapped)


def save_tiny_model(
    directory: Path, family: str, classifier: bool, words: list[str], seed: int, width: int = 32
) -> str:
    """A random 2-layer model of a family (llama, qwen2, gpt_neox) with its tokenizer, as an HF directory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    vocab_size = save_tokenizer(directory, words)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * width, "hidden_size": width}
    if family != "gpt_neox":
        sizes["num_key_value_heads"] = 1
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **sizes,
    )
    if classifier:
        config.num_labels = 1
    torch.manual_seed(seed)
    model = (AutoModelForSequenceClassification if classifier else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(directory)
    return str(directory)
