"""The paper's claims beside what finished runs say of them: tables, figures, and a sentence for each claim."""
