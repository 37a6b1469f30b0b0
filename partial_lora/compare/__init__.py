"""Methods beside each other at one size or under one limit, each at its best learning rate: searches, seeds, a verdict."""
