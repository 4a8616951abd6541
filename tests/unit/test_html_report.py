"""The page about a run: what it tells, that nothing in it loads or runs but its own, and that a browser likes it."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from heretic_ds.ablation import Edit, Profile
from heretic_ds.geometry.measures import measure
from heretic_ds.geometry.projection import pca
from heretic_ds.report.html import page as page_module
from heretic_ds.report.html.charts import Chart, linear, logarithmic
from heretic_ds.report.html.page import page
from heretic_ds.search.trials import TrialRecord
from heretic_ds.stages.reporting import write_report
from tests.unit.test_final_scores import some_final

HOSTILE = (
    "</script></style><img src=x onerror=alert(1)> \x1b]0;title\x07\x1b[31m \u202e\udc80 &amp; {{ 7 * 7 }} ' \" ]]>"
)
BLOCKS, WIDTH = 4, 6
VOID = {"meta", "link", "img", "br", "hr", "input", "base", "source", "embed"}


def trial(index: int, refusals: float | None, kl: float | None) -> TrialRecord:
    profiles = {"attention": Profile(1.2, 2.0, 0.4, 1.5), "mlp": Profile(0.9, 1.0, 0.0, 1.0)}
    edit = Edit(None if index % 2 else 1.5, profiles)
    state = "failed" if kl is None else "complete"
    return TrialRecord(index, index, state, edit, refusals, kl, {"refusals": refusals, "length": 12.5}, 1.25)


TRIALS = [trial(0, 60, 0.0), trial(1, 30, 0.004), trial(2, 3, 0.02), trial(3, None, None), trial(4, 40, 0.7)]


def results(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "schema": 1,
        "task": "abliterate",
        "model": "org/some-model",
        "world": {
            "size": 2,
            "capture": {"placement": "fsdp", "degree": 2},
            "evaluate": {"placement": "replicated", "degree": None},
        },
        "prompts": {"target_eval": 67, "baseline_eval": 160},
        "baseline": {"refusals": 66, "scores": {"refusals": 66, "length": 14.0}},
        "trials": [record.to_dict() for record in TRIALS],
        "pareto": [2, 1, 0],
        "selected": 2,
        "verified": {"refusals": 4, "kl": 0.0213, "scores": {"refusals": 4, "length": 13.0}},
        "timings": {"load": 1.0, "search": 61.5, "export": 0.0},
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "examples": [{"prompt": "How are plums baked?", "original": "Sorry, I cannot.", "edited": "In an oven."}],
    }
    return made | changes


CONFIG = "model:\n  path: org/some-model\nexport:\n  max_kl: 0.1\nsearch:\n  startup_trials: 2\n"


def write_geometry(folder: Path, fingerprint: str = "same") -> None:
    """Directions and geometry of random residuals, as the stages leave them."""
    generator = torch.Generator().manual_seed(0)
    residual_LND = torch.randn(BLOCKS + 1, 9, WIDTH, generator=generator, dtype=torch.float64) + 2
    residual_LND[:, :5, 0] += 4
    residual_LND[0] = residual_LND[0, :1]  # all prompts end alike
    layers = measure((each[:5], each[5:]) for each in residual_LND)
    means = {"target_mean": residual_LND[:, :5].mean(1), "baseline_mean": residual_LND[:, 5:].mean(1)}
    save_file(means, folder / "directions.safetensors", metadata={"fingerprint": "same"})
    projected = pca(residual_LND[2], torch.arange(9) < 5)
    content = {
        "schema": 1,
        "model": "org/some-model",
        "prompts": {"target": 5, "baseline": 4},
        "asked": {"fingerprint": fingerprint, "projection": "pca", "blocks": [1]},
        "layers": [{"entry": entry, **layer.to_dict()} for entry, layer in enumerate(layers)],
        "projections": [
            {
                "block": 1,
                "explained": projected.explained,
                "target": projected.point_N2[:5].tolist(),
                "baseline": projected.point_N2[5:].tolist(),
            }
        ],
    }
    (folder / "geometry.json").write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with all that a page can tell of."""
    (tmp_path / "results.json").write_text(json.dumps(results()))
    (tmp_path / "config.yaml").write_text(CONFIG)
    write_geometry(tmp_path)
    return tmp_path


