"""Make a Mixture-of-Experts model out of a dense one by sparse upcycling: GGUF in, GGUF out.

In every layer the dense feed-forward network becomes the shared expert; routed experts join it and are
trained for a while on text and chat, all else stays as it is. From a dense file alone (needs torch):

    python tools/upcycle.py DENSE.gguf --out MOE.gguf --text wiki.txt --chat talks.jsonl --minutes 40

With experts that were trained before (needs safetensors, no torch):

    python tools/upcycle.py DENSE.gguf --out MOE.gguf --from-experts EXPERTS.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_file import (
    EXPERT_TYPES,
    Card,
    DenseFile,
    Experts,
    as_stored,
    assemble,
    check_expert_options,
    default_card,
    expert_shape,
    experts_of,
    read_experts,
    save_experts,
)

from edgert.errors import EdgertError, OptionError

if TYPE_CHECKING:
    from upcycle_data import Data
    from upcycle_model import DenseModel
    from upcycle_train import Measured, Trainer

DEFAULT_MINUTES = 40.0


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, parsed and checked as far as that needs no file; OptionError for what contradicts."""
    first_line, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser("upcycle.py", description=first_line)
    parser.add_argument("dense", type=Path, help="dense llama-architecture GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="the GGUF file to write")
    _add_model_options(parser.add_argument_group("the new model"))
    _add_training_options(parser.add_argument_group("training"))
    args = parser.parse_args(argv)
    trained_on = args.text or args.chat
    if args.from_experts and (trained_on or args.resume):
        raise OptionError("--from-experts: nothing is trained then; leave out --text, --chat and --resume")
    if not (trained_on or args.from_experts or args.resume):
        raise OptionError("no training data: give --text or --chat, or --from-experts to train nothing")
    if args.self_samples and not args.chat:
        raise OptionError("--self-samples: the questions come from the conversations; give --chat too")
    if args.resume and not args.checkpoint:
        raise OptionError("--resume: name the file to continue from with --checkpoint")
    if args.out.resolve() == args.dense.resolve():
        raise OptionError(f"--out {args.out}: that is the dense file itself; name another")
    for path in filter(None, (args.out, args.save_experts, args.checkpoint)):
        if not path.parent.is_dir():
            raise OptionError(f"{path}: the folder {path.parent} does not exist; make it first")
    return args


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--experts", type=_count, default=16, help="routed experts per layer (default 16)")
    group.add_argument("--top-k", type=_count, default=2, help="experts that a token uses (default 2)")
    group.add_argument("--width", type=_count, default=64, help="neurons per expert (default 64)")
    group.add_argument("--expert-type", choices=EXPERT_TYPES, default="Q4_0", help="in the file (Q4_0)")
    group.add_argument("--card", type=Path, help="JSON file with the model's name, description and origin")
    group.add_argument("--save-experts", type=Path, metavar="FILE", help="write them as safetensors too")
    group.add_argument(
        "--from-experts", type=Path, metavar="FILE", help="train nothing, take these; their number and width count"
    )


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="plain text, UTF-8")
    group.add_argument("--chat", type=Path, nargs="+", default=[], metavar="FILE", help=".json or .jsonl")
    group.add_argument(
        "--exclude",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="text to measure on later: paragraphs that occur in it are not trained on",
    )
    group.add_argument(
        "--self-samples",
        type=_count,
        default=0,
        metavar="N",
        help="let the dense model answer N questions of the chats, and train on its answers",
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=_minutes, help=f"of training (default {DEFAULT_MINUTES:g})")
    length.add_argument("--steps", type=_count, help="of training")
    group.add_argument("--batch", type=_count, default=4, help="rows in a step (default 4)")
    group.add_argument("--context", type=_count, default=256, help="tokens in a row (default 256)")
    group.add_argument("--seed", type=int, default=0, help="of experts, order and samples (default 0)")
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    group.add_argument("--precision", choices=("bf16", "f32"), default="bf16", help="of products (bf16)")
    group.add_argument("--checkpoint", type=Path, help="save the state there now and then")
    group.add_argument("--resume", action="store_true", help="continue from --checkpoint, data included")


