"""Names of metrics: which are shares, in which lower is better, and which come from predictions of examples."""

from __future__ import annotations

SHARES = {"accuracy", "accuracy_norm", "f1", "exact_match", "rouge_l"}  # read as percentages
LOWER_IS_BETTER = {"mse", "perplexity"}
OF_ALL_TOGETHER = {"f1", "matthews", "pearson", "spearman"}  # not means over examples
OF_EXAMPLES = {"accuracy", "accuracy_norm", "mse", "exact_match", "rouge_l"} | OF_ALL_TOGETHER
