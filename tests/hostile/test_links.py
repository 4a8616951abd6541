"""Links: those that people make lead where they lead, those in a run folder would have it write somewhere else."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.hostile.cases_model import all_of, written
from tests.hostile.harness import Case, Ended, Place, Spoil, files_below

Judged = Callable[[Case], Ended]
OWN = ("run.log", "results.json", "study.journal", "measured.json", "fingerprint.json", "config.yaml", ".lock",
       "directions.safetensors", "pareto.png", "report.html")  # fmt: skip
"""Files of a run folder."""


def link(name: str, target: str) -> Spoil:
    """A link in the place of what was there."""

    def spoil(place: Place) -> None:
        file = place.root / name
        file.unlink(missing_ok=True)
        file.symlink_to(target)

    return spoil


def moved_and_linked(name: str, elsewhere: str) -> Spoil:
    """Something that lies elsewhere, with a link where it was."""

    def spoil(place: Place) -> None:
        (place.root / elsewhere).parent.mkdir(parents=True, exist_ok=True)
        (place.root / name).rename(place.root / elsewhere)
        (place.root / name).symlink_to(place.root / elsewhere)

    return spoil


@pytest.mark.parametrize("name", OWN)
def test_a_file_of_a_run_that_is_a_link_is_not_written_through(name: str, judged: Judged, place: Place) -> None:
    before = b""

    def spoil(place: Place) -> None:
        nonlocal before
        moved_and_linked(f"run/{name}", "mine")(place)
        before = (place.root / "mine").read_bytes()

    judged(Case(f"link_{name}", spoil, f"holds {name}, which is a link", after_run=True))
    assert (place.root / "mine").read_bytes() == before


@pytest.mark.parametrize("name", ["run.log", "study.journal", ".lock", "results.json"])
def test_a_file_of_a_run_that_is_a_pipe_is_not_waited_for(name: str, judged: Judged) -> None:
    def spoil(place: Place) -> None:
        (place.run / name).unlink()
        os.mkfifo(place.run / name)

    judged(Case(f"pipe_{name}", spoil, f"holds {name}, which is no ordinary file", after_run=True))


def test_a_new_run_folder_with_links_in_it(judged: Judged, place: Place) -> None:
    """They are there before the run: a folder that somebody has laid out."""
    for name in (".lock", "config.yaml", "directions.safetensors"):

        def spoil(place: Place, name: str = name) -> None:
            place.run.mkdir()
            all_of(written("mine", "mine"), link(f"run/{name}", "../mine"))(place)

        judged(Case(f"new_{name}", spoil, f"holds {name}, which is a link"))
        assert (place.root / "mine").read_text() == "mine"


def test_the_studys_own_lock_which_is_a_link_is_taken_over(judged: Judged, place: Place) -> None:
    """Optuna makes it of a link, and a kill leaves it: as it is, or as it was being given back."""
    locks = ("study.journal.lock", "study.journal.lock0b1c2d3e.rename")
    spoil = all_of(*(link(f"run/{name}", "study.journal") for name in locks))
    judged(Case("study_lock", spoil, "2 of 3 trials are done already", status=0, after_run=True))
    assert not [file for file in place.run.iterdir() if file.is_symlink()]


LOOPS: list[tuple[str, Spoil, str, dict[str, str]]] = [
    ("run", link("a", "a"), "run.dir=a", {"run.dir": "a"}),
    ("below_run", link("a", "a"), "run.dir=a/b", {"run.dir": "a/b"}),
    ("export", link("a", "b"), "export.dir=a", {"export.dir": "a"}),
    ("below_export", link("a", "a"), "export.dir=a/b", {"export.dir": "a/b"}),
    ("model", link("a", "a"), "model.path=a", {"model.path": "a"}),
    ("prompts", link("a.txt", "a.txt"), "a.txt", {"prompts.target.train.source": "a.txt"}),
    ("template", link("a", "a"), "prompts.template=a", {"prompts.template": "a"}),
    ("compare", link("a", "a"), "direction.compare=a", {"direction.compare": "a"}),
    ("nowhere", link("a", "nowhere"), "run.dir=a is a link that leads nowhere", {"run.dir": "a"}),
]


@pytest.mark.parametrize(("name", "spoil", "said", "given"), LOOPS, ids=[loop[0] for loop in LOOPS])
def test_links_that_lead_to_themselves(
    name: str, spoil: Spoil, said: str, given: dict[str, str], judged: Judged
) -> None:
    judged(Case(f"loop_{name}", all_of(spoil, link("b", "a")) if name == "export" else spoil, said, given))


def test_links_of_leftovers_stay(judged: Judged, place: Place) -> None:
    """What looks like an unfinished export and is a link is nobody's to remove, nor is what it leads to."""

    def spoil(place: Place) -> None:
        (place.root / "mine").mkdir()
        (place.root / "mine" / "file").write_text("mine")
        from heretic_ds.export.target import _host

        for kind in ("partial", "old"):
            (place.root / f".out.{kind}-{_host()}-1234567").symlink_to("mine")
            (place.root / f".out.{kind}-{_host()}-99999999999999999999").mkdir()

    judged(Case("leftovers", spoil, "", {"search.trials": 1, "export.dir": "out"}, status=0))
    assert (place.root / "mine" / "file").read_text() == "mine"