class Page(HTMLParser):
    """A page as a browser reads it: its elements, which have to be closed in their order, and its texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside: dict[str, str] = {}
        """Texts of scripts and styles."""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.inside[self.open[-1]] = self.inside.get(self.open[-1], "") + data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        """All that is to be read, white space folded."""
        return " ".join(" ".join(self.texts).split())

    def attributes(self) -> Iterator[tuple[str, str]]:
        for _, attributes in self.elements:
            for name, value in attributes.items():
                yield name, value or ""


def assert_inert(text: str) -> Page:
    """Nothing is loaded, and no script runs but the page's own."""
    read = Page(text)
    assert {tag for tag, _ in read.elements} & {"img", "link", "iframe", "object", "embed", "base", "form"} == set()
    assert sum(tag == "script" for tag, _ in read.elements) == sum(tag == "style" for tag, _ in read.elements) == 1
    for name, value in read.attributes():
        assert not name.startswith("on") and name not in ("src", "srcset", "style", "xlink:href", "action")
        assert name != "href" or re.fullmatch(r"#[a-z]+", value)
    assert not re.search(r"url\(|@import", read.inside["style"])
    policy = next(a["content"] for _, a in read.elements if a.get("http-equiv") == "Content-Security-Policy") or ""
    digest = base64.b64encode(hashlib.sha256(read.inside["script"].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    return read


def test_the_page_tells_the_run(folder: Path) -> None:
    read = assert_inert(page(folder, "refusals", "org/some-model"))
    for said in (
        "some-model",
        "declines 4 of 67 target prompts; the original declines 66",
        "0.0213 nats",
        "66 → 4",
        "fsdp, 2 of 2 ranks a replica",
        "How are plums baked?",
        "Sorry, I cannot.",
        "In an oven.",
        "max_kl: 0.1",
        "torch 2.13.0",
        "5 target, 4 baseline",
        "chosen: trial 2",
        "trial 4: 40 refusals, KL 0.7",
        "drawn at random up to here (2 trials)",
        "direction of block 1.5, used by every block",
        "attention, block 2: 1.2",
        "ablation.direction_index=1.5 ablation.profiles.attention.max_weight=1.2 ",
        "length",
        "62 s of work",
    ):
        assert said in read.text, said
    titles = read.text
    assert "Principal components" in titles and "Separability" in titles and "Cosines" in titles
    clouds = [
        attributes["d"] or "" for tag, attributes in read.elements if attributes.get("class", "").startswith("cloud")
    ]  # type: ignore[union-attr]
    assert [path.count("M") for path in clouds] == [4, 5]


def test_charts_have_a_point_for_every_finished_trial(folder: Path) -> None:
    """Of the front, of both histories; none for the trial that failed. The best have smaller y: fewer refusals."""
    text = page(folder, "refusals", "org/some-model")
    assert text.count("<title>trial 2: 3 refusals, KL 0.02</title>") == 3
    assert "<title>trial 3:" not in text
    first = text[text.index("refusals against KL") : text.index("Refusals by trial")]
    dots = dict(re.findall(r'cy="([\d.]+)" r="\d"><title>trial (\d)', first))
    heights = {index: float(y) for y, index in dots.items()}
    assert heights["2"] > heights["1"] > heights["4"] > heights["0"]  # y grows downwards


@pytest.mark.parametrize("strategy", ["direct", "screened"])
def test_trials_of_a_screened_search_are_not_drawn_at_random(strategy: str, folder: Path) -> None:
    (folder / "config.yaml").write_text(f"{CONFIG}  strategy: {strategy}\n")
    assert ("drawn at random" in page(folder, "refusals", "some-model")) == (strategy == "direct")


def test_texts_of_others_are_inert(folder: Path) -> None:
    """Prompts, answers, model, scorer, versions, configuration and command may hold anything."""
    example = dict.fromkeys(("prompt", "original", "edited"), HOSTILE)
    hostile = results(
        model=HOSTILE,
        examples=[example],
        command=HOSTILE,
        versions={HOSTILE: HOSTILE},
        baseline={"refusals": 66, "scores": {HOSTILE: 1}},
    )
    (folder / "results.json").write_text(json.dumps(hostile))
    (folder / "config.yaml").write_text(yaml.safe_dump({"key": HOSTILE.replace("\udc80", "")}))
    text = page(folder, HOSTILE, HOSTILE)
    read = assert_inert(text)
    assert "<img src=x onerror=alert(1)> ␛]0;title␇␛[31m ��" in read.text and "{{ 7 * 7 }}" in read.text
    text.encode()  # halves of characters could not be written


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"verified": None, "selected": None, "examples": []},
            "No edit was chosen: no trial stayed within export.max_kl= 0.1",
        ),
        ({"trials": [], "pareto": [], "selected": None, "verified": None}, "No trial was finished"),
        ({"examples": None}, "No edit was verified"),
        ({"trials": [trial(0, 66, 0.0).to_dict()], "selected": 0}, "trial, 1 on the front"),
        ({"trials": [trial(0, None, None).to_dict()], "selected": None, "verified": None}, "failed"),
    ],
)
def test_runs_that_found_little(changes: dict[str, Any], said: str, folder: Path) -> None:
    content = {key: value for key, value in results(**changes).items() if value is not None or key != "examples"}
    (folder / "results.json").write_text(json.dumps(content))
    read = assert_inert(page(folder, "refusals", "org/some-model"))
    assert said.replace(" ", "") in read.text.replace(" ", "")


