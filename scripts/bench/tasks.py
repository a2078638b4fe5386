"""What runs come to, mode by mode, over seeds: accuracy against forward passes, or bits.

    python scripts/bench/tasks.py configs/sudoku.py --out scripts/bench/results/sudoku-9
    python scripts/bench/tasks.py configs/text.py --runs config block_4 block_16 masked \\
        --seeds 0 1 2 --out scripts/bench/results/text

Trains what is not trained yet (`<run>` of each config, `<run>-<seed>` of later seeds), then answers
test questions in several ways (an order of writing, and how many tokens a pass writes), or measures
bits a character of held-out text, the bound and those of several ways, and writes samples. Writes
OUT.json as it goes, and goes on from what it holds, where that is of the same settings; OUT.md; and
of tasks OUT.png.
"""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from dllm_jax import checkpoint, experiments, generate, pretraining, recipes, tasks, training
from dllm_jax.bench.report import provenance
from dllm_jax.cli.training import load_config
from dllm_jax.training.identity import described

STEPS, THRESHOLDS = (1, 2, 4, 8, 16, 32), (0.5, 0.8, 0.9, 0.95, 0.99)
GIVEN, WRITTEN = 64, 192  # tokens of a sample: of held-out text, and the model's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to train and to ask."""

    config: tyro.conf.Positional[Path]
    """A file of `configs/`."""
    out: Path
    """Where the results go, without a suffix."""
    runs: tuple[str, ...] = ("config", "block", "tri", "ar")
    """Names in the file."""
    seeds: tuple[int, ...] = (0,)
    count: int = 1000
    """Test questions for the first way of a mode."""
    sweep: int = 256
    """Test questions for the others."""
    paced: int = 64
    """Held-out rows of text for the bits of each way."""
    batch: int = 64
    train: bool = True
    """False: what is not trained is left out."""


def main(options: Options) -> None:
    """Trains, asks, writes."""
    file = options.out.with_suffix(".json")
    held = json.loads(file.read_text()) if file.exists() else {"runs": {}}
    for seed in options.seeds:
        for name in options.runs:
            config = load_config(f"{options.config}:{name}", pretraining.Train)
            mode = str(config.run)
            run = config.run.with_name(config.run.name + (f"-{seed}" if seed else ""))
            config = dataclasses.replace(
                config, run=run, fit=dataclasses.replace(config.fit, seed=seed)
            )
            own = held["runs"].get(str(run), {"mode": mode})
            check_same(run, config, own)
            if not (run / "model").exists():
                if not options.train:
                    continue
                pretraining.train(config)
            held["runs"][str(run)] = own
            for _ in asked(config, run, options, own):
                held |= provenance()
                own.setdefault("commit", held["commit"])
                options.out.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(held, indent=1) + "\n")
                options.out.with_suffix(".md").write_text(table(held))
                if any("accuracy" in way for way in own["ways"].values()):
                    draw(held, options.out.with_suffix(".png"))


def check_same(run: Path, config: pretraining.Train, own: dict[str, Any]) -> None:
    """Raises ValueError where the run, or what is held of it, is of other settings."""
    wanted: dict[str, Any] = pretraining.settings_of(config)
    wanted |= {"data": described(config.data), "objective": described(config.objective)}
    wanted |= {name: getattr(config.fit, name) for name in ("steps", "batch", "length", "seed")}
    file = run / "settings.json"
    made = json.loads(file.read_text()) if file.exists() else {}
    for name, value in wanted.items():
        for where, found in ((run, made), ("the results", own.get("settings", {}))):
            if found.get(name, value) != value:
                raise ValueError(
                    f"{where} is of {name}={found[name]}, the config of {value}: move it away"
                )
    own["settings"] = wanted


def asked(
    config: pretraining.Train, run: Path, options: Options, own: dict[str, Any]
) -> Iterator[None]:
    """Adds to `own` what training took, and what the model answers, way by way."""
    model, params = checkpoint.load(run / "model")
    rows = [row for row in training.read_metrics(run / "metrics.jsonl") if "seconds" in row]
    own |= {
        "data": repr(getattr(config.data, "task", config.data)),
        "parameters": sum(int(np.size(x)) for x in jax.tree.leaves(params)),
        "steps": config.fit.steps,
        "rows": config.fit.steps * config.fit.batch,
        "hours": float(np.median([row["seconds"] for row in rows])) * config.fit.steps / 3600,
        "loss": float(np.mean([row["loss"] for row in rows[-20:]])),
    }
    own.setdefault("ways", {})
    if not isinstance(config.data, pretraining.TaskData):
        if "bits" not in own:
            bits = experiments.Bits(data=config.data, rows=options.sweep, samples=64)
            own["bits"] = dict(bits(model, params, config.fit.steps))
            print(run, own["bits"], flush=True)
            yield
        if "samples" not in own:
            own["samples"] = list(samples(config, model, params))
            yield
        for way, recipe in paces(config):
            if way not in own["ways"]:
                bits = experiments.Bits(
                    data=config.data, rows=options.paced, batch=options.batch, recipe=recipe
                )
                own["ways"][way] = dict(bits(model, params, config.fit.steps))
                print(run, way, own["ways"][way], flush=True)
                yield
        return
    task = config.data.task
    for number, (way, recipe) in enumerate(ways(config, task)):
        if way in own["ways"]:
            continue
        count = options.sweep if number else options.count
        solved = tasks.solve(
            model, params, task, recipe=recipe, count=count, batch=options.batch,
            key=jax.random.key(0),
        )  # fmt: skip
        own["ways"][way] = {
            "count": count, "accuracy": solved.accuracy, "stderr": solved.stderr,
            "passes": solved.passes, "overhead": solved.overhead,
        }  # fmt: skip
        print(run, way, own["ways"][way], flush=True)
        yield


