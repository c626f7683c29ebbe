"""How much the pictures of one prompt differ, in any feature space (features: P prompts, M pictures, F numbers)."""

from __future__ import annotations

import torch
from torch import Tensor

from vmpo.evaluation.statistics import Estimate, clustered_mean


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"features have shape {tuple(features.shape)}; they must be (prompts, pictures >= 2, numbers)")
    return features.detach().to(torch.float64)


def total_variances(features: Tensor) -> Tensor:
    """Trace of the covariance of each prompt's features, unbiased: ½ mean of |x_i − x_j|² over ordered pairs i ≠ j.

    Arguments:
        features: (P, M, F).

    Returns:
        (P,) float64, in squared units of the features.

    Raises:
        ValueError: if there are fewer than two pictures a prompt.
    """
    return _checked(features).var(dim=1, correction=1).sum(dim=-1)


def total_variance(features: Tensor) -> Estimate:
    """`total_variances` averaged over prompts, with its standard error."""
    return clustered_mean(total_variances(features))


def weighted_total_variances(features: Tensor, log_w: Tensor, correct_bias: bool = True) -> Tensor:
    """Total variance of each prompt under a tilted distribution, from weighted samples of the reference.

    With normalised weights w, squared distances d_ij² and mean m = Σ w_i x_i the estimator is the ratio of two
    U-statistics

        V = Σ_{i≠j} w_i w_j ½d_ij² / Σ_{i≠j} w_i w_j = Σ_i w_i |x_i − m|² / (1 − Σ_i w_i²).

    Numerator and denominator are unbiased up to the same factor Z²; the ratio is biased by

        −(2/M) E_tilt[w̃ (|x − μ|² − V)] + O(M⁻²),    w̃ = dp_tilt/dp_ref,

    (delta method on both projections), which vanishes for equal weights. Its estimate
    −2 Σ w_i² (|x_i − m|² − Σ_j w_j |x_j − m|²) is taken off where `correct_bias` is set.

    Arguments:
        features: (P, M, F) of samples of the reference.
        log_w: (P, M) log-weights in nats, up to a constant a prompt, e.g. r/β; −inf leaves a sample out.

    Returns:
        (P,) float64; NaN where a single sample carries all the weight.

    Raises:
        ValueError: if the shapes do not match or there are fewer than two pictures a prompt.
    """
    x = _checked(features)
    if log_w.shape != x.shape[:2]:
        raise ValueError(f"log_w has shape {tuple(log_w.shape)}; features ask for {tuple(x.shape[:2])}")
    w = torch.softmax(log_w.detach().to(torch.float64), dim=1)
    mean = (w.unsqueeze(-1) * x).sum(dim=1, keepdim=True)
    squares = (x - mean).square().sum(dim=-1)
    pairs = 1 - w.square().sum(dim=1)
    plain = (w * squares).sum(dim=1)
    variance = plain / pairs
    if correct_bias:
        variance = variance + 2 * (w.square() * (squares - plain.unsqueeze(1))).sum(dim=1)
    return torch.where(pairs > 1e-12, variance, torch.nan)


def weighted_total_variance(features: Tensor, log_w: Tensor, correct_bias: bool = True) -> Estimate:
    """`weighted_total_variances` averaged over prompts, with its standard error."""
    return clustered_mean(weighted_total_variances(features, log_w, correct_bias))


def mean_pairwise_distance(features: Tensor) -> Estimate:
    """Mean of |x_i − x_j| over ordered pairs i ≠ j of a prompt, averaged over prompts; unbiased."""
    x = _checked(features)
    m = x.shape[1]
    # the exact formula, not the product form: near-equal pictures would lose all their digits
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return clustered_mean(distances.sum(dim=(1, 2)) / (m * (m - 1)))


def vendi_score(features: Tensor) -> Estimate:
    """Effective number of different pictures of a prompt: exp of the entropy of the eigenvalues of K/M.

    K is the matrix of cosine similarities; the score lies between 1 (all alike) and M (all orthogonal). It depends on
    M, so only scores at the same M compare. Source: Friedman and Dieng (2022), arXiv:2210.02410.
    """
    x = torch.nn.functional.normalize(_checked(features), dim=-1)
    eigenvalues = torch.linalg.eigvalsh(x @ x.mT / x.shape[1]).clamp_min(0)
    return clustered_mean(torch.special.entr(eigenvalues).sum(dim=-1).exp())
