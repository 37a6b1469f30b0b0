"""Reports of finished runs: tables, figures and pages. What a command offers of them is here, without pandas."""

SPREADS = {  # what follows ±, and the note about it
    "std": "± is one standard deviation over the n runs of a row.",
    "interval": "± is half the 95 % interval of the mean over the n runs of a row (Student's t).",
}
EXAMPLES = 6  # of the hardest, for each row of a page
