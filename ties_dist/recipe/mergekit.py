"""Names that mergekit 0.1.5 knows, and what recipes for it have besides.

From its config.MergeConfiguration, merge_methods/registry.py and the methods' own parameters.
"""

from __future__ import annotations

UNSUPPORTED_KEYS = ("tokenizer_source", "tokenizer", "chat_template")
METHODS = (
    *("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "nearswap", "passthrough"),
    *("slerp", "nuslerp", "multislerp", "model_stock", "arcee_fusion", "karcher", "sce"),
    *("breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "ram", "ramplus_tl"),
)
PARAMETERS = ("gamma", "epsilon", "select_topk")
"""Some that other methods have."""
STRAY_KEYS = (
    *("name", "description", "output", "output_dir", "output_name", "output_path", "out_dir", "out_path"),
    *("hub_repo", "license", "author", "tags"),
)
"""Written by other tools beside what is merged; mergekit, too, reads over them."""
MERGEKIT_DENSITY = 1.0
"""Of every method of its that has one."""
