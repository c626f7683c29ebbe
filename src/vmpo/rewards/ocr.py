"""Rewards for legible text: how well a picture spells the words quoted in its prompt.

The reading comes from the PP-OCRv6 line recogniser that ships inside `rapidocr` (Apache-2.0), run in batches.
A picture is taken as ONE line of text: there is no text detection, so a word in a corner of a large scene is
out of reach. The recogniser emits a distribution over characters at every eighth column of the resized picture;
the accuracy reads it greedily, the log-likelihood sums over all its alignments with the target.

References:
    Flow-GRPO (Liu et al., 2025, arXiv:2505.05470) and its published code: the accuracy reward.
    CTC (Graves et al., 2006): the likelihood of a text under per-column distributions.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import string
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vmpo.errors import UserError

logger = logging.getLogger(__name__)

HEIGHT = 48  # what the recogniser was trained on
MIN_WIDTH = 72  # nine columns: a square picture is stretched, in six columns a word of five letters does not fit
BATCH = 32  # the full output is 18,710 floats a column, about 1.2 MB for a picture of 24 x 64
TALL = 256  # from this height on a picture is hardly a single line of text
MIN_LOG_PROB = -8.0  # nats per character
BLANK = 0
MODEL = "PP-OCRv6_rec_small.onnx"


def target_text(prompt: str) -> str:
    """The text between the first pair of double quotes of a prompt.

    Raises:
        UserError: if there is no such pair or nothing but spaces in it.
    """
    parts = prompt.split('"', 2)
    if len(parts) < 3:
        raise UserError(f"""the OCR reward needs its target between double quotes ("), but the prompt is: {prompt}""")
    if not parts[1].replace(" ", ""):
        raise UserError(f"the OCR reward found nothing between the double quotes of the prompt: {prompt}")
    return parts[1]


def _normalise(text: str) -> str:
    return text.replace(" ", "").lower()


def spelling_score(target: str, recognised: str) -> float:
    """Share of the target that was spelled right, in [0, 1].

    r = 1 - d / |target|, where d = 0 if the target is part of the recognised text and else
    min(Levenshtein distance, |target|); spaces and case are ignored on both sides.

    References:
        Flow-GRPO (Liu et al., 2025, arXiv:2505.05470) and its published code.
    """
    from rapidfuzz.distance import Levenshtein

    target, recognised = _normalise(target), _normalise(recognised)
    if not target:
        raise ValueError("the target is empty")
    if target in recognised:
        return 1.0
    return 1.0 - min(Levenshtein.distance(target, recognised), len(target)) / len(target)


def _model_path() -> Path:
    for package in ("rapidocr", "onnxruntime", "rapidfuzz"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the OCR rewards need the package '{package}': pip install 'vmpo[ocr]'")
    spec = importlib.util.find_spec("rapidocr")
    folder = Path(spec.origin).parent / "models" if spec and spec.origin else Path()
    if not (folder / MODEL).is_file():
        raise UserError(f"no {MODEL} in {folder}; the OCR rewards need rapidocr 3.10: pip install 'vmpo[ocr]'")
    return folder / MODEL


@cache
def _session(threads: int) -> Any:
    onnxruntime = importlib.import_module("onnxruntime")  # heavy: only once a picture is to be read
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(_model_path()), options, providers=["CPUExecutionProvider"])


