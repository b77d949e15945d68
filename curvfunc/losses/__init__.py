"""What a loss is to the engine: its gradient, and columns whose squares sum up to its Hessian. Knows nothing of models."""

from curvfunc.losses.closed_forms import diagonal_root
from curvfunc.losses.custom import check_separable
from curvfunc.losses.disguises import Disguise, unmasked
from curvfunc.losses.draws import draw_bits, draw_categories, draw_normal
from curvfunc.losses.normal_form import (
    CLOSED_FORMS,
    ClosedForm,
    Loss,
    Root,
    check,
    check_entries,
    is_sum,
    no_loss,
    normalize,
    rebuild,
    values_visible,
)
from curvfunc.losses.normalizer import has_normalizer, normalizer, observed_reduction, reference_sample
from curvfunc.losses.roots import (
    SUMMED,
    empirical_root,
    exact_root,
    gradient,
    refuse_means,
    sampled_root,
    signed_root,
    summed_gradient,
    summed_hessian,
)

__all__ = [
    "CLOSED_FORMS",
    "SUMMED",
    "ClosedForm",
    "Disguise",
    "Loss",
    "Root",
    "check",
    "check_entries",
    "check_separable",
    "diagonal_root",
    "draw_bits",
    "draw_categories",
    "draw_normal",
    "empirical_root",
    "exact_root",
    "gradient",
    "has_normalizer",
    "is_sum",
    "no_loss",
    "normalize",
    "normalizer",
    "observed_reduction",
    "rebuild",
    "reference_sample",
    "refuse_means",
    "sampled_root",
    "signed_root",
    "summed_gradient",
    "summed_hessian",
    "unmasked",
    "values_visible",
]
