"""What the analyses' numbers and figures say, in words: for the command line and for the report."""

from collections.abc import Mapping
from typing import Any

TITLES = {
    "attention-distance": "Attention distance",
    "maps": "Attention maps",
    "relevance": "Relevance",
    "spectrum": "Singular values",
    "cka": "Similarity of layers",
    "layers": "Linear probe by layer",
}

CAPTIONS = {
    "attention-distance": "How far, in pixels of the input, a patch looks on average: a dot a head, a line for their mean; "
    "dashed, attention to all patches alike. Right: the entropy of the attention, 1 where it goes to all tokens alike.",
    "maps": "What the last layer's {query} attends to, by head from the most concentrated to the least. The brightest patch of "
    "each map is its own largest value.",
    "relevance": "Which patches the feature comes from: attention weighted by its gradient, through all layers, for {target}. "
    "The test beside it leaves patches out and computes the feature again.",
    "spectrum": "Singular values of centred features over the largest: a line that falls slowly uses more directions of the "
    "space. The effective rank is the exponential of the values' entropy.",
    "cka": "Linear CKA between layers (0: the embedding), from minibatches with the unbiased estimator: 1 where two layers hold "
    "the same up to rotation and scale.",
    "layers": "Accuracy of a linear classifier on the mean patch token after each block: where the classes become separable.",
}
_TARGETS = {
    "class": "how far the feature lies towards the mean of its class",
    "norm": "how far the feature lies from the mean of all",
}


def caption(name: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """How to read the figure of analysis `name`; `found` is its numbers by model."""
    first = next(iter(found.values()))
    words = {"query": first.get("query", ""), "target": _TARGETS.get(str(first.get("target")), "")}
    return CAPTIONS[name].format(**words)


def sentence(name: str, found: Mapping[str, Any]) -> str:
    """The main number of an analysis of one model."""
    if name == "attention-distance":
        first, last = found["by_layer"][0], found["by_layer"][-1]
        return f"{first:.1f} px in the first layer, {last:.1f} px in the last; attention to all alike: {found['uniform']:.1f} px"
    if name == "maps":
        last = found["effective_patches"][-1]
        return f"the last layer's {found['query']} attends to {last:.1f} of {found['patches']} patches (exp of the entropy)"
    if name == "relevance":
        return _relevance(found)
    if name == "spectrum":
        image, token = found["image"], found["token"]
        return f"effective rank {image['effective_rank']:.1f} of {image['rank_bound']} (images), {token['effective_rank']:.1f} (tokens)"
    if name == "cka":
        values = [row[-1] for row in found["cka"] if row[-1] is not None]
        return f"the last layer's similarity to the layers before: {', '.join(f'{v:.2f}' for v in values)}"
    return f"top-1 by layer {', '.join(f'{v:.1f}' for v in found['top1'])} %; best: layer {found['best_layer']}"


def _relevance(found: Mapping[str, Any]) -> str:
    left = found["target_left"]
    if left["most"] is None:
        return "nothing to explain: the images' features are all alike"
    parts = [
        f"{left[key]:.2f} of the target is left ({word})"
        for key, word in (("most", "most relevant"), ("random", "random"))
    ]
    return f"without {100 * found['left_out_share']:.0f} % of the patches, {parts[0]}, {parts[1]}"
