"""README.md of a merged model."""

from __future__ import annotations

import json

from ties_dist.errors import printable
from ties_dist.output.report import MergeReport
from ties_dist.recipe.recipe import Recipe
from ties_dist.recipe.references import ModelReference


def model_card(recipe: Recipe, report: MergeReport) -> str:
    """README.md with Hugging Face front matter, the recipe and what the merge kept."""
    models = [*([recipe.base] if recipe.base else []), *(e.model for e in recipe.experts)]
    lines = ["---", "base_model:"]
    lines += [f"- {json.dumps(name)}" for name in dict.fromkeys(_public_name(m) for m in models)]
    library = "peft" if recipe.options.output == "adapter" else "transformers"
    lines += [f"library_name: {library}", "tags:", "- merge", "- ties_dist", f"- {recipe.method}", "---", ""]
    lines += [f"# Merged {recipe.options.output}", "", f"Merged with ties_dist by `{recipe.method}`", ""]
    lines[-2] += f" (semantics `{report.semantics}`)." if report.method == "ties" else "."
    if any(e.kept_fraction is not None for e in report.experts):
        lines += ["| expert | weight | density | kept | threshold |", "|---|---|---|---|---|"]
        for e in report.experts:
            threshold = "per tensor" if e.threshold is None else f"{e.threshold:.6g}"
            weight = "varies" if e.weight is None else f"{e.weight:g}"
            density = "varies" if e.density is None else f"{e.density:g}"
            lines.append(f"| {e.name} | {weight} | {density} | {e.kept_fraction or 0:.2%} | {threshold} |")
        lines.append("")
    lines += ["## Recipe", "", "```yaml", recipe.to_yaml().rstrip(), "```", ""]
    lines += [f"Output digest `{report.output_digest}`.", ""]
    return printable("\n".join(lines))


def _public_name(model: ModelReference) -> str:
    """The hub id where there is one, else the folder's name: no path of this machine."""
    from_hub = any(part.startswith("models--") for part in model.path.parts)  # the hub's cache
    return model.text.partition("@")[0] if from_hub else model.name
