"""Names of metrics: which are shares, and of which less is better."""

from __future__ import annotations

SHARES = {"accuracy", "accuracy_norm", "f1", "exact_match", "rouge_l"}  # read as percentages
LOWER_IS_BETTER = {"mse", "perplexity"}
