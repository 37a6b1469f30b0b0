"""What can be proved of sparse adapters, each statement a formula beside its simulation; docs/theory.md has the proofs.

    subset_sums    where the factor 1/log(1/sparsity) of the random-pruning theorems comes from
    rows_columns   masks of rows and columns against a fixed dense target, and solutions other than that target
    elements       masks of single entries of B, with A free
    first_order    what moving inside kept rows and columns does to the loss
    propagation    from errors of modules to the change of a network's output

numpy and the standard library alone.
"""

from partial_lora.theory import elements, first_order, propagation, rows_columns, subset_sums
from partial_lora.theory.simulated import Simulated

__all__ = ["Simulated", "elements", "first_order", "propagation", "rows_columns", "subset_sums"]
