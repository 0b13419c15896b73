"""What frozen features are worth.

The functions live in `ssljax.evals.knn`, `.linear`, `.fewshot`, `.zeroshot` and `.retrieval`; here are their configs.
"""

from ssljax.evals.online import Classification, Evaluation, Retrieval, ZeroShot

__all__ = ["Classification", "Evaluation", "Retrieval", "ZeroShot"]