def test_a_search_that_was_cut_short(folder: Path) -> None:
    (folder / "config.yaml").write_text(CONFIG + "  trials: 9\n")
    (folder / "results.json").write_text(json.dumps(results(verified=None, selected=None)))
    read = assert_inert(page(folder, "refusals", "org/some-model"))
    assert "not finished: 5 of 9 trials" in read.text and "No edit was chosen" not in read.text


def test_geometry_of_means_alone(folder: Path) -> None:
    """What a search leaves is enough for lengths and cosines; the page says how to have the rest."""
    (folder / "geometry.json").unlink()
    read = assert_inert(page(folder, "refusals", "org/some-model"))
    assert "Cosines" in read.text and "Lengths" in read.text and "Separability" not in read.text
    assert "with task=geometry measures them" in read.text
    (folder / "directions.safetensors").unlink()
    assert "directions.safetensors is missing" in assert_inert(page(folder, "refusals", "org/some-model")).text


def test_geometry_of_other_residuals_is_not_shown(folder: Path) -> None:
    write_geometry(folder, "other")
    read = assert_inert(page(folder, "refusals", "org/some-model"))
    assert "measured on other residuals" in read.text and "Separability" not in read.text


def test_another_scorer_goes_by_its_name(folder: Path) -> None:
    read = assert_inert(page(folder, "vowels", "org/some-model"))
    assert "has a vowels of 4" in read.text and "declin" not in read.text.replace("a declining one soon", "")


# Axes


def test_axes_hold_their_numbers() -> None:
    assert linear([3, 3]).share(3) == pytest.approx(0.5)
    axis = linear([0, 67], whole=True)
    assert 0 < axis.share(0) < 0.1 and 0.9 < axis.share(67) < 1
    assert all(value == int(value) for value, _ in axis.ticks)
    kls = logarithmic([0.0, 0.002, 0.5])
    assert kls.share(0) == 0 and kls.ticks[0][1] == "0" and kls.share(0.002) > 0.2
    assert 0 < logarithmic([0.003]).share(0.003) < 1
    assert logarithmic([]).share(0.1) == pytest.approx(0.5)
    assert [text for _, text in logarithmic([1e-9, 1.0]).ticks] == ["1e-9", "1e-7", "1e-5", "0.001", "0.1"]


