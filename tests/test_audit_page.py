"""The page of an audit: whole in itself, every number in it, and nothing a model's name can break."""

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import leakjax
from leakjax.metrics import psnr
from leakjax.report.audit import markup
from leakjax.report.audit.audit import Audit
from leakjax.report.audit.page import draw_map, draw_page
from leakjax.report.audit.record import Change, LayerAudit, NoisePoint, PaddedCount, Picture, Withheld

HOSTILE = "<script>alert('x')</script>\" onload=\"x & http://evil.example/"
VOID = {"wbr", "meta", "link", "img", "br", "hr", "input", "path", "circle", "line", "rect", "polyline"}


def a_map(examples=1):
    held = np.ones((examples, 32, 32, 3))
    held[:, -1], held[:, :, -1] = 0, 0
    held[:, -3, :-1] = 0.4
    return held


def a_layer(name, deficiency=0, **changed):
    padded, words = PaddedCount(4860, 3888, 3888), f"{name} costs a solve"
    numbers = 3072, 3072 + deficiency, deficiency, 2987, True, 1.25e7, 55, 0.8, 0.625, 1, 1816
    layer = LayerAudit(name, *numbers, padded, words)
    return dataclasses.replace(layer, **changed)


def full(**changed):
    spectrum = np.r_[np.geomspace(40, 1e-6, 2883), np.full(189, 1e-16)]
    noise = [NoisePoint(10.0**-k, None if k > 6 else 20.0 * k - 3, 20.5 * k, 2883 - k / 2) for k in range(1, 8)]
    held = a_map()
    audit = Audit(
        model="lenet2",
        input_shape=(32, 32, 3),
        examples=1,
        c_m=-2266.5,
        c_m_rounded=-2266,
        layers=(
            a_layer("conv1", -189),
            a_layer("conv2", structural_exact=False),
            a_layer("head", pull_back_depth=None),
        ),
        unknowns=3072,
        structural_leaked_dimensions=2994,
        leaked_dimensions=2883,
        leaked_fraction=2883 / 3072,
        unseen_pixels=63,
        spectrum=tuple(spectrum.tolist()),
        noise=tuple(noise),
        verdict="partial",
        sentence="2,883 of 3,072 directions come back.",
        changes=(Change("conv1", "stride 2 to 4", 768, -1234), Change("conv2", "12 to 6 channels", 1536, 4321)),
        withheld=(Withheld((), 2883), Withheld(("conv1", "conv2"), 84, 83, a_map())),
        remarks=("labels are taken as recovered",),
        leakage_map=held,
        uncertainty=np.where(held > 0.5, 0.0123, np.inf),
    )
    return dataclasses.replace(audit, **changed)


def bare(**changed):
    nothing = {"rank": None, "rank_deficiency": None, "condition": None, "known_share": None, "pull_back_depth": None}
    fields = ("leaked_dimensions", "leaked_fraction", "unseen_pixels", "spectrum", "noise")
    audit = full(layers=tuple(dataclasses.replace(layer, **nothing) for layer in full().layers), verdict="limited")
    none = dict.fromkeys((*fields, "leakage_map", "uncertainty"))
    return dataclasses.replace(audit, **none, changes=(), withheld=(), remarks=(), **changed)


