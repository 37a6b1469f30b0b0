"""Pre-trained models, each loaded whole and checked, with a new head for the task."""
