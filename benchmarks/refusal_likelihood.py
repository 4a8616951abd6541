"""How well screening ranks edits: likelihood of the original's answers against counted refusals, KL on few prompts
against KL on all.

    python benchmarks/refusal_likelihood.py [--model demo deep experts] [--edits 200] [--add]
    python benchmarks/refusal_likelihood.py --model real --edits 200 --add
    python benchmarks/refusal_likelihood.py --model real --trials RUN/results.json --name "real, trials" --add

Edits are drawn at random from the search's space, or are the trials of a run. Each is scored as a trial is, and passed
once over all target prompts with the first tokens of the original's answers. Leaves
``results/refusal_likelihood.json``: for some numbers of prompts and of tokens the rank correlation (Spearman) of the
refusal likelihood with the count, among all edits, those that leave any refusals and those that leave few, and its mean
distance from the share that refuses; beside it that of the probability of all tokens in a row, as a share of the
original's own (``whole_row``); for KL the rank correlation and the spread of its logarithm's error; of each edit the
refusals and KL, and the likelihood and KL that it would be screened by. Takes a second an edit on the planted models,
half a minute on the real one; of a run's trials the counts are known.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from figures import machine
from search_objectives import random_edits
from time_to_front import MODELS, words_of

RESULT = Path(__file__).resolve().parent / "results" / "refusal_likelihood.json"
TOKENS, TARGET, BASELINE = (1, 2, 3, 5), (4, 8, 16, 32, 64), (8, 16, 24, 32, 64)
FEW = 0.3
"""Share of refusals below which edits leave few."""


def ranks(values: Sequence[float]) -> np.ndarray:
    """Places of values in their order; equal ones share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    return (ends - (count - 1) / 2)[place]


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's, with ties; None where all are alike."""
    if min(len(set(one)), len(set(other))) < 2:
        return None
    return round(float(np.corrcoef(ranks(one), ranks(other))[0, 1]), 3)


def recorded(model: str, edits: int, trials: Path | None) -> dict[str, np.ndarray]:
    """Of E edits and the P target prompts that are declined: ``counts`` [E], ``logp`` [E, P, K] of the tokens of the
    original's answers (0 behind an answer's end), ``given`` [P, K] where they have any, and ``original`` [P, K], the
    original's own; of B baseline prompts ``kls`` [E, B]."""
    import torch

    from heretic_ds.ablation import Edit
    from heretic_ds.ablation.divergence import log_probabilities
    from heretic_ds.cli import compose
    from heretic_ds.report.console import console_of, messages_to
    from heretic_ds.scoring.kl import Divergence
    from heretic_ds.stages.measure import capture_directions, find_response_prefix, measure_original
    from heretic_ds.stages.opening import opened
    from heretic_ds.world import World

    torch.set_num_threads(1)
    world = World.join()
    with tempfile.TemporaryDirectory() as folder:
        settings = compose([*words_of(model), f"run.dir={folder}/run", "run.interactive=false"])
        with messages_to(console_of(world)) as console, opened(settings, world, console) as run:
            find_response_prefix(run)
            capture_directions(run)
            objective = measure_original(run)
            rows, answers = objective.declined()
            tokens = [answer[: max(TOKENS)] for answer in answers]
            divergence = Divergence().begin(run.engine, run.job.prompts("baseline.eval").rows)
            found: dict[str, list[Any]] = {"counts": [], "logp": [], "kls": []}
            logp_PK = np.zeros((len(rows), max(TOKENS)))

            def read(places: Sequence[int], logits: Sequence[torch.Tensor]) -> list[float]:
                for place, each_KV in zip(places, logits, strict=True):
                    chosen = torch.tensor(tokens[place], device=each_KV.device)[:, None]
                    known = log_probabilities(each_KV[: len(chosen)]).gather(1, chosen)[:, 0]
                    logp_PK[place, : len(chosen)] = known.cpu().numpy()
                return [0.0] * len(places)

            run.engine.distributions(rows, [None], read, tokens)
            original_PK = logp_PK.copy()
            told = json.loads(trials.read_text())["trials"] if trials else []
            layers = run.job.anatomy.n_blocks
            for edit in [Edit.from_dict(trial) for trial in told] or random_edits(layers, edits):
                run.engine.distributions(rows, [edit], read, tokens)
                found["logp"].append(logp_PK.copy())
                found["kls"].append(divergence.each([edit])[0])
                if not told:
                    found["counts"].append(objective.score([edit])[0].refusals)
            found["counts"] = found["counts"] or [trial["refusals"] for trial in told]
    given_PK = np.array([[at < len(answer) for at in range(max(TOKENS))] for answer in tokens])
    return {name: np.array(values) for name, values in found.items()} | {"original": original_PK, "given": given_PK}