def samples(config: pretraining.Train, model: Any, params: Any) -> Iterator[dict[str, Any]]:
    """How the model goes on from the first held-out row, drawn at temperature 1."""
    data: Any = config.data
    opening = data.source("heldout")[0].tokens[:GIVEN].tolist()
    size = model.config.block_size
    if model.config.attention == "bidirectional":
        drawn = partial(recipes.llada, block_size=0, remasking="random", temperature=1.0)
        asked = {"one token a pass": drawn(), "4 a pass": drawn(steps_per_block=WRITTEN // 4)}
    elif model.config.attention == "block_causal":
        drawn = partial(recipes.sdar, block_size=size, temperature=1.0)
        asked = {
            "one token a pass": drawn(order="sequential"),
            "4 a pass": drawn(order="static", steps_per_block=size // 4),
        }
    else:
        asked = {"one token a pass": recipes.ar(temperature=1.0)}
        if model.config.mask_id is not None:
            asked["self-speculation"] = recipes.self_speculative(width=3, temperature=1.0)
    for way, recipe in asked.items():
        found = generate(
            model, params, [opening], recipe=recipe, max_new_tokens=WRITTEN, key=jax.random.key(0)
        )
        text = found.tokens[0, : found.lengths[0]].tolist()
        given, said = (data.tokenizer.decode(ids) for ids in (opening, text))
        yield {"way": way, "passes": float(found.nfe[0]), "given": given, "text": said}


def paces(config: pretraining.Train) -> Iterator[tuple[str, recipes.Recipe]]:
    """Deterministic orders of writing a text, from one token a pass to many."""
    model: Any = config.model
    size, length = model.block_size, config.fit.length
    if model.attention == "bidirectional":
        yield "one a pass, most confident first", recipes.llada(block_size=0)
        for count in (2, 4, 8, 16):
            steps = -(-length // count)
            yield f"{count} a pass", recipes.llada(block_size=0, steps_per_block=steps)
    elif model.attention == "block_causal":
        yield "one a pass, left to right", recipes.sdar(block_size=size, order="sequential")
        yield "one a pass, most confident first", recipes.sdar(block_size=size, order="static")
        for count in (2, 4, 8, 16):
            if count <= size:
                steps = size // count
                recipe = recipes.sdar(block_size=size, order="static", steps_per_block=steps)
                yield f"{count} a pass", recipe
        for threshold in THRESHOLDS[:2]:
            yield f"threshold {threshold}", recipes.sdar(block_size=size, threshold=threshold)
    else:
        yield "autoregressive", recipes.ar()
        if model.mask_id is not None:
            size = config.objective.noise.block_size  # pyrefly: ignore
            for threshold in THRESHOLDS[:2]:
                yield (
                    f"threshold {threshold}",
                    recipes.block_diffusion(block_size=size, threshold=threshold),
                )


def ways(config: pretraining.Train, task: tasks.Task) -> Iterator[tuple[str, recipes.Recipe]]:
    """The recipes that a mode is asked by; the first is the one that it is meant for."""
    model: Any = config.model
    if model.attention == "bidirectional":
        yield "one a pass, most confident first", recipes.llada(block_size=0)
        yield "one a pass, in random order", recipes.llada(block_size=0, remasking="random")
        for steps in STEPS:
            yield f"{steps} passes", recipes.llada(block_size=0, steps_per_block=steps)
        for threshold in THRESHOLDS:
            yield (
                f"threshold {threshold}",
                recipes.fast_dllm(cache="none", block_size=0, threshold=threshold),
            )
    elif model.attention == "block_causal":
        size = model.block_size
        yield "one a pass, most confident first", recipes.sdar(block_size=size, order="static")
        yield "one a pass, left to right", recipes.sdar(block_size=size, order="sequential")
        yield "a block a pass", recipes.sdar(block_size=size, order="static", steps_per_block=1)
        for threshold in THRESHOLDS:
            yield f"threshold {threshold}", recipes.sdar(block_size=size, threshold=threshold)
    else:
        yield "autoregressive", recipes.ar()
        if model.mask_id is not None:
            size = config.objective.noise.block_size  # pyrefly: ignore
            for width in (2, 3):
                yield f"self-speculation, {width} drafts", recipes.self_speculative(width=width)
            for threshold in THRESHOLDS:
                yield (
                    f"threshold {threshold}",
                    recipes.block_diffusion(block_size=size, threshold=threshold),
                )


def table(held: dict[str, Any]) -> str:
    """Training and answers, as Markdown: means over seeds, and between seeds the deviation."""
    modes: dict[str, list[dict[str, Any]]] = {}
    for own in held["runs"].values():
        modes.setdefault(own["mode"], []).append(own)
    commits = dict.fromkeys(own.get("commit", held["commit"]) for own in held["runs"].values())
    lines = [
        f"{held['device']}, jax {held['versions']['jax']}, {held['date']}, commit"
        f" {', '.join(commits)}. Runs of an experiment have the same backbone, parameters and"
        " training FLOPs (both streams counted), and rows differ. Accuracy on test questions, ± one"
        " standard error of the questions, or where there are several seeds the deviation between"
        " them. Overhead: entries processed for a token of an answer.",
        "",
    ]
    lines += [f"* `{data}`" for data in dict.fromkeys(own["data"] for own in held["runs"].values())]
    head = ("run", "seeds", "parameters", "steps", "rows", "hours", "last loss")
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for mode, own in modes.items():
        mean = lambda name, own=own: float(np.mean([x[name] for x in own]))  # noqa: E731
        lines.append(
            f"| {mode} | {len(own)} | {own[0]['parameters']:,} | {own[0]['steps']:,} |"
            f" {own[0]['rows']:,} | {mean('hours'):.2f} | {mean('loss'):.3f} |"
        )
    if any("bits" in own for own in held["runs"].values()):
        head = ("run", "bits a character, held out", "more than the first", "the noise's error")
        lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        first: list[float] = []
        for mode, own in modes.items():
            each = [x["bits"]["per_character"] for x in own if "bits" in x]
            first = first or each
            more = [one - other for one, other in zip(each, first, strict=False)]  # seed by seed
            error = np.mean([x["bits"]["stderr"] for x in own if "bits" in x])
            lines.append(f"| {mode} | {spread(each)} | {spread(more, '+')} | {error:.3f} |")
    answered = [x for own in held["runs"].values() for x in own["ways"].values()]
    if answered:
        asked = "accuracy, %" if "accuracy" in answered[0] else "bits a character, exact"
        count = "questions" if "accuracy" in answered[0] else "characters"
        lines += ["", f"| run | way | {count} | {asked} | passes | overhead |"]
        lines += ["|---|---|---|---|---|---|"]
    for mode, own in modes.items():
        for way in own[0]["ways"]:
            each = [x["ways"][way] for x in own if way in x["ways"]]
            if "accuracy" in each[0]:
                accuracy = [x["accuracy"] for x in each]
                error = np.std(accuracy, ddof=1) if len(each) > 1 else each[0]["stderr"]
                count = each[0]["count"]
                told = f"{100 * np.mean(accuracy):.1f} ± {100 * error:.1f}"
            else:
                count = round(each[0]["characters"])
                told = spread([x["per_character"] for x in each])
            passes, overhead = (np.mean([x[n] for x in each]) for n in ("passes", "overhead"))
            lines.append(f"| {mode} | {way} | {count:,} | {told} | {passes:.1f} | {overhead:.2f} |")
    for mode, own in modes.items():
        for sample in own[0].get("samples", ()):
            lines += ["", f"{mode}, {sample['way']} ({sample['passes']:.0f} passes):", ""]
            shown = f"{sample['given']}|{sample['text']}"  # a bar where the model begins
            lines += [f"    {line}" for line in shown.splitlines()]
    return "\n".join(lines) + "\n"


def spread(each: list[float], sign: str = "") -> str:
    """A mean, and the deviation of several."""
    deviation = f" ± {np.std(each, ddof=1):.3f}" if len(each) > 1 else ""
    return f"{np.mean(each):{sign}.3f}{deviation}"


def draw(held: dict[str, Any], path: Path) -> None:
    """Accuracy against passes and against overhead."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    names = list(dict.fromkeys(own["mode"] for own in held["runs"].values()))
    kinds = {"o-": " passes", "s--": "threshold", "x": ""}  # quotas, thresholds, and the others
    for axis, name in zip(axes, ("passes", "overhead"), strict=True):
        for own in held["runs"].values():
            left = dict(own["ways"])
            for style, words in kinds.items():
                part = [left.pop(way) for way in list(left) if words in way]
                points = sorted((x[name], 100 * x["accuracy"]) for x in part)
                if points:
                    colour = f"C{names.index(own['mode'])}"
                    axis.plot(*zip(*points, strict=True), style, color=colour, markersize=5)
        axis.set_xlabel({"passes": "forward passes", "overhead": "entries for a token"}[name])
        axis.set_xscale("log")
    for number, name in enumerate(names):
        axes[0].plot([], [], color=f"C{number}", label=name)
    for style, words in kinds.items():
        label = {" passes": "so many passes", "": "other ways"}.get(words, words)
        axes[0].plot([], [], style, color="grey", label=label)
    axes[0].set_ylabel("questions answered right, %")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
