"""The video suite: frame selectors, token methods and budgets on the same questions about clips."""
