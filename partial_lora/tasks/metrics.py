"""Names of metrics: which are shares, of which less is better, and which predictions of single examples give."""

from __future__ import annotations

SHARES = {"accuracy", "accuracy_norm", "f1", "exact_match", "rouge_l"}  # read as percentages
LOWER_IS_BETTER = {"mse", "perplexity"}
OF_ALL_TOGETHER = {"f1", "matthews", "pearson", "spearman"}  # no mean over examples
OF_EXAMPLES = {"accuracy", "accuracy_norm", "mse", "exact_match", "rouge_l"} | OF_ALL_TOGETHER
