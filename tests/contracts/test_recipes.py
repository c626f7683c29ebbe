"""Recipes say where their values come from; the pages that show them are what the files say."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vmpo.errors import UserError
from vmpo.training.config import Config, Section
from vmpo.training.recipe_sources import DEFAULT, markdown_table, recipe_settings
from vmpo.training.recipes import SECTIONS, load_config, read_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[2]
PAPER = [name for name in recipe_names() if not name.startswith("glyphs")]
PAGES = sorted((ROOT / "docs/recipes").glob("*.md"))
TEXTS = [ROOT / "docs/coming-from.md", ROOT / "docs/recipes.md", *PAGES]
MARKED = re.compile(r"<!-- settings: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)
MEMORY = {
    "model.checkpointing",
    "model.vae_slicing",
    "model.offload_encoders",
    "model.quantise",
    "model.attention",
    "optimisation.micro_batch",
}
Vmpo = Callable[..., tuple[int, list[str], str]]


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key with dots, value) of nested settings as they stand in the files."""
    for key, value in values.items():
        if key in SECTIONS and isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def known_keys(section: type[Section] = Config, prefix: str = "") -> set[str]:
    """Every key of the settings, sections included."""
    found = set()
    for name, field in section.model_fields.items():
        found.add(prefix + name)
        if isinstance(field.default, Section):
            found |= known_keys(type(field.default), f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("name", recipe_names())
def test_the_table_has_every_setting_of_the_files_and_its_value(name: str) -> None:
    written = dict(leaves(read_recipe(name)))
    del written["name"]
    shown = {setting.key: setting.value for setting in recipe_settings(name)}
    assert shown == written
    assert shown.keys() <= known_keys()


@pytest.mark.parametrize("name", PAPER)
def test_every_value_of_a_paper_recipe_has_a_source(name: str) -> None:
    for setting in recipe_settings(name):
        assert setting.source, setting.key
        assert setting.source != DEFAULT
        first = re.split(r"[,;:]| \(| of | on ", setting.source)[0]
        assert re.match(r"(D\.1|DDPO|Flow-GRPO|VMPO's code|Table \d|Section \d|ours|as for|no )", first), setting


def test_the_most_derived_file_wins_and_flow_mappings_share_their_comment(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "extends: sd15-hpsv2-r2g\n"
        "name: mine\n"
        "prompts: {train: a.txt, test: 'b#1.txt'}  # ours # twice\n"
        "objective:\n"
        "  beta: 0.5\n"
        "model:\n"
        "  lora:\n"
        "    targets:\n"
        "      - to_q\n"
        "      - to_k  # two\n"
    )
    settings = {setting.key: setting for setting in recipe_settings(str(tmp_path / "mine.yaml"))}
    assert settings["prompts.test"].source == "ours # twice"
    assert settings["prompts.test"].value == "b#1.txt"
    assert (settings["objective.beta"].text, settings["objective.beta"].source) == ("0.5", "")
    assert settings["objective.name"].source == "D.1", "from sd15-hpsv2-r2g"
    assert settings["optimisation.lr_centre"].source.startswith("ours; r/beta is 25 nats")
    assert settings["model.lora.rank"].source == "D.1", "from sd15-hpsv2"
    assert settings["model.lora.targets"].text == "[to_q, to_k]"


def test_defaults_are_listed_on_request() -> None:
    every = {setting.key: setting for setting in recipe_settings("sd35-ocr", defaults=True)}
    assert every["optimisation.warmup"].source == DEFAULT
    assert every["optimisation.warmup"].value == 0
    assert every["model.lora.targets"].text == "null"
    sections = {key for key in known_keys() if any(other.startswith(f"{key}.") for other in known_keys())}
    assert every.keys() == known_keys() - sections - {"name"}


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith("-24gb")])
def test_a_recipe_for_24_gb_is_the_same_optimisation(name: str) -> None:
    small, full = (
        {setting.key: setting.value for setting in recipe_settings(recipe, defaults=True)}
        for recipe in (name, name.removesuffix("-24gb"))
    )
    changed = {key for key in full if small[key] != full[key]}
    assert changed
    assert changed <= MEMORY


