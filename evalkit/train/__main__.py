"""`python -m evalkit.train run|evaluate|tokenizer|card`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from evalkit.errors import InputError
from evalkit.train import card, checkpoint, evaluate, tokenizer
from evalkit.train.config import TINY, TrainConfig, refine
from evalkit.train.loop import Trainer

# Of a run's minutes: evaluation, start-up and exports keep this much, the phases share the rest.
RESERVE, RESERVE_SECONDS = 0.15, 80.0
SHARES = (0.62, 0.18, 0.20)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evalkit.train", description="How dsa-nano is made.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, export and evaluate")
    run.add_argument(
        "--out", type=Path, required=True, help="directory of the run; its export/ is the checkpoint"
    )
    run.add_argument("--minutes", type=float, default=7.0, help="wall time, evaluation included")
    run.add_argument("--seed", type=int, default=1)
    run.add_argument("--resume", action="store_true", help="continue from OUT/state.pt")
    run.add_argument(
        "--refine", type=Path, help="start from this run's export/ and train mostly on register traces"
    )
    run.add_argument("--lengths", type=int, nargs="+", default=[2048, 1024, 4096])
    run.add_argument("--size", choices=("nano", "tiny"), default="nano", help="tiny: a rehearsal on a CPU")
    run.add_argument("--workers", type=int, help="processes that make documents")
    run.add_argument(
        "--documents", type=int, default=256, help="documents a task in the evaluation; 0 for none"
    )
    scored = commands.add_parser("evaluate", help="exact match on held-out documents")
    scored.add_argument("checkpoint", type=Path)
    scored.add_argument("--documents", type=int, default=256)
    scored.add_argument("--lengths", type=int, nargs="+", default=[2048, 1024, 4096])
    for command in (run, scored):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made = commands.add_parser("tokenizer", help="write the tokenizer")
    made.add_argument("--out", type=Path, required=True)
    written = commands.add_parser("card", help="write README.md from training.json and evaluation.json")
    written.add_argument("checkpoint", type=Path)
    return parser


def _run(arguments: argparse.Namespace, device: torch.device) -> None:
    state = arguments.out / "state.pt"
    if arguments.resume and not state.exists():
        raise InputError(f"there is no {state} to resume from: leave --resume out to train from the start")
    if not arguments.resume and arguments.out.exists() and any(arguments.out.iterdir()):
        raise InputError(
            f"{arguments.out} is not empty: --resume goes on with a run, another --out begins one"
        )
    if arguments.refine is not None and not (arguments.refine / "training.json").exists():
        raise InputError(f"{arguments.refine} has no training.json: name the export/ of a run that has ended")
    config = TINY if arguments.size == "tiny" else TrainConfig()
    budget = 60 * arguments.minutes
    budget -= min(RESERVE_SECONDS, RESERVE * budget)
    dense, indexer, joint = (budget * share for share in SHARES)
    config = replace(config, seconds=(dense, indexer, joint), seed=arguments.seed)
    if arguments.refine is not None:
        config = refine(config)
    if arguments.workers:
        config = replace(config, workers=arguments.workers)
    trainer = Trainer(config, arguments.out, device)
    if arguments.resume:
        trainer.resume()
    elif arguments.refine is not None:
        trainer.model.load_state_dict(checkpoint.load(arguments.refine).state_dict())
        trainer.origin = json.loads((arguments.refine / "training.json").read_text())
    trainer.run()
    if arguments.documents:
        lengths = tuple(arguments.lengths) if arguments.size == "nano" else (256,)
        evaluate.evaluate(arguments.out / "export", device, arguments.documents, lengths)
    card.write(arguments.out / "export")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 64 for bad input, said in one line."""
    arguments = _parser().parse_args(argv)
    try:
        _dispatch(arguments)
    except InputError as error:
        print(error, file=sys.stderr)
        return 64
    return 0


def _dispatch(arguments: argparse.Namespace) -> None:
    if arguments.command in ("run", "evaluate"):
        device = torch.device(arguments.device)
        if arguments.command == "run":
            _run(arguments, device)
        else:
            evaluate.evaluate(arguments.checkpoint, device, arguments.documents, tuple(arguments.lengths))
    elif arguments.command == "tokenizer":
        tokenizer.save(tokenizer.train(), arguments.out)
    else:
        card.write(arguments.checkpoint)


if __name__ == "__main__":
    sys.exit(main())
