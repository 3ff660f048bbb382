"""Sub-commands that use a pre-trained encoder."""

import argparse
import os
from typing import Any

from lut_ds.cli.parser import DONE, STOPPED, Answer, Commands, Parser, add_overrides, positive

SOURCES = (
    "run, checkpoint or export folder; .safetensors or .pth of timm, LUT, MAE, MoCo v3, DINO, iBOT; timm:NAME (random "
    "weights), timm:NAME.TAG (those that timm publishes) or timm:NAME:FILE"
)


def export(args: argparse.Namespace) -> Answer:
    """Write the encoder for timm, for transformers, or as a program, with a model card."""
    from lut_ds.transfer.interchange import export

    result = export(args.source, args.kind, args.output, args.format, args.heads)
    if args.format != "timm":
        told = result.get("difference")
        checked = "" if told is None else f"; run from the file, it differs by {told:.1e} of the largest value"
        return result, f"wrote {', '.join(result['files'])}{checked}", DONE
    whose = (
        f"{result['kind'] or 'weights'} of {args.source if result['step'] is None else 'step ' + str(result['step'])}"
    )
    left = ", ".join(f"{part} ({count} tensors)" for part, count in result["left_out"].items())
    return result, f"wrote {result['weights']} ({whose}){'; left out: ' + left if left else ''}", DONE


def model_source(text: str) -> str:
    """A checkpoint as a recipe keeps it: a path that means the same in every folder; timm:NAME[:FILE] as it is."""
    return text if text.startswith("timm:") else os.path.abspath(os.path.expanduser(text))


def finetune(args: argparse.Namespace) -> Answer:
    """Fine-tune a pre-trained encoder as a classifier, or continue that."""
    from lut_ds.transfer.config import load_finetune_recipe
    from lut_ds.transfer.finetune import finetune

    recipe = load_finetune_recipe(args.recipe, [*args.override, f"model.source={model_source(args.source)}"])
    result = finetune(recipe, args.recipe)
    if result["stopped_by"]:
        text = f"stopped by {result['stopped_by']} at step {result['step']} of {result['steps']}; {result['folder']}"
        return result, text, STOPPED
    best = result["best"]
    text = (
        f"top-1 {best['top1']:.2f} %, top-5 {best['top5']:.2f} %, mean of classes {best['mean_class']:.2f} % "
        f"(epoch {best['epoch']:g}); {result['weights']}"
    )
    return result, text, DONE


def knn(args: argparse.Namespace) -> Answer:
    """Classify validation images by their nearest training images, by features of a frozen model."""
    from lut_ds.transfer.evaluate import evaluate_knn

    results = evaluate_knn(request(args, "mean"), tuple(args.k), args.temperature)
    lines = [f"k = {k:>4}: top-1 {value:.2f} %" for k, value in results["top1"].items()]
    return results, "\n".join([_what(results), *lines, f"written to {results['output']}"]), DONE


def probe(args: argparse.Namespace) -> Answer:
    """Train a linear classifier on features of a frozen model.

    quick: features are computed once, and many learning rates and weight decays trained on them side by side. mae: the
    published protocol (LARS, BatchNorm without affine, augmented images); interrupted, the same command continues.
    """
    from lut_ds.transfer.evaluate import evaluate_linear, evaluate_quick
    from lut_ds.transfer.linear import Protocol
    from lut_ds.transfer.probe import Sweep

    given = {key: getattr(args, key) for key in ("epochs", "batch") if getattr(args, key) is not None}
    if args.protocol == "quick":
        results = evaluate_quick(request(args, "mean"), Sweep(**given, seed=args.seed))
        chosen = results["chosen"]
        how = f"learning rate {chosen['lr']:g}, weight decay {chosen['weight_decay']:g} (chosen on held-out images)"
    else:
        protocol = Protocol(**given, blr=args.blr, warmup_epochs=args.warmup_epochs, seed=args.seed)
        results = evaluate_linear(request(args, "cls"), protocol)
        if results.get("stopped_by"):
            text = f"stopped by {results['stopped_by']} at step {results['step']} of {results['steps']}"
            return results, f"{text}; the same command continues", STOPPED
        how = f"{results['settings']['epochs']} epochs, batch {protocol.batch}, LARS at {protocol.lr:g}"
    top5 = "" if results["top5"] is None else f", top-5 {results['top5']:.2f} %"
    text = f"{_what(results)}\ntop-1 {results['top1']:.2f} %{top5}; {how}\nwritten to {results['output']}"
    return results, text, DONE


