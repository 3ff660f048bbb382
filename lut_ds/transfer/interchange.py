"""`lut-ds export`: an encoder for timm, for Hugging Face's transformers, or as a program, with a model card."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lut_ds.analysis.figures import write_aside
from lut_ds.errors import UserError
from lut_ds.transfer.card import model_card
from lut_ds.transfer.export import (
    CARD,
    CONFIG,
    PREPROCESSOR,
    PROGRAMS,
    WEIGHTS,
    check_output,
    export_timm,
    origin,
    write_folder,
)
from lut_ds.transfer.huggingface import preprocessor_config, vit_config, vit_names
from lut_ds.transfer.load import Kind
from lut_ds.transfer.models import Pretrained, load_model
from lut_ds.transfer.programs import EncoderProgram, check_packages, write_program

FORMATS = ("timm", "hf", *PROGRAMS)
_LOADING = {
    "timm": 'import timm\n\nmodel = timm.create_model("local-dir:DIR", pretrained=True).eval()\n'
    "features = model(images)  # float32 [B, 3, S, S], normalised -> [B, D]",
    "hf": 'import transformers\n\nprocessor = transformers.AutoImageProcessor.from_pretrained("DIR")\n'
    'model = transformers.ViTModel.from_pretrained("DIR", add_pooling_layer=False).eval()\n'
    'tokens = model(**processor(image, return_tensors="pt")).last_hidden_state  # cls, then patches\n'
    "features = tokens[:, 1:].mean(dim=1)",
    "torch-export": 'import torch\n\nencoder = torch.export.load("DIR/encoder.pt2").module()\n'
    "features, tokens = encoder(images)  # float32 [B, 3, S, S], normalised",
    "torchscript": 'import torch\n\nencoder = torch.jit.load("DIR/encoder.torchscript.pt")\n'
    "features, tokens = encoder(images)  # float32 [B, 3, S, S], normalised",
    "onnx": 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("DIR/encoder.onnx")\n'
    'features, tokens = session.run(None, {"images": images})  # float32 [B, 3, S, S], normalised',
}


def export(source: str, kind: Kind | None, output: str, form: str = "timm", heads: int | None = None) -> dict[str, Any]:
    """Write an encoder and its model card (README.md).

    Args:
        source: whatever `load_model` takes.
        kind: whose weights, where there are two; None takes the average where there is one.
        output: folder; new, empty, or an earlier export, which is replaced whole.
        form: one of FORMATS.
        heads: attention heads of a file whose size is not published.

    Returns:
        For timm what `export_timm` does, and `format`; else `format`, `files`, `kind`, `step`, `load` (Python), and for programs
        `difference` (the largest, in units of the largest value; None where it could not be run). All with `card`.

    Raises:
        UserError: nothing to export, a folder that holds something else, an encoder or packages that the format cannot take.
        RunFault: the folder cannot be written, or a program computes something else.
    """
    if form == "timm":
        result = export_timm(source, kind, output, heads)
        found = load_model(source, kind, heads=heads)
        card = model_card(source, found, "timm", _LOADING[form], origin(source, found))
        return {**result, "format": form, "card": str(write_aside(Path(output).absolute() / CARD, card.encode()))}
    folder = Path(output).absolute()
    check_packages(form)
    check_output(folder, source)
    found = load_model(source, kind, heads=heads)
    about = origin(source, found)
    library = "transformers" if form == "hf" else "torch"
    result = {"format": form, "kind": found.record["kind"], "step": found.record["step"], "load": _LOADING[form]}
    card = model_card(source, found, library, _LOADING[form], about)

    def write(aside: Path) -> None:
        (aside / CARD).write_text(card)
        if form == "hf":
            _write_hf(aside, found, about)
        else:
            program = EncoderProgram(found, "mean")
            result["difference"] = write_program(program, found.image_size, form, aside / PROGRAMS[form])

    write_folder(folder, write)
    return {**result, "card": str(folder / CARD), "files": sorted(str(p) for p in folder.iterdir())}


def _write_hf(folder: Path, found: Pretrained, about: dict[str, Any]) -> None:
    tensors = vit_names(found.model.state_dict())
    positions, patches = tensors["embeddings.position_embeddings"].shape[1], found.model.patch_embed.num_patches
    if positions != 1 + patches:
        raise UserError(
            f"--format hf: expected a position for the cls token and each of {patches} patches, found {positions}, which "
            "ViTModel cannot hold; take --format torch-export"
        )
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(vit_config(found, about), indent=1) + "\n")
    (folder / PREPROCESSOR).write_text(json.dumps(preprocessor_config(found), indent=1) + "\n")
