"""Small checkpoints with random weights, made by transformers itself, as a shop would have them on disk."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ("matte", "gloss", "cream", "berry", "coral", "plum", "lipstick", "blush", "mask", "velvet", "soft")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
KINDS = {"text": ("bert", "clip_text"), "image": ("vit", "resnet", "clip_image")}


def write_tokenizer(folder: Path) -> int:
    """Writes a WordPiece tokenizer.json of a few words and all letters; gives its size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = [prefix + chr(at) for at in range(97, 123) for prefix in ("", "##")]
    vocabulary = {word: at for at, word in enumerate((*SPECIAL, *WORDS, *letters))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(vocabulary)


def write_checkpoint(folder: Path, kind: str, seed: int = 0) -> Path:
    """Writes config.json and model.safetensors of one architecture, and what belongs to them."""
    import torch
    import transformers as hf

    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    size = write_tokenizer(folder) if kind in KINDS["text"] else 0
    block = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    if kind == "bert":
        model = hf.BertModel(hf.BertConfig(vocab_size=size, max_position_embeddings=64, **block))
    elif kind == "clip_text":
        config = hf.CLIPTextConfig(
            vocab_size=size, projection_dim=24, max_position_embeddings=32, eos_token_id=3, **block
        )
        model = hf.CLIPTextModelWithProjection(config)
    elif kind == "vit":
        model = hf.ViTModel(hf.ViTConfig(image_size=32, patch_size=8, **block), add_pooling_layer=False)
    elif kind == "clip_image":
        config = hf.CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=24, **block)
        model = hf.CLIPVisionModelWithProjection(config)
    else:
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        model = hf.ResNetModel(hf.ResNetConfig(**sizes, layer_type="basic"))
        (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 32}}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # so that inputs differ in their vectors
    model.save_pretrained(folder)
    return folder