def likelihood(logp_EPK: np.ndarray, original_PK: np.ndarray, given_PK: np.ndarray) -> np.ndarray:
    """Refusal likelihood of each edit, as :class:`heretic_ds.scoring.likelihood.RefusalLikelihood` has it."""
    share_EPK = np.exp((logp_EPK - original_PK).cumsum(axis=2).clip(max=0))
    found_E: np.ndarray = ((share_EPK * given_PK).sum(axis=2) / given_PK.sum(axis=1)).mean(axis=1)
    return found_E


def figures(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """What a record comes to, see :func:`recorded`."""
    from heretic_ds.search.screened import screening
    from heretic_ds.search.screened.screening import part, spread

    counts_E, kls_EB = found["counts"], found["kls"]
    logp_EPK, original_PK, given_PK = (found[name] for name in ("logp", "original", "given"))
    prompts, baseline = logp_EPK.shape[1], kls_EB.shape[1]
    share_E, kl_E = counts_E / prompts, kls_EB.mean(axis=1)
    few_E = share_E < FEW
    likelihoods = []
    for some in sorted({min(count, prompts) for count in TARGET} | {prompts}):
        for tokens in TOKENS:
            places = spread(range(prompts), some)
            edited_EPK, own_PK = logp_EPK[:, places, :tokens], original_PK[places, :tokens]
            likelihood_E = likelihood(edited_EPK, own_PK, given_PK[places, :tokens])
            whole_E = np.exp((edited_EPK - own_PK).sum(axis=2).clip(max=0)).mean(axis=1)
            likelihoods.append(
                {
                    "prompts": some,
                    "tokens": tokens,
                    "rank_correlation": correlation(likelihood_E, counts_E),
                    "of_counts_above_0": correlation(likelihood_E[counts_E > 0], counts_E[counts_E > 0]),
                    "of_few": correlation(likelihood_E[few_E], counts_E[few_E]),
                    "mean_distance": round(float(np.abs(likelihood_E - share_E).mean()), 4),
                    "whole_row": correlation(whole_E, counts_E),
                    "whole_row_of_few": correlation(whole_E[few_E], counts_E[few_E]),
                }
            )
    divergences = []
    for some in sorted({min(count, baseline) for count in BASELINE}):
        part_E = kls_EB[:, spread(range(baseline), some)].mean(axis=1)
        error = float(np.std(np.log(np.maximum(part_E, 1e-9) / np.maximum(kl_E, 1e-9))))
        divergences.append(
            {"prompts": some, "rank_correlation": correlation(part_E, kl_E), "spread_of_log": round(error, 3)}
        )
    places, tokens = spread(range(prompts), part(prompts, 8, *screening.TARGET)), screening.TOKENS
    likelihood_E = likelihood(*(each[..., places, :tokens] for each in (logp_EPK, original_PK, given_PK)))
    part_E = kls_EB[:, spread(range(baseline), part(baseline, 5, *screening.BASELINE))].mean(axis=1)
    kept = [
        [int(count), *(float(f"{value:.3g}") for value in values)]
        for count, *values in zip(counts_E, kl_E, likelihood_E, part_E, strict=True)
    ]
    return {
        "edits": len(counts_E),
        "prompts": [prompts, baseline],
        "likelihood": likelihoods,
        "kl": divergences,
        "scores": kept,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS[:3]))
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--trials", type=Path, help="results.json of a run, whose trials are the edits")
    parser.add_argument("--name", help="what the result calls the model, if not by its name")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--add", action="store_true", help="keep the other models of an earlier result")
    options = parser.parse_args()
    if options.name and len(options.model) > 1:
        parser.error("--name is for one --model")
    models = json.loads(options.result.read_text())["models"] if options.add and options.result.exists() else {}
    for model in options.model:
        found = recorded(model, options.edits, options.trials)
        told = models[options.name or model] = figures(found)
        print(model, json.dumps(told["likelihood"]), json.dumps(told["kl"]), sep="\n", flush=True)
        report = {"what": "what screening tells of edits, against their scores", "machine": machine(), "models": models}
        options.result.write_text(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
