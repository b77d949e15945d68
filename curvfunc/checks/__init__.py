"""How to find out whether numbers are right: of a model, and of a rule."""