class Reader(HTMLParser):
    """Checks that tags close in order; gathers tags, attributes and what a reader sees."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def values(self, name):
        return [value for key, value in self.attributes if key == name]


PAGES = {
    "full": full,
    "bare": bare,
    "hostile": lambda: full(model=HOSTILE, sentence=HOSTILE, remarks=(HOSTILE,), layers=(a_layer(HOSTILE),)),
    "hostile verdict": lambda: bare(verdict=HOSTILE),
    "changes of hostile layers": lambda: full(
        changes=(Change(HOSTILE, HOSTILE, 1, 0),), withheld=(Withheld((HOSTILE,), 1),)
    ),
    "several": lambda: full(examples=12, leakage_map=a_map(12), uncertainty=None),
    "zero": lambda: full(spectrum=(0.0, 0.0), leaked_dimensions=0, leaked_fraction=0.0, c_m=-0.0, unseen_pixels=0),
    "not finite": lambda: full(spectrum=(np.inf, 1.0, np.nan), noise=(NoisePoint(0.0, np.inf, np.nan, 0.0),)),
    "one of each": lambda: full(spectrum=(2.0,), noise=(NoisePoint(1e-3, 30.0, None, 3.0),), leaked_dimensions=1),
    "no layers": lambda: full(layers=(), unknowns=0),
}


@pytest.mark.parametrize("build", PAGES.values(), ids=PAGES)
def test_the_page_is_whole_in_itself_and_balanced(build):
    page = draw_page(build())
    read = Reader(page)
    assert read.tags.count("h1") == 1
    assert not {"script", "iframe", "object", "embed", "base"} & set(read.tags)
    assert not [key for key, _ in read.attributes if key.startswith("on")]
    loads = [*read.values("src"), *read.values("href"), *re.findall(r"url\(([^)]*)", page)]
    assert loads
    assert all(load.startswith(("data:", "#")) for load in loads)
    assert "@import" not in page
    assert ("lang", "en") in read.attributes
    identities = read.values("id")
    assert len(set(identities)) == len(identities)
    assert set(read.values("aria-labelledby")) <= set(identities)
    assert "nan" not in read.text.split()
    assert "None" not in read.text


def test_the_page_names_every_key_number():
    audit = full()
    read = Reader(draw_page(audit))
    for number in ("2,883", "3,072", "93.8", "63", "−2,266.5", "−2,266", "2,994", "1,024"):
        assert number in read.text
    assert {"2883", "3072", "-2266.5", "-2266", "-189", "12500000.0"} <= set(read.values("value"))
    assert "0 means that every layer is determined" in read.text
    assert "Negative does not mean safe" in read.text
    for layer in audit.layers:
        assert layer.sentence in read.text
    for words in (
        audit.sentence,
        *audit.remarks,
        "open",
        "≤ 2,987 bound",
        "62.5",
        "±",
        "conv1, conv2",
        "−1,234",
        "+4,321",
    ):
        assert words in read.text
    for point in audit.noise:
        assert f"{point.psnr_estimate_prior:.1f}" in read.text
    assert f"leakjax {leakjax.__version__}" in read.text


def test_sections_come_in_order():
    identities = Reader(draw_page(full())).values("id")
    wanted = [
        "verdict-title",
        "numbers",
        "changes",
        "map",
        "layers",
        "spectrum",
        "noise",
        "withheld",
        "remarks",
        "glossary",
    ]
    assert [name for name in identities if name in wanted] == wanted


def test_pictures_show_the_image_and_what_comes_back_at_each_noise(rng):
    image = rng.uniform(size=(1, 4, 4, 3))
    shown = Picture(None, image, 350.0), Picture(1e-4, np.clip(image + 0.1, 0, 1), 20.0)
    page = draw_page(dataclasses.replace(full(), images=image, pictures=shown))
    read = Reader(page)
    assert "What this gradient gives back: 350.0 dB" in read.text
    assert "At noise σ = 0.0001: 2" in read.text  # some 20 dB
    assert "&lt;" not in page.split('id="pictures"')[1].split("</section>")[0]
    assert len([s for s in read.values("src") if s.startswith("data:image/png")]) >= 3


def test_what_comes_back_without_noise_is_the_image_where_all_of_it_leaks(rng):
    weights = {"w": rng.normal(size=(16, 8)), "b": rng.normal(size=8)}
    image = rng.uniform(size=(1, 4, 4, 1))
    found = leakjax.audit(
        (lambda p, x: x.reshape(len(x), -1) @ p["w"] + p["b"][None], weights),
        (4, 4, 1),
        images=image,
        noise=(1e-3, 1e2),
    )
    plain, little, much = found.pictures
    np.testing.assert_allclose(plain.image, image, atol=1e-7)
    assert np.max(np.abs(little.image - image)) < 0.1
    np.testing.assert_allclose(much.image, 0.5, atol=0.1)
    assert "pictures" not in found.to_json()


def test_a_gate_is_no_more_reassuring_than_the_picture(rng):
    """An image as smooth as can be comes back better than the prior's images do on average: the gate follows it."""
    weights = {"w": rng.normal(size=(64, 6)), "b": rng.normal(size=6)}
    ramp = np.linspace(0.3, 0.7, 8)[None, :, None, None] * np.ones((1, 8, 8, 1))
    draws = []
    for seed in range(8):
        found = leakjax.audit(
            (lambda p, x: x.reshape(len(x), -1) @ p["w"] + p["b"][None], weights),
            (8, 8, 1),
            images=ramp,
            labels=np.array([1]),
            noise=(1e-2, 1e-1),
            seed=seed,
        )
        for point, shown in zip(found.noise, found.pictures[1:], strict=True):
            assert point.psnr_at_image == shown.psnr
            assert point.attainable_psnr >= max(point.psnr_at_image, point.psnr_estimate_prior)
            draws.append((point.sigma, shown.psnr, psnr(ramp[0], shown.image[0])))
        assert found.attainable_psnr >= max(p.psnr_at_image for p in found.noise)
    assert all(said >= drawn - 1e-9 for _, said, drawn in draws)
    for sigma in (1e-2, 1e-1):  # what is expected over noise is the mean of what was drawn
        expected = min(said for s, said, _ in draws if s == sigma)
        mean = -10 * np.log10(np.mean([10 ** (-drawn / 10) for s, _, drawn in draws if s == sigma]))
        assert abs(expected - mean) < 2