def test_the_command_shows_a_recipe(vmpo: Vmpo) -> None:
    code, _, out = vmpo("recipes", "ddpo-sd15-aesthetic", "--markdown")
    assert code == 0
    assert out == markdown_table(recipe_settings("ddpo-sd15-aesthetic"))
    assert "| `reward.weights` | `{aesthetic: 1.0}` | DDPO |" in out.splitlines()
    code, lines, _ = vmpo("recipes", "--all")
    assert code == 2
    assert "name it" in lines[0]
    code, lines, _ = vmpo("recipes", "sd16")
    assert code == 2
    assert "no recipe 'sd16'" in lines[0]


def test_an_unknown_key_is_an_error_here_too(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("optimisation: {epoch: 3}\n")
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        recipe_settings(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_in_the_pages_are_those_of_the_files(page: Path) -> None:
    tables = MARKED.findall(page.read_text())
    assert tables
    for name, table in tables:
        assert table == markdown_table(recipe_settings(name)), f"run: vmpo recipes {name} --markdown"


def test_every_paper_recipe_has_a_page() -> None:
    text = "".join(page.read_text() for page in [ROOT / "docs/recipes.md", *PAGES])
    for name in PAPER:
        assert f"`{name}`" in text, name


OURS = re.compile(rf"\b((?:{'|'.join(sorted(SECTIONS - {'lora'}))})\.[a-z0-9_]+(?:\.[a-z0-9_]+)*)")


def named_keys(text: str) -> set[str]:
    """Everything in a page that looks like a key of the settings; names of pages do not."""
    return {key for key in OURS.findall(text) if not key.endswith(".md")}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_keys_overrides_and_commands_of_a_page_are_understood(page: Path) -> None:
    text = page.read_text()
    assert named_keys(text) <= known_keys(), named_keys(text) - known_keys()
    for line in re.findall(r"^    .*vmpo train .*$", text, flags=re.MULTILINE):
        words = shlex.split(line, comments=True)
        recipe, *rest = words[words.index("train") + 1 :]
        load_config(recipe, [word for word in rest if "=" in word and not word.startswith("-")])
    for span in re.findall(r"`([^`\n]+)`", text):
        words = span.split()
        if all("=" in word and OURS.match(word) for word in words) and "{" not in span:
            load_config("sd35-ocr", words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_a_page_resolve(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_setting_that_moves_in_a_translation_is_named() -> None:
    assert {
        "optimisation.prompts",
        "optimisation.group",
        "optimisation.updates",
        "optimisation.micro_batch",
        "objective.clip_range",
        "objective.log_prob",
        "objective.kl_ref",
        "objective.beta",
        "optimisation.ema",
        "sampler.window",
        "model.guidance",
    } <= named_keys((ROOT / "docs/coming-from.md").read_text())


@pytest.mark.parametrize(
    ("gpus", "batch", "batches", "group", "trained", "accumulated", "expected"),
    [
        (8, 8, 4, 1, 4, 2, (256, 4)),  # DDPO, compressibility
        (8, 8, 4, 1, 4, 4, (256, 2)),  # DDPO, aesthetic
        (32, 9, 4, 24, 9, 2, (48, 2)),  # Flow-GRPO
        (4, 8, 8, 16, 8, 4, (16, 2)),
        (1, 8, 8, 8, 8, 4, (8, 2)),
        (4, 4, 8, 1, 4, 4, (128, 2)),  # D.1, Stable Diffusion 3.5
        (2, 8, 8, 1, 8, 4, (128, 2)),  # D.1, Stable Diffusion 1.5
    ],
)
def test_batches_of_other_codes_come_to_the_prompts_and_updates_of_the_page(
    gpus: int, batch: int, batches: int, group: int, trained: int, accumulated: int, expected: tuple[int, int]
) -> None:
    """P·K = GPUs · batch · batches, U = batches · sample batch / (train batch · accumulation)."""
    prompts, updates = gpus * batch * batches // group, batches * batch // (trained * accumulated)
    assert (prompts, updates) == expected
    runs = {
        (config.optimisation.prompts, config.optimisation.updates) for config in (load_config(n, []) for n in PAPER)
    }
    row = f"{prompts} × {group}"
    assert expected in runs or row in (ROOT / "docs/coming-from.md").read_text()


def test_values_survive_a_round_trip_through_yaml() -> None:
    for setting in recipe_settings("sd15-hpsv2", defaults=True):
        assert yaml.safe_load(setting.text) == setting.value
