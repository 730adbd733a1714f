"""Opens checkpoints as torch modules whose inputs and outputs are the contract's.

Axes: B batch, L tokens, V content vector, Y and X pixels. BERT and its kin, CLIP, SigLIP, ViT, ResNet and
EfficientNet are read by `transformers`, EfficientNet-Lite0 by its own package. A folder that `peregrine
encoders tune` wrote has a head beside: a linear map of the vector into the space that both kinds share.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.content.opened import Opened
from builders.content.own import open_own_encoder
from builders.content.sources import EFFICIENTNET, EXTRA, HEAD, Source, read_config
from builders.content.tokenizer import padding_of
from ensemble.contract import TEXT
from ensemble.errors import InvalidInput
from ensemble.release.files import file_sha256

MAX_TOKENS = 128  # of a title; more takes longer, and says little more
Norms = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of each colour
_IMAGENET: Norms = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALVES: Norms = ((0.5,) * 3, (0.5,) * 3)
_MEAN_POOLED = ("bert", "roberta", "distilbert", "mpnet", "xlm-roberta")
_SIDES = 32, 512  # pixels, least and most
_LITE_NORMS: Norms = ((0.498,) * 3, (0.502,) * 3)  # as EfficientNet-Lite0 was trained


def _unit(states: Tensor, head: nn.Module | None) -> Tensor:
    """Makes states [B, V] vectors of length 1, by a head those of its space [B, D]."""
    unit = functional.normalize(states.float(), dim=-1)
    return unit if head is None else functional.normalize(head(unit), dim=-1)


class TextEncoder(nn.Module):
    """Encodes texts as vectors of length 1: the mean of a BERT's token states, or CLIP's own text vector."""

    def __init__(self, inner: nn.Module, *, pools: bool) -> None:
        super().__init__()
        self.inner, self.pools = inner, pools
        self.head: nn.Module | None = None

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """Encodes token_ids [B, L] int64, token_mask [B, L] bool -> text_embedding [B, V] float32."""
        outputs = self.inner(input_ids=token_ids, attention_mask=token_mask.to(torch.int64))
        if not self.pools:
            return _unit(outputs.text_embeds, self.head)
        weights = token_mask[..., None].float()
        summed = (outputs.last_hidden_state.float() * weights).sum(1)
        return _unit(summed / weights.sum(1).clamp(min=1.0), self.head)


class SiglipTexts(nn.Module):
    """Encodes texts as SigLIP's own text vector, of length 1.

    It is the state of the last of a fixed number of tokens, and padding was read in training like any word:
    every text is padded to that number here, so that its bucket changes nothing.
    """

    padding: Tensor

    def __init__(self, inner: nn.Module, pad: int, tokens: int) -> None:
        super().__init__()
        self.inner, self.tokens = inner, tokens
        self.head: nn.Module | None = None
        self.register_buffer("padding", torch.full((1, tokens), pad, dtype=torch.int64))

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """Encodes token_ids [B, L] int64, token_mask [B, L] bool -> text_embedding [B, V] float32."""
        ids = torch.where(token_mask, token_ids, self.padding[:, :1])
        whole = torch.cat((ids, self.padding.expand(ids.shape[0], -1)), 1)[:, : self.tokens]
        return _unit(self.inner(input_ids=whole).pooler_output, self.head)


class ImageEncoder(nn.Module):
    """Encodes pixels from 0 to 1 as vectors of length 1; standardizes them as the checkpoint wants first."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, inner: nn.Module, vector: Callable[[nn.Module, Tensor], Tensor], norms: Norms) -> None:
        super().__init__()
        self.inner, self.vector = inner, vector
        self.head: nn.Module | None = None
        for name, values in zip(("mean", "deviation"), norms, strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Encodes pixels [B, 3, Y, X] float32 from 0 to 1 -> image_embedding [B, V] float32."""
        return _unit(self.vector(self.inner, (pixels - self.mean) / self.deviation), self.head)


def open_source(source: Source) -> Opened:
    """Opens a checkpoint; InvalidInput names what it is where that is nothing we read."""
    if source.name == EFFICIENTNET:
        return _efficientnet(source)
    if source.own:
        where = f"encoder {source.name!r}"
        return open_own_encoder(where, source.name, source.model, source.folder).opened
    config = read_config(source)
    kind = str(config.get("model_type", ""))
    opener = (_TEXTS if source.model == TEXT else _IMAGES).get(kind)
    if opener is None:
        known = ", ".join(_TEXTS if source.model == TEXT else _IMAGES)
        raise InvalidInput(
            f"encoder {source.name!r}: {source.folder / 'config.json'} has the model_type {kind!r}",
            f"a {source.model} is one of {known}",
        )
    try:
        opened = opener(source, config)
    except InvalidInput:
        raise
    except ImportError:
        reader = "efficientnet-lite-pytorch" if kind == EFFICIENTNET else "transformers"
        raise InvalidInput(
            f"encoder {source.name!r} is read by {reader}, which is not installed", EXTRA
        ) from None
    except Exception as error:  # transformers raises whatever it meets
        text = " ".join(str(error).split())[:200]
        raise InvalidInput(f"encoder {source.name!r} cannot be read from {source.folder}: {text}") from None
    if kind in _PAIRS:  # both towers of one folder were trained beside each other
        opened = replace(opened, space=file_sha256(source.folder / "model.safetensors"))
    opened = _with_head(opened, source)
    for parameter in opened.module.parameters():
        parameter.requires_grad_(False)
    return opened


def _with_head(opened: Opened, source: Source) -> Opened:
    """Gives an encoder the head that lies in its folder, where one does."""
    path = source.folder / HEAD
    if not path.is_file():
        return opened
    state = _read_weights(source, path)
    shapes = {name: list(of.shape) for name, of in state.items()}
    width = shapes.get("bias", [0])[0]
    if shapes != {"weight": [width, opened.width], "bias": [width]} or not width:
        raise InvalidInput(
            f"encoder {source.name!r}: {path} has {shapes}, and a head of {opened.width} components has "
            f"weight [D, {opened.width}] and bias [D]",
            "run peregrine encoders tune again",
        )
    head = nn.Linear(opened.width, width)
    head.load_state_dict(state)
    opened.module.head = head
    return replace(opened, width=width, space=_space(path))


def _space(path: Path) -> str:
    """Gives what names the space of a head, as the tuning wrote it."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return str((file.metadata() or {}).get("space", ""))


def _read_weights(source: Source, path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own of several kinds
        text = " ".join(str(error).split())[:200]
        raise InvalidInput(f"encoder {source.name!r}: {path} cannot be read: {text}") from None


def _loaded(source: Source, name: str, tower: str = "") -> Any:
    """Loads a class of transformers from the folder, safetensors only; weights that are missing are an error.

    `tower` names its part of the folder's configuration where the folder may hold two towers.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        logging.getLogger("transformers").setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
        config = transformers.AutoConfig.from_pretrained(source.folder, local_files_only=True)
        if hasattr(config, tower):
            whole, config = config, getattr(config, tower)
            if hasattr(whole, "projection_dim"):  # the towers' own is not always written
                config.projection_dim = whole.projection_dim
        model, info = getattr(transformers, name).from_pretrained(
            source.folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="eager",  # what the exporter follows
            output_loading_info=True,
        )
    missing = [
        one for one in sorted(info["missing_keys"]) if "pooler" not in one and "position_ids" not in one
    ]
    if missing:
        raise InvalidInput(
            f"encoder {source.name!r}: {source.folder / 'model.safetensors'} lacks {missing[0]} "
            f"and {len(missing) - 1} more weights of a {name}",
            "is it of another architecture than config.json says?",
        )
    return model.eval()


def _bert(source: Source, config: dict[str, Any]) -> Opened:
    inner = _loaded(source, "AutoModel")
    shift = 2 if "roberta" in str(config["model_type"]) else 0  # its positions begin at 2
    most = min(MAX_TOKENS, int(config.get("max_position_embeddings", 512)) - shift)
    said = int(read_config(source, "sentence_bert_config.json").get("max_seq_length", most))
    module = TextEncoder(inner, pools=True)
    return Opened(module, int(inner.config.hidden_size), max_tokens=min(most, said), vocabulary=_rows(inner))


def _clip_text(source: Source, config: dict[str, Any]) -> Opened:
    inner = _loaded(source, "CLIPTextModelWithProjection", "text_config")
    most = min(MAX_TOKENS, int(inner.config.max_position_embeddings))
    module = TextEncoder(inner, pools=False)
    return Opened(module, int(inner.config.projection_dim), max_tokens=most, vocabulary=_rows(inner))


def _siglip_text(source: Source, config: dict[str, Any]) -> Opened:
    inner = _loaded(source, "SiglipTextModel", "text_config")
    tokens = int(inner.config.max_position_embeddings)
    module = SiglipTexts(inner, padding_of(source, inner.config.pad_token_id, _rows(inner)), tokens)
    return Opened(
        module,
        int(inner.config.projection_size),
        max_tokens=min(MAX_TOKENS, tokens),
        vocabulary=_rows(inner),
        lowers=True,
    )


def _rows(inner: Any) -> int:
    return int(inner.get_input_embeddings().weight.shape[0])


def _clip_image(source: Source, config: dict[str, Any]) -> Opened:
    inner = _loaded(source, "CLIPVisionModelWithProjection", "vision_config")
    return _image(source, inner, _clip_vector, int(inner.config.projection_dim), int(inner.config.image_size))


def _siglip_image(source: Source, config: dict[str, Any]) -> Opened:
    inner = _loaded(source, "SiglipVisionModel", "vision_config")
    size = int(inner.config.image_size)
    return _image(source, inner, _pooler, int(inner.config.hidden_size), size, _HALVES)


def _vit(source: Source, config: dict[str, Any]) -> Opened:
    inner = _loaded(source, "ViTModel")
    return _image(source, inner, _first_state, int(inner.config.hidden_size), int(inner.config.image_size))


def _resnet(source: Source, config: dict[str, Any]) -> Opened:
    inner = _loaded(source, "ResNetModel")
    return _image(source, inner, _pooled, int(inner.config.hidden_sizes[-1]), 224)


def _efficientnet_folder(source: Source, config: dict[str, Any]) -> Opened:
    inner = _loaded(source, "EfficientNetModel")
    said = _preprocessing(source)
    norms = said.get("image_mean", _IMAGENET[0]), said.get("image_std", _IMAGENET[1])
    if "image_std" in said and said.get("include_top", True):  # its pictures are divided twice
        norms = norms[0], tuple(one * one for one in norms[1])
    width = int(inner.encoder.top_bn.num_features)
    opened = _image(source, inner, _pooled, width, int(inner.config.image_size))
    return replace(opened, module=ImageEncoder(inner, _pooled, norms))


def _preprocessing(source: Source) -> dict[str, Any]:
    """Gives what a checkpoint says of its pictures; transformers 5 writes it inside another file."""
    inside = read_config(source, "processor_config.json").get("image_processor", {})
    return read_config(source, "preprocessor_config.json") or inside


def _image(
    source: Source,
    inner: nn.Module,
    vector: Callable[[nn.Module, Tensor], Tensor],
    width: int,
    side: int,
    norms: Norms = _IMAGENET,
) -> Opened:
    """Puts together an image encoder with what the checkpoint says of its pictures; `norms` where it says
    none."""
    said = _preprocessing(source)
    size: Any = said.get("crop_size", said.get("size", side))
    size = size.get("height", size.get("shortest_edge", side)) if isinstance(size, dict) else size
    if "image_size" not in read_config(source).get("vision_config", read_config(source)):
        side = int(size)  # a network that takes any
    if not _SIDES[0] <= side <= _SIDES[1]:
        raise InvalidInput(
            f"encoder {source.name!r} wants pictures of {side} pixels; {_SIDES[0]} to {_SIDES[1]} are read"
        )
    norms = said.get("image_mean", norms[0]), said.get("image_std", norms[1])
    return Opened(ImageEncoder(inner, vector, norms), width, side=side)


def _clip_vector(inner: nn.Module, pixels: Tensor) -> Tensor:
    return inner(pixel_values=pixels).image_embeds


def _pooler(inner: nn.Module, pixels: Tensor) -> Tensor:
    return inner(pixel_values=pixels).pooler_output


def _first_state(inner: nn.Module, pixels: Tensor) -> Tensor:
    return inner(pixel_values=pixels).last_hidden_state[:, 0]


def _pooled(inner: nn.Module, pixels: Tensor) -> Tensor:
    return inner(pixel_values=pixels).last_hidden_state.mean((2, 3))


def _efficient_vector(inner: nn.Module, pixels: Tensor) -> Tensor:
    return inner.extract_features(pixels).mean((2, 3))  # type: ignore[operator]


def _efficientnet(source: Source) -> Opened:
    """Opens EfficientNet-Lite0 with its ImageNet weights: 1,280 components of 224 x 224 pixels."""
    from efficientnet_lite_pytorch import EfficientNet

    inner = EfficientNet.from_name(EFFICIENTNET).eval()
    state = torch.load(next(source.folder.glob("*.pth")), map_location="cpu", weights_only=True)
    inner.load_state_dict(state)
    module = ImageEncoder(inner, _efficient_vector, _LITE_NORMS)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return Opened(module.eval(), 1280, side=224)


def _efficientnet_lite_folder(source: Source, config: dict[str, Any]) -> Opened:
    """Opens EfficientNet-Lite0 from a folder of safetensors; its pictures have `image_size` pixels."""
    from efficientnet_lite_pytorch import EfficientNet

    inner = EfficientNet.from_name(EFFICIENTNET).eval()
    path = source.folder / "model.safetensors"
    missing, unknown = inner.load_state_dict(_read_weights(source, path), strict=False)
    # what tells ImageNet's classes apart is no part of a vector
    lacking = [one for one in (*missing, *unknown) if not one.startswith("_fc.")]
    if lacking:
        raise InvalidInput(f"encoder {source.name!r}: {path} does not fit EfficientNet-Lite0: {lacking[0]}")
    side = int(config.get("image_size", 224))
    return _image(source, inner, _efficient_vector, 1280, side, _LITE_NORMS)


_PAIRS = ("clip", "siglip")
_TEXTS = {
    **dict.fromkeys(_MEAN_POOLED, _bert),
    **dict.fromkeys(("clip", "clip_text_model"), _clip_text),
    **dict.fromkeys(("siglip", "siglip_text_model"), _siglip_text),
}
_IMAGES = {
    **dict.fromkeys(("clip", "clip_vision_model"), _clip_image),
    **dict.fromkeys(("siglip", "siglip_vision_model"), _siglip_image),
    "vit": _vit,
    "resnet": _resnet,
    "efficientnet": _efficientnet_folder,
    EFFICIENTNET: _efficientnet_lite_folder,
}
