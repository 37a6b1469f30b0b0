"""The commands of the command line, a module for those that go together: parsers, bars and what they print.

Heavy imports stay inside the functions that need them: neither `--help` nor a wrong argument waits for torch.
"""