class LineRecogniser:
    """Distribution over characters in each column of a picture of one line of text.

    Classes: 0 is CTC's blank, the others are the lower-case characters of the alphabet; a class holds the summed
    probability of both cases of its letter, since neither reward sees case. Spaces, ignored by both as well, count
    as blank. Characters outside the alphabet are left out and the rest is normalised: what is read and what is
    likely come from the same p(class | blank or in the alphabet).
    """

    def __init__(self, alphabet: str | None) -> None:
        """
        Arguments:
            alphabet: the characters that may be read, in either case; None for all 18,708 of the model.

        Raises:
            UserError: if the alphabet is empty or has characters that the model does not know.
        """
        known = _session(torch.get_num_threads()).get_modelmeta().custom_metadata_map["character"].splitlines()
        allowed = {_normalise(char) for char in (known if alphabet is None else alphabet)} - {""}
        if not allowed:
            raise UserError("the alphabet of the OCR reward is empty; give the characters to read, or null for all")
        if missing := allowed - {char.lower() for char in known}:
            raise UserError(f"the OCR recogniser knows no {' '.join(sorted(missing))}; remove it from the alphabet")
        self.classes = ["", *sorted(allowed)]
        self.index = {char: k for k, char in enumerate(self.classes)}
        # the model's own classes: blank, its characters in order, the space
        kept = [(0, BLANK), (len(known) + 1, BLANK)]
        kept += [(j, self.index[char.lower()]) for j, char in enumerate(known, start=1) if char.lower() in allowed]
        self._columns = torch.tensor([j for j, _ in kept])
        self._class_of = torch.tensor([k for _, k in kept])
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def log_probs(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, L, C) in nats of pictures (B, 3, H, W) in [0, 1]; NaN for a non-finite picture.

        The result for the last batch is kept, so that several rewards read the same tensor once.
        """
        version = -1 if images.is_inference() else images._version  # counts changes in place; -1: not counted
        if self._last is not None and version >= 0:
            last, last_version, result = self._last
            if last() is images and last_version == version:
                return result
        result = torch.cat([self._recognise(chunk) for chunk in torch.split(images.detach(), BATCH)])
        self._last = (weakref.ref(images), version, result)
        return result

    def _recognise(self, images: Tensor) -> Tensor:
        inputs = self._resize(images.float().cpu())
        session = _session(torch.get_num_threads())
        probs = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])
        folded = torch.zeros(*probs.shape[:2], len(self.classes))
        folded.index_add_(2, self._class_of, probs[:, :, self._columns])
        folded = folded.clamp_min(1e-30)
        log_probs = (folded / folded.sum(2, keepdim=True)).log()
        log_probs[~images.isfinite().flatten(1).all(1).cpu()] = torch.nan
        return log_probs

    @staticmethod
    def _resize(images: Tensor) -> Tensor:
        """Scales to 48 rows in proportion, bilinear as in the model's training; to BGR in [-1, 1]."""
        height, width = images.shape[-2:]
        if height >= TALL:
            _warn_tall(height, width)
        size = (HEIGHT, max(MIN_WIDTH, round(HEIGHT * width / height)))
        resized = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        return ((resized.clamp(0, 1) - 0.5) / 0.5).flip(1).contiguous()

    def read(self, images: Tensor) -> list[str]:
        """The most likely class of each column, repeats merged and blanks dropped: one lower-case text a picture."""
        texts = []
        for row in self.log_probs(images).argmax(2):
            texts.append("".join(self.classes[k] for k in torch.unique_consecutive(row).tolist()))
        return texts

    def log_likelihood(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """log p(text | picture) (B,) in nats, summed over all CTC alignments; -inf for a text that cannot be read."""
        log_probs = self.log_probs(images)
        targets = [[self.index.get(char, -1) for char in _normalise(text)] for text in texts]
        readable = torch.tensor([-1 not in target for target in targets])
        loss = F.ctc_loss(
            log_probs.transpose(0, 1),
            torch.tensor([max(k, 1) for target in targets for k in target]),
            torch.full((len(targets),), log_probs.shape[1]),
            torch.tensor([len(target) for target in targets]),
            blank=BLANK,
            reduction="none",
        )
        failed = log_probs.isnan().flatten(1).any(1)
        return torch.where(readable, -loss, -torch.inf).masked_fill(failed, torch.nan)


@cache
def _warn_tall(height: int, width: int) -> None:
    logger.warning("the OCR reward reads a %d x %d picture as one line of text; small text is lost", width, height)


@cache
def recogniser(alphabet: str | None) -> LineRecogniser:
    """The recogniser of an alphabet, one for all rewards of the process."""
    return LineRecogniser(alphabet)


@dataclass(frozen=True)
class _OCR:
    alphabet: str | None = string.ascii_letters
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        recogniser(self.alphabet)  # so that a missing package or a bad alphabet is found before the run

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises UserError, with the prompt, unless every prompt quotes a target that can be read."""
        classes = recogniser(self.alphabet).index
        for prompt in prompts:
            outside = sorted({char for char in _normalise(target_text(prompt)) if char not in classes})
            if outside:
                raise UserError(
                    f"the OCR reward cannot read {' '.join(outside)} in the prompt: {prompt}; "
                    f"add it to the reward's alphabet, or set alphabet to null for all characters"
                )


@dataclass(frozen=True)
class OCRAccuracy(_OCR):
    """Share of the quoted text that is spelled right, r = 1 - min(Levenshtein, |target|) / |target|, in [0, 1].

    1 if the target is part of what was read. Spaces and case are ignored. Options: `alphabet`, the characters that
    may be read (default: the letters A to Z; None: all).

    Raises:
        UserError: for a prompt without double quotes.

    References:
        Flow-GRPO (Liu et al., 2025, arXiv:2505.05470); theirs reads all lines that PaddleOCR's detector finds.
    """

    range: ClassVar[str] = "[0, 1]"

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        targets = [target_text(prompt) for prompt in prompts]
        texts = recogniser(self.alphabet).read(images)
        scores = [spelling_score(target, text) for target, text in zip(targets, texts, strict=True)]
        finite = images.isfinite().flatten(1).all(1)
        return torch.tensor(scores, device=images.device).masked_fill(~finite, torch.nan)


@dataclass(frozen=True)
class OCRLogLikelihood(_OCR):
    """Log-likelihood of the quoted text per character, r = max(log p_CTC(target | picture) / |target|, -8) in nats.

    Dense where the accuracy is flat: it rises while no letter is legible yet. p is summed over both cases of every
    letter and conditional on the alphabet (see `LineRecogniser`). Options: `alphabet`; `exp`, to return e^r, the
    geometric mean probability of a character, in (0, 1].

    Raises:
        UserError: for a prompt without double quotes.

    References:
        Connectionist temporal classification (Graves et al., 2006).
    """

    exp: bool = False

    @property
    def range(self) -> str:
        return "(0, 1]" if self.exp else "[-8, 0] nats per character"

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        targets = [target_text(prompt) for prompt in prompts]
        lengths = torch.tensor([len(_normalise(target)) for target in targets])
        per_char = (recogniser(self.alphabet).log_likelihood(images, targets) / lengths).clamp(MIN_LOG_PROB, 0.0)
        return (per_char.exp() if self.exp else per_char).to(images.device)
