"""The model card of an exported model, written from its configuration and provenance."""

from __future__ import annotations

from typing import Any

USES = {
    "emoji": 'dlms.models.load("emoji")',
    "emoji-flow": 'dlms.models.load("emoji-flow")',
    "cifar10-32": "dlms sample --model cifar10-32 --nfe 5",
}
OBJECTIVES = {
    "edm": "EDM preconditioning (Karras et al. 2022)",
    "flow": "rectified flow, velocity prediction (Liu et al. 2023)",
}
INTENDED = (
    "Made for measuring and showing samplers. It draws what it was trained on, at 32x32; it is too "
    "small for anything else."
)


def card(name: str, config: dict[str, Any], record: dict[str, Any]) -> str:
    """Markdown: what it is, data and licence, training, how to use it, limits."""
    data, model, features = record["data"], record["model"], record["features"]
    classes = config["classes"]
    condition = f"class-conditional ({', '.join(classes)})" if classes else "unconditional"
    lines = [
        f"# {name}",
        "",
        f"{OBJECTIVES[config['prediction']]}; {condition}; {model['parameters']:,} parameters; "
        "weights in bfloat16.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {data['name']}: {data['source']} |",
        f"| images | {data['images']}; {data['note']} |",
        f"| licence of the data | {data['licence']} |",
        "| licence of the weights | that of this project |",
        f"| training | {model['images_seen']:,} images in {model['training_seconds']:,.0f} s, "
        f"batch {model['batch']}, seed {model['seed']}, on {record['hardware']} |",
        f"| classifier of the features | {_classifier(features)} |",
        f"| torch, commit, date | {record['torch']}, {record['commit']}, {record['date']} |",
        "",
        f"Use: `{USES[name]}`.",
        "",
        INTENDED,
    ]
    return "\n".join(lines) + "\n"


def _classifier(features: dict[str, Any]) -> str:
    if "test_accuracy" not in features:
        return str(features["network"])
    return (
        f"{features['test_accuracy']:.1%} right on {features['test_images']:,} images that it was "
        f"not trained on, {len(features['classes'])} classes"
    )
