"""ResNet-20 on CIFAR-10 at half the MACs: the searched policy against uniform, before and after the same fine-tuning.

    python benchmarks/cifar10_resnet20.py --data-root DIR --weights resnet20-12fca82f.th --json result.json

Weights: the published checkpoint of akamaster/pytorch_resnet_cifar10 (91.73 % test top-1). It was trained on all 50,000
training images, so the validation split, cut from them, is one that it has seen; the test split is read once, at the
end, for both policies. `--quick` takes fewer candidates and images, and no full fine-tuning.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

import autoprune as ap
from autoprune import data
from autoprune.cli import watching
from autoprune.evaluation import Candidate, measure
from autoprune.evaluation.candidate import FIDELITIES
from autoprune.task import FINALISER


def main() -> None:
    """Search, fine-tune both policies alike, reload the saved network, and print a table."""
    options = _options()
    started = time.monotonic()
    task = ap.Task.named("resnet20", "cifar10", root=options.data_root, weights=options.weights)
    with watching(quiet=True) as progress:
        result = ap.search(
            task,
            budget=options.budget,
            agent=options.agent,
            candidates=options.candidates,
            finetune_steps=options.finetune_steps,
            seed=options.seed,
            sensitivity=(0.5,) if options.quick else (0.25, 0.5, 0.75),
            calibration_images=1000 if options.quick else 2000,
            out=options.out,
            progress=progress,
        )
    searched = time.monotonic() - started
    candidates = {candidate.id: candidate for candidate in result.candidates}
    chosen = {name: candidates[result.summary[name]["id"]] for name in ("picked", "uniform")}
    test = list(task.open_test(FINALISER).batches(500))  # once, for both
    rows = {name: _row(result, candidate, options.epochs, test, task) for name, candidate in chosen.items()}

    reloaded = ap.load(result.run / "pruned")
    found = measure(reloaded, task.val_batches(500), task.metric, task.loss).summary("loaded")
    document = {
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "settings": {key: str(value) for key, value in vars(options).items()},
        "dense": dict(result.dense),
        "evaluations": result.summary["evaluations"],
        "search_seconds": round(searched, 1),
        "seconds": round(time.monotonic() - started, 1),
        **rows,
        "reloaded": {"accuracy": found.accuracy, "saved": result.summary["picked"]["accuracy"]},
    }
    print(_table(document))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def _row(
    result: ap.SearchResult, candidate: Candidate, epochs: int, test: list[data.Batch], task: ap.Task
) -> dict[str, Any]:
    row: dict[str, Any] = {"policy": dict(candidate.policy), "macs": candidate.macs, "params": candidate.params}
    for measurement in candidate.measurements:
        row[measurement.fidelity] = measurement.accuracy
    if epochs:
        network = result.network(candidate).finetune(epochs)
        row["full"] = network.accuracy
        row["test"] = measure(network.model, test, task.metric, task.loss).summary("full").accuracy
    return row


def _table(document: dict[str, Any]) -> str:
    dense = document["dense"]
    columns = [key for key in (*FIDELITIES, "test") if key in document["picked"]]
    lines = [
        f"| policy | MACs | parameters | {' | '.join(columns)} |",
        f"|---|---|---|{'---|' * len(columns)}",
        f"| dense | {dense['macs']:,} | {dense['params']:,} | {dense['accuracy']:.2%} |{' |' * (len(columns) - 1)}",
    ]
    for name in ("uniform", "picked"):
        row = document[name]
        measured = " | ".join(f"{row[key]:.2%}" for key in columns)
        share = row["macs"] / dense["macs"]
        lines.append(f"| {name} | {row['macs']:,} ({share:.1%}) | {row['params']:,} | {measured} |")
    lines.append(
        f"\n{document['evaluations']} evaluations; search {document['search_seconds']:.0f} s, "
        f"all {document['seconds']:.0f} s; "
        f"saved at {document['reloaded']['saved']:.4f}, reloaded at {document['reloaded']['accuracy']:.4f}"
    )
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--budget", default="macs<=50%")
    parser.add_argument("--agent", default="tpe")
    parser.add_argument("--candidates", type=int)
    parser.add_argument("--finetune-steps", type=int)
    parser.add_argument("--epochs", type=int, help="full fine-tuning of both policies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_resnet20"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    for name, full, quick in (("candidates", 40, 3), ("finetune_steps", 0, 0), ("epochs", 3, 0)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    return options


if __name__ == "__main__":
    main()