def test_shapes_alone_say_so():
    read = Reader(draw_page(bare()))
    assert read.text.count("Not computed (shapes only).") == 1  # of unseen pixels
    assert "Leakage map, Spectrum, Noise (shapes only)." in read.text
    assert not {"map", "spectrum", "noise", "pictures"} & set(read.values("id"))
    assert "≤ 2,994 of 3,072 unknowns" in read.text
    assert "upper bound from shapes" in read.text
    assert "changes" not in read.values("id")
    assert "withheld" not in read.values("id")
    assert not read.values("src")


def test_privacy_is_shown_where_it_is_known():
    private = NoisePoint(1e-3, 12.5, 14.25, 30.0, noise_multiplier=1.1, clip=0.75, epsilon=7.875, delta=1e-5)
    text = Reader(draw_page(full(noise=(private,)))).text
    assert "Noise multiplier" in text
    for number in ("1.1", "0.75", "7.88", "12.5"):
        assert number in text
    assert '<th scope="col">Clip</th>' not in draw_page(full())


@pytest.mark.parametrize(
    ("verdict", "word"),
    [("exact", "Exact:"), ("partial", "Partial:"), ("limited", "Limited:"), ("unknown", "Unknown:")],
)
def test_the_verdict_is_in_words(verdict, word):
    assert word in Reader(draw_page(full(verdict=verdict))).text


def test_tables_and_plots_can_be_read_without_seeing_them():
    page = draw_page(full())
    assert page.count("<table>") == page.count("<caption>") == page.count('role="region" tabindex="0" aria-label=') == 5
    assert page.count('role="img" aria-label=') == 2
    assert "<th>" not in page
    assert all(Reader(page).values("alt"))


def test_a_share_never_rounds_to_all_or_nothing():
    assert "99.9" in markup.percent(0.99999)
    assert "0.1" in markup.percent(1e-9)
    assert markup.percent(1.0).startswith("100")
    assert markup.percent(0.0).startswith("0")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (-2266.5, "−2,266.5"), (1500.0, "1,500"), (0.025, "0.025"), (99.96, "100"), (float("inf"), "∞")],
)
def test_real_numbers_read_well(value, shown):
    assert re.sub("<[^>]*>", "", markup.real(value, 6 if value == -2266.5 else 3)) == shown


@pytest.mark.parametrize(("value", "shown"), [(1e-6, "10<sup>-6"), (1.25e7, "1.25×10<sup>7"), (-3e9, "−3×10<sup>9")])
def test_large_and_small_numbers_are_powers_of_ten(value, shown):
    assert shown.replace("-6", "−6") in markup.real(value).replace("\N{NARROW NO-BREAK SPACE}", "")


@pytest.mark.parametrize("examples", [1, 3, 12])
def test_the_map_is_drawn(tmp_path, examples):
    path = tmp_path / "leakage_map.png"
    assert draw_map(path, full(model="a $odd^ name " * 9, leakage_map=a_map(examples)))
    with Image.open(path) as image:
        width, height = image.size
        assert not {"Software"} & set(image.info)
    assert 300 < width < 2000
    assert 300 < height < 1400


def test_there_is_no_map_of_shapes(tmp_path):
    assert draw_map(tmp_path / "leakage_map.png", bare()) is False
    assert not list(tmp_path.iterdir())
