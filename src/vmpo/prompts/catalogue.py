"""The published prompt sets: homes, checksums, licences. Files are fetched from there and never shipped.

A checksum is of the file at the pinned commit: its SHA-256, or git's own name of the file where only that was at hand.
Where there is none, the first download is trusted, and remembered.
"""

from __future__ import annotations

from dataclasses import dataclass

PICK_A_PIC = "repository MIT; captions from Pick-a-Pic (Kirstain et al. 2023), whose terms apply"
HPD = "repository Apache-2.0; prompts from DiffusionDB and COCO captions, whose terms apply"


@dataclass(frozen=True)
class Entry:
    """What is known of a set.

    Args:
        what: one line.
        count: distinct prompts, counted where `checksum` is a SHA-256, else as its authors state.
        url: the file.
        checksum: 'sha256:…', 'git:…' or empty.
        licence: of the file; the prompts in it may be bound by more.
        first: how many of the file's prompts belong to the set; None: all.
        quoted: the text to be rendered stands in double quotes, and becomes the metadata's 'target'.
    """

    what: str
    count: int
    url: str
    checksum: str
    licence: str
    first: int | None = None
    quoted: bool = False

    @property
    def counted(self) -> bool:
        """Whether `count` was counted in the very file."""
        return self.checksum.startswith("sha256:")

    @property
    def home(self) -> str:
        """Repository and commit, in short."""
        host, *path = self.url.removeprefix("https://").split("/")
        if host == "raw.githubusercontent.com":
            return f"github {path[0]}/{path[1]}@{path[2][:8]}"
        if host == "huggingface.co":
            return f"hub {path[1]}/{path[2]}@{path[4]}"
        return self.url


def _github(repository: str, commit: str, path: str) -> str:
    return f"https://raw.githubusercontent.com/{repository}/{commit}/{path}"


def _flow_grpo(path: str, commit: str = "ac4c86e8cae021841f1fde853d340e0db67690dd") -> str:
    return _github("yifan123/flow_grpo", commit, f"dataset/{path}")


def _flow_grpo_sfw(path: str) -> str:
    return _flow_grpo(f"pickscore_sfw/{path}", "45b4cd77329ba4ee53c0488b23adc2869fded13e")


def _ddpo(path: str) -> str:
    return _github("kvablack/ddpo-pytorch", "1958463f020112c9a7bc85768d296daacc2e1b4b", f"ddpo_pytorch/assets/{path}")


def _soc(path: str) -> str:
    return _github("microsoft/soc-fine-tuning-sd", "489f904a824fa3f6f2700f3b9a36826318f4d2ac", f"prompt_files/{path}")


def _align_prop(path: str) -> str:
    return _github("mihirp1998/AlignProp", "b22918afd53f254f2ba66eb1233d94121aade5fc", f"assets/{path}")


def _hpdv2(style: str, file: str) -> Entry:
    url = f"https://huggingface.co/datasets/zhwang/HPDv2/resolve/main/benchmark/{file}.json"
    return Entry(f"HPDv2 benchmark, {style} (Wu et al. 2023, arXiv 2306.09341)", 800, url, "", HPD)


