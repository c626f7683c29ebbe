"""How much the pictures of one prompt differ, in any feature space (features: P prompts, M pictures, F numbers)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vmpo.evaluation.statistics import Estimate, clustered_mean
from vmpo.features.extractor import Distance, pairwise_distances


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


def embedding_variances(features: Tensor) -> Tensor:
    """Total variance of each prompt's embeddings scaled to unit length: 'DreamSim variance' with DreamSim's.

        V = 1/(2M(M−1)) Σ_{i,j} |ê_i − ê_j|² = 1 − mean_{i≠j} cos(e_i, e_j),    ê = e/|e|.

    Arguments:
        features: (P, M, F).

    Returns:
        (P,) float64, in [0, M/(M−1)].

    Raises:
        ValueError: if there are fewer than two pictures a prompt.

    References:
        The evaluation of Domingo-Enrich et al. (2024), arXiv:2409.08861, as their published code for Stable Diffusion
        computes it (microsoft/soc-fine-tuning-sd): 10 pictures a prompt, averaged over prompts.
    """
    return total_variances(normalize(_checked(features), dim=-1))


def embedding_variance(features: Tensor) -> Estimate:
    """`embedding_variances` averaged over prompts, with its standard error."""
    return clustered_mean(embedding_variances(features))


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


def mean_pairwise_distances(features: Tensor, distance: Distance = "euclidean") -> Tensor:
    """Mean distance over ordered pairs i ≠ j of each prompt, unbiased; `features.extractor` defines the distances.

    Arguments:
        features: (P, M, F).
        distance: what an extractor states as its own.

    Returns:
        (P,) float64.

    Raises:
        ValueError: if there are fewer than two pictures a prompt.
    """
    x = _checked(features)
    m = x.shape[1]
    return pairwise_distances(distance, x).sum(dim=(1, 2)) / (m * (m - 1))


def mean_pairwise_distance(features: Tensor, distance: Distance = "euclidean") -> Estimate:
    """`mean_pairwise_distances` averaged over prompts, with its standard error."""
    return clustered_mean(mean_pairwise_distances(features, distance))


def vendi_scores(features: Tensor) -> Tensor:
    """Effective number of different pictures of each prompt: exp of the entropy of the eigenvalues of K/M.

    K is the matrix of cosine similarities; the score lies between 1 (all alike) and M (all orthogonal). It depends on
    M, so only scores at the same M compare.

    Arguments:
        features: (P, M, F).

    Returns:
        (P,) float64; NaN where a picture's features are.

    Raises:
        ValueError: if there are fewer than two pictures a prompt.

    References:
        Friedman and Dieng (2023), arXiv:2210.02410, Eq. 1 with a cosine kernel.
    """
    x = normalize(_checked(features), dim=-1)
    known = x.isfinite().all(dim=(1, 2))
    x = torch.where(known[:, None, None], x, 0.0)
    eigenvalues = torch.linalg.eigvalsh(x @ x.mT / x.shape[1]).clamp_min(0)
    return torch.where(known, torch.special.entr(eigenvalues).sum(dim=-1).exp(), torch.nan)


def vendi_score(features: Tensor) -> Estimate:
    """`vendi_scores` averaged over prompts, with its standard error."""
    return clustered_mean(vendi_scores(features))