def request(args: argparse.Namespace, pool: Any) -> Any:
    """What every evaluation of a frozen model takes; `pool` is that of this one where none is named."""
    from lut_ds.transfer.evaluate import Request

    names = ("source", "kind", "data", "image_size", "heads", "output", "cache", "batch_size", "threads", "precision")
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return Request(**given, pool=args.pool or pool)


def _what(results: dict[str, Any]) -> str:
    """The model and the data, and what was not taken from a file."""
    model, images = results["model"], results["images"]
    kind = "random weights" if model["random"] else f"{model['format']}, {model['kind'] or 'one set of weights'}"
    left = ", ".join(f"{part} ({count})" for part, count in model["left_out"].items())
    lines = [f"{model['source']} ({kind}), {images['train']:,} training and {images['val']:,} validation images"]
    return "\n".join([*lines, f"left out of the file: {left}"] if left else lines)


def _numbers(text: str) -> list[int]:
    """`10,20`, for argparse."""
    return [positive(word) for word in text.split(",")]


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text!r}")
    return value


def add_frozen(sub: Parser) -> None:
    """Arguments of every evaluation on features of a frozen model."""
    add_model(sub)
    sub.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the forward pass (default fp32)")
    sub.add_argument("--cache", metavar="DIR", help="folder of computed features (default: evaluations/features)")


def add_model(sub: Parser) -> None:
    """A frozen model, the data that it is shown, and where results go."""
    sub.add_argument("source", help=SOURCES)
    sub.add_argument(
        "--data", metavar="DIR", help="folder with train/<class>/ and val/<class>/ (default: the run's own)"
    )
    which = sub.add_mutually_exclusive_group()
    which.add_argument(
        "--ema", dest="kind", action="store_const", const="ema", help="the average (default if there is one)"
    )
    which.add_argument("--student", dest="kind", action="store_const", const="student", help="the student's weights")
    sub.add_argument("--pool", choices=("mean", "cls"), help="mean of the patch tokens, or the cls token")
    sub.add_argument(
        "--image-size", type=positive, metavar="S", help="pixels (default: as trained); positions are resampled"
    )
    sub.add_argument("--heads", type=positive, help="attention heads of a file whose size is not published")
    sub.add_argument(
        "--batch-size", type=positive, default=128, metavar="N", help="images a forward pass (default 128)"
    )
    sub.add_argument("--threads", type=positive, metavar="N", help="decoding threads")
    sub.add_argument("-o", "--output", metavar="DIR", help="folder of the results (default: evaluations/ in the run)")


def _add_probe(commands: Commands) -> None:
    sub = commands.add(probe)
    add_frozen(sub)
    sub.add_argument("--protocol", choices=("quick", "mae"), default="quick")
    sub.add_argument(
        "--epochs", type=positive, metavar="N", help="default 50 (quick) or as published (mae: 90; ViT-L and H: 50)"
    )
    sub.add_argument("--batch", type=positive, metavar="N", help="images an update, default 256 (quick) or 16384 (mae)")
    sub.add_argument("--blr", type=_positive_float, default=0.1, help="mae: learning rate at batch 256 (default 0.1)")
    sub.add_argument("--warmup-epochs", type=_positive_float, default=10.0, metavar="N", help="mae: default 10")
    sub.add_argument("--seed", type=int, default=0, help="of batches, crops and the first weights (default 0)")


def add(commands: Commands) -> None:
    """Add this group's sub-commands."""
    sub = commands.add(knn)
    add_frozen(sub)
    sub.add_argument("--k", type=_numbers, default=[10, 20], metavar="K,K", help="neighbours (default 10,20)")
    sub.add_argument("--temperature", type=_positive_float, default=0.07, help="of the votes (default 0.07)")
    _add_probe(commands)
    sub = commands.add(export)
    sub.add_argument("source", help=SOURCES)
    sub.add_argument(
        "--format",
        choices=("timm", "hf", "torch-export", "onnx", "torchscript"),
        default="timm",
        help="timm (default); hf: a ViTModel of transformers; or a program",
    )
    which = sub.add_mutually_exclusive_group()
    which.add_argument(
        "--ema",
        dest="kind",
        action="store_const",
        const="ema",
        help="the average (default if there is one)",
    )
    which.add_argument("--student", dest="kind", action="store_const", const="student", help="the student's weights")
    sub.add_argument("--heads", type=positive, help="attention heads of a file whose size is not published")
    sub.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write")
    sub = commands.add(finetune)
    sub.add_argument("source", help=SOURCES)
    sub.add_argument("recipe", help="name of a shipped fine-tuning recipe (finetune_vitb16, ...), or a .yaml file")
    add_overrides(sub)