def _count(text: str) -> int:
    """A whole number from 1 on; argparse reports what is not one."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _minutes(text: str) -> float:
    """A positive, finite time."""
    if not 0 < (minutes := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a time")
    return minutes


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def write(dense: DenseFile, experts: Experts, args: argparse.Namespace) -> None:
    """Write the GGUF file, and the expert file if it is wanted."""
    experts = as_stored(experts)
    if args.save_experts:
        save_experts(experts, args.save_experts)
        say(f"wrote {args.save_experts}")
    n_expert, d_expert = expert_shape(dense, experts)
    card = default_card(dense, n_expert, args.top_k)
    if args.card:
        card = Card.read(args.card, card)
    assemble(dense, experts, args.out, top_k=args.top_k, expert_type=args.expert_type, card=card)
    say(
        f"wrote {args.out}: {args.out.stat().st_size:,} bytes, {dense.config.n_layer} layers with {n_expert} "
        f"experts of {d_expert} neurons, top-{args.top_k}, {args.expert_type}"
    )


def upcycle(dense: DenseFile, args: argparse.Namespace) -> None:
    """Train experts for `dense`, write the file, and say what it is worth on held-out text."""
    from upcycle_train import measure

    check_expert_options(dense.config, args.experts, args.width, args.top_k, args.expert_type)
    trainer = start(dense, args)
    model, experts, data = trainer.model, trainer.experts, trainer.data
    say(f"{data.training.size:,} tokens to train on, {sum(map(len, data.held_out.values()))} rows held out")
    say(describe("dense", measure(model, None, data, args.batch)))
    trainer.run(say, args.checkpoint)
    say(describe("trained", measure(model, experts, data, args.batch)))
    write(dense, experts.export(), args)
    experts.load(experts_of(args.out))  # what was written, not what was meant
    say(describe(f"as written, {args.expert_type}", measure(model, experts, data, args.batch)))


def start(dense: DenseFile, args: argparse.Namespace) -> Trainer:
    """Model, experts and data as the command line asks for them, or as the checkpoint holds them."""
    import torch
    from upcycle_model import DenseModel, RoutedExperts
    from upcycle_train import Checkpoint, Plan, Trainer

    if args.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: torch sees no CUDA device; use --device cpu")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = torch.bfloat16 if args.precision == "bf16" else torch.float32
    minutes = args.minutes or DEFAULT_MINUTES
    plan = Plan(args.batch, args.seed, None if args.steps else minutes, args.steps)
    saved = Checkpoint.read(args.checkpoint, device) if args.resume else None
    model = DenseModel(dense, device, kind)
    experts = RoutedExperts(dense, args.experts, args.width, args.top_k, args.seed).to(device)
    trainer = Trainer(model, experts, saved.data if saved else prepare(dense, model, args), plan)
    if saved:
        trainer.resume(saved)
    return trainer


def prepare(dense: DenseFile, model: DenseModel, args: argparse.Namespace) -> Data:
    """Read, clean, sample and encode the training data."""
    from upcycle_data import Encoder, Exclusion, build, questions, read_chat, read_text
    from upcycle_sample import self_samples

    exclusion, encoder = Exclusion(args.exclude), Encoder(dense.metadata())
    chats = [read_chat(path, exclusion) for path in args.chat]
    sources = [read_text(path, exclusion) for path in args.text] + chats
    for source in sources:
        say(f"{source.name}: {len(source.documents)} documents, {source.n_dropped} excluded pieces dropped")
    data = build(sources, encoder, args.context)
    data.check(args.batch)
    if args.self_samples:
        answers = self_samples(model, encoder, questions(chats), args.self_samples, args.seed, say)
        data += build([answers], encoder, args.context)
    return data


def describe(label: str, measured: Measured) -> str:
    """One line of held-out figures."""
    parts = [f"{name} {value:.3f}" for name, value in measured.perplexity.items()]
    if measured.evenness is not None:
        parts.append(f"evenness of expert use {measured.evenness:.2f}")
        parts.append(f"largest share {measured.largest_share:.0%}")
    return f"held-out perplexity, {label}: {', '.join(parts)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; the exit status is 2 for what the caller can mend."""
    try:
        args = options(argv)
        dense = DenseFile(args.dense)
        if args.from_experts:
            write(dense, read_experts(args.from_experts), args)
        else:
            upcycle(dense, args)
    except EdgertError as error:
        print(f"upcycle.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
