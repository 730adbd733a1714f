"""Small checkpoints with random weights, made by transformers itself, as a shop would have them on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ("matte", "gloss", "cream", "berry", "coral", "plum", "lipstick", "blush", "mask", "velvet", "soft")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
KINDS = {
    "text": ("bert", "clip", "siglip"),
    "image": ("vit", "resnet", "efficientnet", "clip", "siglip"),
}
TOKENS = 20  # that CLIP and SigLIP have places for: between two buckets, as 77 is

_BLOCK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


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
    size = write_tokenizer(folder) if kind in (*KINDS["text"], "clip_text") else 0
    if kind == "siglip":  # which reads padding, and whose configuration names another
        (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[MASK]"}))
    if kind == "bert":
        model = hf.BertModel(hf.BertConfig(vocab_size=size, max_position_embeddings=64, **_BLOCK))
    elif kind in ("clip_text", "clip_image", "clip", "siglip"):
        model = _tower(kind, size)
    elif kind == "vit":
        model = hf.ViTModel(hf.ViTConfig(image_size=32, patch_size=8, **_BLOCK), add_pooling_layer=False)
    elif kind == "efficientnet":
        blocks = {
            "in_channels": (32, 16),
            "out_channels": (16, 24),
            "kernel_sizes": (3, 5),
            "strides": (1, 2),
        }
        blocks |= {"num_block_repeats": (1, 1), "expand_ratios": (1, 6), "depth_coefficient": 1.0}
        config = hf.EfficientNetConfig(image_size=32, width_coefficient=0.5, hidden_dim=640, **blocks)
        model = hf.EfficientNetForImageClassification(config)
        said = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.4], "include_top": True}
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
    else:  # of ResNet-50's blocks
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        model = hf.ResNetForImageClassification(hf.ResNetConfig(**sizes, layer_type="bottleneck"))
        (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 32}}))
    deviation = 1.0 if kind == "efficientnet" else 0.2
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=deviation)  # so that inputs differ in their vectors
    model.save_pretrained(folder)
    return folder


def _tower(kind: str, size: int) -> Any:
    """Makes one tower of a pair, or both: of CLIP or of SigLIP."""
    import transformers as hf

    ends = {"bos_token_id": 2, "eos_token_id": 3}
    text = {"vocab_size": size, "max_position_embeddings": TOKENS, **ends, **_BLOCK}
    image = {"image_size": 32, "patch_size": 8, **_BLOCK}
    if kind == "clip_text":
        return hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(projection_dim=24, **text))
    if kind == "clip_image":
        return hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(projection_dim=24, **image))
    if kind == "clip":
        return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=image, projection_dim=24))
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=image))