def test_a_model_of_links_makes_a_model_of_files(judged: Judged, place: Place) -> None:
    """As the hub's cache is made: every file a link to another folder."""

    def spoil(place: Place) -> None:
        (place.root / "blobs").mkdir()
        for number, file in enumerate(sorted(place.model.iterdir())):
            blob = place.root / "blobs" / str(number)
            file.rename(blob)
            file.symlink_to(os.path.relpath(blob, place.model))

    given = {"search.trials": 1, "export.dir": "out"}
    judged(Case("model_of_links", spoil, "", given, status=0))
    exported = list((place.root / "out").rglob("*"))
    assert exported and not [file for file in exported if file.is_symlink()]


def test_a_folder_may_be_a_link(judged: Judged, place: Place) -> None:
    """Of the model, of the run and of its export; what is there is used, and the links stay."""

    def spoil(place: Place) -> None:
        moved_and_linked("model", "disk/model")(place)
        (place.root / "disk" / "run").mkdir()
        (place.root / "run").symlink_to("disk/run")
        (place.root / "disk" / "export").mkdir()
        (place.root / "out").symlink_to("disk/export")

    judged(Case("folders", spoil, "", {"search.trials": 1, "export.dir": "out"}, status=0))
    assert all((place.root / name).is_symlink() for name in ("model", "run", "out"))
    assert (place.root / "disk" / "export" / "model.safetensors").is_file()
    assert (place.root / "disk" / "run" / "results.json").is_file()


def test_an_export_never_lands_on_the_model_through_a_link(judged: Judged, place: Place) -> None:
    before: dict[str, bytes] = {}

    def spoil(place: Place) -> None:
        (place.root / "out").symlink_to("model")
        before.update(files_below(place.model))

    judged(Case("onto_the_model", spoil, "export.dir=", {"export.dir": "out", "export.overwrite": True}))
    assert files_below(place.model) == before


def test_files_beside_weights_that_lead_out_of_the_model_are_told_of(judged: Judged, place: Place) -> None:
    """They are copied into the edited model, which people publish."""

    def spoil(place: Place) -> None:
        (place.root / "secret").write_text("secret")
        (place.model / "LICENSE").symlink_to("../secret")
        (place.model / "NOTICE").symlink_to("/dev/zero")
        (place.model / "vocab.txt").symlink_to("vocab.txt")

    said = "LICENSE leads out of the model's folder"
    judged(Case("license", spoil, said, {"search.trials": 1, "export.dir": "out"}, status=0))
    assert not (place.root / "out" / "NOTICE").exists()
