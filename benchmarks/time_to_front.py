"""How fast searches reach a good front: this project's strategies, and Heretic's (PyPI ``heretic-llm``) own search.

    python benchmarks/time_to_front.py [--model demo deep experts] [--seeds 5] [--trials 40] [--strategies ...]
    python benchmarks/time_to_front.py --model real --seeds 2 --trials 24 --add
    python benchmarks/time_to_front.py --model real --first-seed 2 --seeds 4 --trials 24 --add

Needs: for Heretic an environment of its own, which ``make bench-setup`` makes; for ``real`` the model that ``make
demo-real`` fetches; ``deep`` and ``experts`` are trained once (``planted_models.py``). Leaves ``results/
time_to_front.json`` and ``.png``, or ``--result``; ``--add`` keeps the other models that the file has, and with
``--first-seed`` the earlier seeds of the same ones.

Searches run one after the other, on one thread, seed by seed each strategy, so that what else the machine does falls on
all alike; this project's in one process, which captures directions and measures the original once. The measure is the
area that the scored trials so far dominate in the plane of refusals (share of the original's) and KL, up to a fixed
point (all refusals, 1 nat), once with KL as it is and once with its logarithm from 1e-6 nats; both as a part of the
largest possible. Seconds count from the start of the process, and from the start of the search; by the clock, and of
the processor.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import machine
from search_quality import hypervolume
from time_to_front_report import picture, summary, table

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "time_to_front.json"
DIRECT, SCREENED, HERETIC = "direct", "screened", "heretic-llm"
MODELS = ("demo", "deep", "experts", "real")
STARTUP = 10
"""Random trials of the demo's settings."""
LEAST_KL = 1e-6
MEASURES = ("logarithmic", "linear")
HERETIC_PYTHON = HERE.parent / ".venv-heretic" / "bin" / "python"


def words_of(model: str) -> list[str]:
    """The overrides that name a model with its prompts."""
    if model == "demo":
        return ["experiment=demo"]
    if model == "real":
        return ["experiment=demo_real"]
    from planted_models import folder_of

    folder = folder_of(model)
    parts = [(kind, part) for kind in ("target", "baseline") for part in ("train", "eval")]
    return [
        "experiment=demo",
        f"model.path={folder}/model",
        f"direction.compare={folder}/planted_direction.safetensors",
        *(f"prompts.{kind}.{part}.source={folder}/prompts/{kind}_{part}.txt" for kind, part in parts),
    ]


def quality(points: Sequence[tuple[float, float]], measure: str) -> float:
    """Area that (share of refusals, KL) dominate, as a part of the largest possible."""
    if measure == "linear":
        return hypervolume(points, (1.0, 1.0))
    decades = -math.log10(LEAST_KL)
    scaled = [(share, math.log10(max(kl, LEAST_KL) / LEAST_KL) / decades) for share, kl in points]
    return hypervolume(scaled, (1.0, 1.0))