def test_a_line_is_broken_where_numbers_lack() -> None:
    svg = Chart(linear([0, 3]), linear([0, 1]), "x").line([(0, 1.0), (1, None), (2, 0.0), (3, 0.5)], "good").svg()
    path = re.search(r'class="line good" d="([^"]*)"', svg)
    assert path is not None and re.sub(r"[\d. ]", "", path[1]) == "MML"


# The stage


def stand_in(folder: Path, html: bool = True) -> Any:
    paths = SimpleNamespace(path=folder, results=folder / "results.json", report=folder / "report.html")
    settings = SimpleNamespace(report=SimpleNamespace(html=html), model=SimpleNamespace(path="org/some-model"))
    job = SimpleNamespace(opened=SimpleNamespace(source=SimpleNamespace(name="org/some-model")), settings=settings)
    return SimpleNamespace(folder=paths, settings=settings, scorer="refusals", job=job)


def test_a_page_that_fails_is_one_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(stand_in(folder))
    assert "In an oven." in (folder / "report.html").read_text()

    def broken(*_: object) -> None:
        raise RuntimeError("no\npage")

    caplog.clear()
    monkeypatch.setattr(page_module.figures, "front", broken)
    write_report(stand_in(folder))
    assert [(record.levelname, record.getMessage()) for record in caplog.records if record.levelno > logging.INFO] == [
        ("WARNING", f"{folder / 'report.html'} was not written: RuntimeError: no page")
    ]


def test_no_page_where_none_is_wanted_or_nothing_was_found(folder: Path) -> None:
    write_report(stand_in(folder, html=False))
    write_report(SimpleNamespace(folder=None, settings=SimpleNamespace(report=SimpleNamespace(html=True))))  # type: ignore[arg-type]
    (folder / "results.json").unlink()
    write_report(stand_in(folder))
    assert not (folder / "report.html").exists()


# A browser


def browser() -> str | None:
    """Chromium, of the system or as Playwright installs it."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    known = Path.home() / ".cache" / "ms-playwright"
    inside = ("chromium-*/chrome-linux*/chrome", "chromium_headless_shell-*/chrome-*/*headless*shell")
    return next((str(file) for pattern in inside for file in sorted(known.glob(pattern))), None)


@pytest.mark.parametrize("texts", ["plain", "hostile"])
def test_chromium_has_nothing_to_say(texts: str, folder: Path) -> None:
    """Its console stays empty, and the script has run: headings can be reached by the keyboard."""
    program = browser()
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium, or pip install playwright && playwright install chromium")
    if texts == "hostile":
        example = dict.fromkeys(("prompt", "original", "edited"), HOSTILE)
        (folder / "results.json").write_text(json.dumps(results(model=HOSTILE, examples=[example], command=HOSTILE)))
    file = folder / "report.html"
    file.write_text(page(folder, "refusals", HOSTILE if texts == "hostile" else "org/some-model"), encoding="utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr")
    command = [program, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert ('tabindex="0"' in done.stdout and "alert(1)&gt;" in done.stdout) or texts == "plain"


def test_final_scores_come_first(folder: Path) -> None:
    final = some_final()
    final["scores"]["target"][HOSTILE] = final["scores"]["target"].pop("mine")
    (folder / "results.json").write_text(json.dumps(results(final=final)))
    text = page(folder, "refusals", "some-model")
    assert "refusals <strong>3</strong> of 80 (" in text and "the original: 80." in text
    assert "Not all of these prompts were held back, which flatters the edit" in text
    assert "KL divergence, 32 tokens, 2 baseline prompts" in text and "0.1 to 0.3" in text
    assert text.index('id="final"') < text.index('id="scores"') and "<img" not in text
    assert "Target prompts: 80 of the test part." in text and "of which 100 were not held back" in text
