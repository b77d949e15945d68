"""Small models of the architectures that are in use, written from their papers: test problems of the whole engine."""

from zoo import attention, functions, recurrent, vision
from zoo.registry import ZOO, Problem

__all__ = ["ZOO", "Problem", "attention", "functions", "recurrent", "vision"]