CATALOGUE: dict[str, Entry] = {
    "ocr/train": Entry(
        "sentences with text to render in double quotes (Flow-GRPO, Liu et al. 2025, arXiv 2505.05470)",
        19_653,
        _flow_grpo("ocr/train.txt"),
        "git:3ce0521b77b0a9031191d66ecc36ebaaf27a3922",
        "repository MIT",
        quoted=True,
    ),
    "ocr/test": Entry(
        "held-out sentences of the same kind",
        1018,
        _flow_grpo("ocr/test.txt"),
        "sha256:4dd8caf3ab6ade73bd376c7d14c6ca49b6eacfb1bd321e22c40714ae4a98d4dc",
        "repository MIT",
        quoted=True,
    ),
    "pickscore-sfw/train": Entry(
        "captions of people, filtered; Flow-GRPO's choice",
        15_486,
        _flow_grpo_sfw("train.txt"),
        "sha256:edb46f78d7d93df0bafb30568074463822312ee339200f627195ccb2ff1d2f7a",
        PICK_A_PIC,
    ),
    "pickscore-sfw/test": Entry(
        "held-out captions, filtered",
        1024,
        _flow_grpo_sfw("test.txt"),
        "sha256:d839050acb06aa045e399e76a81e4ade9a55fc743dc0e22e7b3eaeaca5c19107",
        PICK_A_PIC,
    ),
    "pickscore/train": Entry(
        "captions of people, unfiltered: some are not safe for work",
        25_432,
        _flow_grpo("pickscore/train.txt"),
        "sha256:2f425adcbb9a6d0feee7c6c448e1cb83a1f71deca9434b803907e2578eca837f",
        PICK_A_PIC,
    ),
    "pickscore/test": Entry(
        "held-out captions, unfiltered",
        2048,
        _flow_grpo("pickscore/test.txt"),
        "sha256:d75c025fa451866e70f7e36243f7cdd93095523cb51f5f9651f2ce3236d20262",
        PICK_A_PIC,
    ),
    "geneval/train": Entry(
        "objects, counts, colours and positions with their metadata (Flow-GRPO); test prompts left out",
        50_000,
        _flow_grpo("geneval/train_metadata.jsonl"),
        "git:0b97e8a6802c08fc7537cd00c76ae79c851bddcb",
        "repository MIT",
    ),
    "geneval/test": Entry(
        "GenEval's prompts as Flow-GRPO evaluates them (four times each, kept once here)",
        553,
        _flow_grpo("geneval/test_metadata.jsonl"),
        "sha256:cec4b24b9fee7bac21c8f787054ecc8dc9ff831674037713a4cd35e0f0a74a28",
        "repository MIT",
    ),
    "geneval": Entry(
        "the benchmark's own evaluation_metadata.jsonl (Ghosh et al. 2023, arXiv 2310.11513)",
        553,
        _github("djghosh13/geneval", "af4902f24d3ca90ebbb446dd9891a59e0f82725f", "prompts/evaluation_metadata.jsonl"),
        "sha256:5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
        "MIT",
    ),
    "hpdv2/photo": _hpdv2("photo", "photo"),
    "hpdv2/painting": _hpdv2("paintings", "paintings"),
    "hpdv2/anime": _hpdv2("anime", "anime"),
    "hpdv2/concept-art": _hpdv2("concept art", "concept-art"),
    "alignprop/train": Entry(
        "750 of the HPDv2 photo prompts, AlignProp's training set (Prabhudesai et al. 2023, arXiv 2310.03739)",
        750,
        _align_prop("hps_v2_all.txt"),
        "sha256:52f0074b2d5fe70a8ffd0ca8daf7b5ad420c9a930f03c38a97e7f2d8aa5df429",
        "repository MIT; prompts of HPDv2, whose terms apply",
    ),
    "alignprop/test": Entry(
        "the other 50, AlignProp's evaluation set",
        50,
        _align_prop("hps_v2_all_eval.txt"),
        "sha256:1af515e74b71687531d6a4e83489b10c7214a8d5c4da04621c45bf76fe739049",
        "repository MIT; prompts of HPDv2, whose terms apply",
    ),
    "drawbench": Entry(
        "DrawBench (Saharia et al. 2022, arXiv 2205.11487), from DiffusionNFT's copy (five times each, kept once here)",
        200,
        _github("NVlabs/DiffusionNFT", "24af5554898d85e93efa492f42b5e9cdf4156e9b", "dataset/drawbench/test.txt"),
        "sha256:9006b98feabb94b28a2bc0c88de42fd4f31a9ec3c2a19e308a02c5385b7172f0",
        "repository Apache-2.0; DrawBench's own terms were not found",
    ),
    "benchmark_ir": Entry(
        "test prompts of the paper's SD 1.5 experiments (Domingo-Enrich et al. 2024, arXiv 2409.08861)",
        100,
        _soc("benchmark_ir.json"),
        "sha256:270e315746b2a76ccbf88780797d0aafbcc7ebac83c22f37288d485734804bb2",
        "repository MIT; the prompts' own terms were not found",
    ),
    "refl": Entry(
        "training prompts of the same code (10,000, some of them twice)",
        9798,
        _soc("refl_data.json"),
        "sha256:47cc5f5c0faa36167c5bd10cdc3aee0b1072147b44d3ae18f77bd98f377ecbb8",
        "repository MIT; the prompts' own terms were not found",
    ),
    "simple_animals": Entry(
        "common animals (DDPO, Black et al. 2023, arXiv 2305.13301)",
        45,
        _ddpo("simple_animals.txt"),
        "sha256:ee3d9b638ce2a40e896a34319af85709d3c1c3188da0b8feda739dcb7363188d",
        "repository MIT",
    ),
    "imagenet_animals": Entry(
        "the animals among ImageNet's classes, the first 398 (DDPO)",
        398,
        _ddpo("imagenet_classes.txt"),
        "sha256:a40d9be82eb4738becd1dd69991b89f87f309975e860a6f3f45395d8c06a7e0d",
        "repository MIT",
        first=398,
    ),
}
