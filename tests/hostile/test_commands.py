"""Hostile command lines, through Hydra: each takes as long as ten other cases, so there are only some."""

from __future__ import annotations

from pathlib import Path

import pytest

from heretic_ds import cli
from tests.hostile.harness import run_in_copy

COMMANDS = [
    (["search.trial=3", "model"], "did you mean search.trials?"),
    (["generation.max_tokens=3", "model"], "generation.max_new_tokens"),
    (["export.trails=3", "model"], "did you mean export.trial?"),
    (["trials=3", "model"], "did you mean search.trials"),
    (["model.path=[a,b]"], "model.path"),
    (["model", "other"], "unexpected argument"),
    (["m\x1b[31m", "search.trials=\x1b[31m"], "search.trials"),
    (["model", "search.trials=" + "9" * 6000], "a number has thousands of digits"),
    (["model", "search.trials=1e400"], "search.trials"),
    (["model", "search.kl_target=nan"], "search.kl_target"),
    (["model", "search.kl_target=inf"], "search.kl_target"),
    (["model", "search=" + "[" * 300], "search"),
    (["model", "search=" + "{" * 2000], "search"),
    (["model", "evaluate=../../conf"], "evaluate"),
    (["model", "evaluate=/etc/passwd"], "evaluate"),
    (["model", "experiment=nowhere"], "experiment"),
    (["model", "evaluate._target_=os.system"], "evaluate._target_"),
    (["model", "capture._target_=[1]"], "capture"),
    (["model", "scoring.scorers=3"], "scoring.scorers"),
    (["model", "run.dir=${oc.env:NO_SUCH_VARIABLE}"], "NO_SUCH_VARIABLE"),
    (["model", "run.dir=${run.dir}"], "run.dir"),
    (["model", "run.dir=${nonsense:x}"], "nonsense"),
    (["--config-dir", "nowhere", "model"], "nowhere"),
    (["--config-name", "nowhere", "model"], "nowhere"),
    (["--nonsense"], "nonsense"),
    (["--cfg", "nonsense", "model"], "nonsense"),
    ([], "no model given"),
    ([""], ""),
    (["="], ""),
    (["model", "\udcff=\udcfe"], ""),
]


@pytest.mark.parametrize(("words", "said"), COMMANDS, ids=lambda value: " ".join(map(ascii, value))[:40])
def test_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    ended = run_in_copy(tmp_path / "here", lambda: cli.main(words))
    told = f"{ended.out[-2000:]}\n{ended.err[-4000:]}"
    assert ended.status == 2, told
    [line] = ended.err.splitlines()
    assert line.startswith("heretic-ds: ") and said in line and "\x1b" not in line, told
    assert len(line) < 700, told
    assert list((tmp_path / "here").iterdir()) == []
