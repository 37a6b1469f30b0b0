"""The evidence: what the paper claims, as tables and figures of finished runs."""
