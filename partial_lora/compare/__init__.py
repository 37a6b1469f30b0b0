"""Methods beside each other at one size or under one limit: each one's learning rate, seeds, and a verdict."""
