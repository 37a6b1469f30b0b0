"""Reports of finished runs: tables, figures and pages. What a command offers of them is here, without pandas."""

EXAMPLES = 6  # of the hardest, for each row of a page