def ours(searches: Sequence[tuple[str, int, int]], words: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Searches of this project, in one process, one after the other."""
    file = folder / "told.json"
    command = [sys.executable, str(HERE / "time_to_front_worker.py"), str(file), json.dumps(searches)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with (folder / "log").open("w") as log:
        ended = subprocess.run(
            [*command, *words, f"run.dir={folder}/run"], stdout=log, stderr=log, env={**os.environ, **threads}
        )
    if ended.returncode:
        raise RuntimeError("\n".join((folder / "log").read_text().splitlines()[-15:]))
    told = json.loads(file.read_text())
    return [{**each, "started": told["started"], "ready": told["ready"]} for each in told["searches"]]


def curve(told: dict[str, Any]) -> dict[str, Any]:
    """A search as what is kept of it: seconds of each trial, and the area after it."""
    points, begun = [(trial["share"], trial["kl"]) for trial in told["trials"]], told["search"]
    # The start is the same for all searches of one process: its seconds come before the search's own.
    before = [ready - started for ready, started in zip(told["ready"], told["started"], strict=True)]
    seconds = {
        f"{start}, {clock}": [round(trial["at"][at] - begun[at] + more[at], 3) for trial in told["trials"]]
        for start, more in (("run", before), ("search", [0.0, 0.0]))
        for at, clock in enumerate(("clock", "processor"))
    }
    ends = range(1, len(points) + 1)
    areas = {measure: [round(quality(points[:end], measure), 6) for end in ends] for measure in MEASURES}
    scores = [[round(share, 4), float(f"{kl:.4g}")] for share, kl in points]
    return {"seconds": seconds, "area": areas, "scores": scores, "screened": told.get("screened", 0)}


def measured(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """All searches of a model: seed by seed each of the strategies, which take turns at being the first."""
    words = [*words_of(model), *options.words]
    counts = {DIRECT: options.trials, SCREENED: options.screened_trials or options.trials}
    own = [name for name in options.strategies if name != HERETIC]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    searches = [(s, seed, counts[s]) for seed in seeds for s in own[:: -1 if seed % 2 else 1]]
    found: dict[str, Any] = {strategy: [] for strategy in options.strategies}
    with tempfile.TemporaryDirectory() as folder:
        for told in ours(searches, words, Path(folder)) if own else []:
            found[told["strategy"]].append(curve(told))
    if model == "demo" and HERETIC in options.strategies:
        from time_to_front_heretic import theirs

        for seed in range(options.first_seed, options.first_seed + options.heretic_seeds):
            with tempfile.TemporaryDirectory() as folder:
                told = theirs(seed, options.trials, STARTUP, options.heretic_python, Path(folder))
            found[HERETIC].append(curve(told))
    for strategy, curves in found.items():
        for each in curves:
            ended = {name: seconds[-1] for name, seconds in each["seconds"].items()}
            print(model, strategy, ended, {name: area[-1] for name, area in each["area"].items()}, flush=True)
    return {"trials": options.trials, "words": options.words, "searches": found, "summary": summary(found)}


def earlier(models: dict[str, Any], model: str, options: argparse.Namespace) -> dict[str, list[Any]]:
    """Searches with the seeds before the first one. Raises ValueError where these are not there, or unlike."""
    if not (options.add and options.first_seed):
        return {}
    before = models.get(model, {"searches": {}})
    searches = {name: before["searches"].get(name, []) for name in options.strategies}
    alike = all(before.get(name) == getattr(options, name) for name in ("trials", "words"))
    if not alike or any(len(curves) != options.first_seed for curves in searches.values()):
        raise ValueError(
            f"{model}: there are no {options.first_seed} searches of the same trials and overrides to add to"
        )
    return searches


def added(searches: dict[str, list[Any]], found: dict[str, Any]) -> dict[str, Any]:
    """What was found, behind earlier searches."""
    together = {name: [*searches.get(name, []), *curves] for name, curves in found["searches"].items()}
    return {**found, "searches": together, "summary": summary(together)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS[:3]))
    parser.add_argument("--strategies", nargs="+", default=[DIRECT, SCREENED])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--first-seed", type=int, default=0, help="begin with this one; with --add to the seeds before it"
    )
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--screened-trials", type=int, help="trials of screened searches; by default as many")
    parser.add_argument("--heretic-seeds", type=int, default=5)
    parser.add_argument("--words", nargs="*", default=[], help="more overrides for this project's searches")
    parser.add_argument("--heretic-python", type=Path, default=HERETIC_PYTHON)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--busy", default="shared with other work", help="what else the machine did, for the result")
    parser.add_argument("--add", action="store_true", help="keep the other models of an earlier result")
    options = parser.parse_args()
    before = json.loads(options.result.read_text())["models"] if options.add and options.result.exists() else {}
    models = {**before}
    searches = {model: earlier(before, model, options) for model in options.model}  # refused before hours of work
    for model in options.model:
        found = added(searches[model], measured(model, options))
        models[model] = {**found, "load": [round(each, 1) for each in os.getloadavg()]}
        report = {
            "what": "area of refusals and KL that scored trials dominate, against seconds",
            "reference": [1.0, 1.0],
            "least_kl": LEAST_KL,
            "machine": {**machine(gpu=True), "busy": f"{options.busy}; `load` is the mean load after each model"},
            "models": models,
        }
        options.result.parent.mkdir(parents=True, exist_ok=True)
        options.result.write_text(json.dumps(report) + "\n")
    picture(models, options.result.with_suffix(".png"))
    print(table(models))
    return 0


if __name__ == "__main__":
    sys.exit(main())
