"""Small models of transformers with fresh weights, saved into folders as a user's would be."""

import json

import torch

# The longest window that the Llama takes.
TOKENS = 16
WORDS = [
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "the",
    "a",
    "of",
    "to",
    "in",
    "and",
    "is",
    "that",
    "it",
    "for",
    "name",
    "value",
    "class",
    "function",
    "object",
]


def save_tokenizer(folder, special):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def save_llama(hf, folder):
    """A Llama with grouped queries, saved with its language head, in half precision."""
    config = hf.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
    )
    torch.manual_seed(3)
    hf.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    save_tokenizer(folder, special=False)
    return folder


def save_bert(hf, folder):
    """A BERT without the pooler, which no token of the blocks passes through."""
    config = hf.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=64,
    )
    torch.manual_seed(3)
    hf.BertForMaskedLM(config).save_pretrained(folder)
    save_tokenizer(folder, special=True)
    return folder


def save_vit(hf, folder, *, classes=0, pixels=32):
    """A ViT with its class token, with a head where classes are given."""
    config = hf.ViTConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=pixels,
        patch_size=8,
        num_labels=classes or 2,
    )
    torch.manual_seed(3)
    (hf.ViTForImageClassification if classes else hf.ViTModel)(config).save_pretrained(folder)
    settings = {
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "image_processor_type": "ViTImageProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
